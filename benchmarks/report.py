"""Draws the README's table from the newest committed rows: ``python -m benchmarks.report [--check]``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Row

README = harness.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def newest(pattern: str = "cpu-*.csv") -> Path:
    """Return the newest results file: names end in the date."""
    files = sorted(harness.RESULTS.glob(pattern), key=lambda path: path.stem[-10:])
    if not files:
        raise FileNotFoundError(f"no {pattern} under {harness.RESULTS}; make bench writes one")
    return files[-1]


def is_stale(rows: list[Row]) -> bool:
    """Return whether the kernels have changed since ``rows`` were measured."""
    return any(row.sources != harness.source_hash() for row in rows)


def table(path: Path) -> str:
    """Return the Markdown table of one results file: geometric mean and least ratio per suite, dtype and threads."""
    rows = harness.read(path)
    first = rows[0]
    threads = sorted({row.threads for row in rows})
    groups: dict[tuple[str, str, str], dict[int, list[float]]] = {}
    for row in rows:
        peer = "PyTorch's best" if row.suite.startswith("patch_embed") else row.peer
        groups.setdefault((row.suite, row.dtype, peer), {}).setdefault(row.threads, []).append(row.ratio)
    lines = [
        "| work | dtype | against | " + " | ".join(f"{count} thread{'s' * (count > 1)}" for count in threads) + " |",
        "|---|---|---|" + "---|" * len(threads),
    ]
    for (suite, dtype, peer), ratios in groups.items():
        cells = [_cell(ratios.get(count, [])) for count in threads]
        lines.append(f"| {suite} | {dtype} | {peer} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Speed-up over PyTorch: geometric mean over the shapes (least – most). {first.device}, {first.capability}, "
        f"torch {first.torch}, {len(rows)} rows in [{path.name}](benchmarks/results/{path.name}), medians of "
        "interleaved runs; every row held the tolerance rule.",
    ]
    return "\n".join(lines)


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    return f"{mean:.2f} × ({min(ratios):.2f} – {max(ratios):.2f})"


def updated(readme: str, content: str) -> str:
    """Return ``readme`` with ``content`` between the markers."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def main() -> None:
    """Rewrite the README, or with --check exit 1 if it differs from the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README and rows differ")
    check = parser.parse_args().check
    readme = README.read_text()
    wanted = updated(readme, table(newest()))
    if check:
        raise SystemExit(0 if wanted == readme else "README.md differs from the rows; run python -m benchmarks.report")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
