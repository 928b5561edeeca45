"""Draws README's table and figures, and the full report, from the newest committed rows.

``python -m benchmarks report [--check]``. For each kind of machine (cpu, gpu) the newest file counts that is whole.
Everything goes between README's markers, into results/REPORT.md and results/figures/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures, goals, gpu_goals, harness
from benchmarks.harness import Row
from benchmarks.suite_patch_embed import CHANNELS_LAST
from benchmarks.tables import geometric_mean, roof

README = harness.ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
FIGURES_FOLDER = "figures"
README_FIGURES = {
    "time": "Time of attention against the sequence length",
    "models": "Images per second of whole models",
}
ALL_FIGURES = README_FIGURES | {
    "ratio": "Speed-up of the forward pass over N and head_dim",
    "ratio-backward": "Speed-up of the backward pass over N and head_dim",
    "roofline": "Useful work under the measured roofs",
}
MARK = f"> **{figures.STALE}**\n\n"
# The suites in the order in which a reader asks for them; README has these, the report all others behind them.
HEADLINES = (
    "model inference, eager",
    "model training step, eager",
    "attention forward",
    "attention forward, bias",
    "attention forward + backward",
    "patch_embed forward",
    "patch_embed forward + backward",
    "overhead eager call",
)


def newest(pattern: str = "cpu-*.csv") -> Path:
    """Return the newest results file: names end in the date; of one day's, one of the kernels as they are.

    Of a CPU one that has every case of the goals comes before one that a run has begun and a later one is to finish.
    """

    def order(path: Path) -> tuple[bool, str, bool, str]:
        rows = harness.read(path)
        return _is_whole(path, rows), path.stem[-10:], not harness.is_stale(rows), path.stem

    files = sorted(harness.RESULTS.glob(pattern), key=order)
    if not files:
        raise FileNotFoundError(f"no {pattern} under {harness.RESULTS}; make bench writes one")
    return files[-1]


def _is_whole(path: Path, rows: list[Row]) -> bool:
    if not path.name.startswith("cpu-"):
        return True
    return all(len(line.values) == len(line.goal.cases) for line in goals.lines(rows))


def evidence() -> list[Path]:
    """Return the files that README shows: the newest of a GPU, and the newest of a CPU."""
    patterns = ("gpu-*.csv", "cpu-*.csv")
    return [newest(pattern) for pattern in patterns if list(harness.RESULTS.glob(pattern))]


def is_stale(rows: list[Row]) -> bool:
    """Return whether the kernels have changed since ``rows`` were measured."""
    return harness.is_stale(rows)


def table(path: Path, headlines: bool = False) -> str:
    """Return the Markdown table of one results file: geometric mean and least ratio per suite, dtype and threads.

    With ``headlines`` of the suites that README shows, where the file has any of them.
    """
    rows = harness.read(path)
    first, chosen = rows[0], sorted(harness.best(rows), key=_place)
    headlines = headlines and any(row.suite in HEADLINES for row in chosen)
    chosen = [row for row in chosen if row.suite in HEADLINES or not headlines]
    threads = sorted({row.threads for row in chosen})
    several = len({row.backend for row in chosen}) > 1
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in chosen:
        groups.setdefault((row.suite, row.dtype, row.backend), []).append(row)
    columns = [f"{count} thread{'s' * (count > 1)}" if count else "speed-up" for count in threads]
    shares = any(row.share > 0 for row in chosen)
    head = ["work", "dtype", *(["backend"] * several), "against", *columns, *(["of the roof"] * shares)]
    records = []
    for (suite, dtype, backend), group in groups.items():
        rivals = {row.peer for row in group}
        peer = "PyTorch's best" if len(rivals) > 1 or suite.startswith("patch_embed") else rivals.pop()
        cells = [_cell([row.ratio for row in group if row.threads == count]) for count in threads]
        # What is paid before any arithmetic is under no roof.
        reached = f"{100 * statistics.median(row.share for row in group):.0f} %" if any(r.bound for r in group) else "–"
        share = [reached] if shares else []
        records.append([suite, dtype, *([backend] * several), peer, *cells, *share])
    link = (
        os.path.relpath(path, harness.ROOT) if path.is_relative_to(harness.ROOT) else f"benchmarks/results/{path.name}"
    )
    said = (
        f"Speed-up over PyTorch: geometric mean over the shapes (least – most). {first.device}, {first.capability}, "
        f"torch {first.torch}, {len(rows)} rows in [{path.name}]({link}), medians of "
        "interleaved runs; every row held the tolerance rule."
    )
    if disturbed := sum(bool(row.disturbed) for row in rows):
        said += f" Others used the same processor during {disturbed} of them."
    return "\n".join([_markdown(head, records), "", said])


def _place(row: Row) -> tuple[int, str]:
    return (HEADLINES.index(row.suite), "") if row.suite in HEADLINES else (len(HEADLINES), row.suite)


def _markdown(head: Sequence[str], records: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in records)])


def _cell(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    return f"{geometric_mean(ratios):.2f} × ({min(ratios):.2f} – {max(ratios):.2f})"


def content() -> str:
    """Return what stands between README's markers: per device a table and figures, marked where they are stale."""
    parts = []
    for path in evidence():
        mark = MARK if is_stale(harness.read(path)) else ""
        parts.append(mark + table(path, headlines=True))
        parts += _images(path, README_FIGURES, "benchmarks/results/")
    parts.append("[Every suite, shape and peer](benchmarks/results/REPORT.md).")
    if not any(path.name.startswith("gpu-") for path in evidence()):
        parts.append("Speed on a GPU: **not measured yet.** `make gpu` measures it.")
    return "\n\n".join(parts)


def _images(path: Path, kinds: dict[str, str], prefix: str) -> list[str]:
    folder = harness.RESULTS / FIGURES_FOLDER
    names = {kind: f"{path.stem}-{kind}.svg" for kind in kinds}
    return [
        f"![{title}]({prefix}{FIGURES_FOLDER}/{names[kind]})"
        for kind, title in kinds.items()
        if (folder / names[kind]).exists()
    ]


def full(paths: list[Path]) -> str:
    """Return the report: for each file its goals, tables, figures, every row, and what was not timed."""
    parts = ["# What was measured", "Drawn by `python -m benchmarks report`; do not edit."]
    for path in paths:
        rows = harness.read(path)
        parts.append(f"## {rows[0].device}")
        parts += _goals(rows) if path.name.startswith("cpu-") else _gpu_goals(rows)
        parts.append((MARK if is_stale(rows) else "") + table(path).replace("(benchmarks/results/", "("))
        parts += _images(path, ALL_FIGURES, "")
        if not any(row.bound for row in rows):
            parts.append("These rows are from before the roofs were measured with them: no roofline.")
        parts += ["### Every case against each peer", _cases(rows)]
        side = path.with_suffix(".json")
        content = json.loads(side.read_text()) if side.exists() else {}
        parts += [*_costs(rows, content.get("facts", {})), *_not_timed(content)]
    return "\n\n".join(parts) + "\n"


def _goals(rows: list[Row]) -> list[str]:
    lines = goals.lines(rows)
    mark = MARK if any(line.stale for line in lines) else ""
    met = sum(line.verdict == goals.MET for line in lines)
    said = (
        f"Of {len(lines)} lines {met} are met. At each shape the fastest of the peers that a line names counts; a line "
        "with a missing case is never met. A line has the cases that benchmarks/goals.py lists, the table below has "
        f"all, so their means differ. {CHANNELS_LAST} gets images and weights that lie so already: it is "
        "shown beside them and does not count."
    )
    if any(row.disturbed for row in rows):
        said += " A case is disturbed when others used the processor in most of its samples; the next run repeats it."
    return ["### Goals", mark + _markdown(goals.HEAD, map(goals.cells, lines)), said]


def _gpu_goals(rows: list[Row]) -> list[str]:
    found = gpu_goals.lines(rows)
    met = sum(line.verdict == goals.MET for line in found)
    said = f"Of {len(found)} limits {met} are met. They were set for an H200; of ours the fastest backend counts."
    return ["### Goals", _markdown(gpu_goals.HEAD, map(gpu_goals.cells, found)), said]


def _cases(rows: list[Row]) -> str:
    head = (
        "suite", "case", "dtype", "threads", "backend", "ms (p20 – p80)", "without graph", "peer", "peer ms", "ratio",
        "GFLOP/s", "GB/s", "of the roof", "per second", "MFU", "peak MiB", "rule",
    )  # fmt: skip
    disturbed = any(row.disturbed for row in rows)
    records = []
    for row in rows:
        model = row.suite.startswith("model")
        mfu = f"{100 * row.ours_gflops / row.peak_gflops:.0f} %" if model and row.peak_gflops else "–"
        memory = f"{row.ours_mib:.0f} ({row.peer_mib:.0f})" if row.ours_mib else "–"
        version = f" ({row.peer_version})" if row.peer_version else ""
        records.append((
            row.suite, " ".join(filter(None, (row.case, row.layout))), row.dtype, str(row.threads or "–"), row.backend,
            f"{row.ours_p50:.4g} ({row.ours_p20:.4g} – {row.ours_p80:.4g})", _number(row.ours_eager),
            row.peer + version, _number(row.peer_p50), f"{row.ratio:.2f}", _number(row.ours_gflops),
            _number(row.ours_gbs), roof(row), _number(row.per_second), mfu, memory, f"{row.rule:.2f}",
            *[f"{row.disturbed} of {row.samples}" if row.disturbed else "–"] * disturbed,
        ))  # fmt: skip
    return _markdown([*head, *["disturbed samples"] * disturbed], records)


def _number(value: float) -> str:
    return f"{value:.4g}" if value else "–"


def _costs(rows: list[Row], facts: dict[str, Any]) -> list[str]:
    """Return what is paid before any arithmetic: calls, imports, first calls, the build, the wheel."""
    lines = [
        f"- {row.suite.removeprefix('overhead ')}, {row.dtype}, {row.backend}"
        + f", threads: {row.threads}" * bool(row.threads)
        + f": {row.ours_p50:.4g} ms; {row.peer}: {row.peer_p50:.4g} ms"
        for row in harness.best(rows)
        if row.suite.startswith("overhead")
    ]
    wheel, build = facts.get("wheel", {}), facts.get("build", {})
    if "wheel_mib" in wheel:
        lines.append(
            f"- wheel ({wheel['architectures']} architectures): {wheel['wheel_mib']} MiB, built in "
            f"{wheel['build_seconds']:.0f} s"
        )
    else:
        lines.append(f"- wheel: {wheel.get('why not', 'not built in these runs; `--build` does')}")
    if build:
        failed = f"; failed: {build['error'].strip().splitlines()[-1]}" if build.get("error", "").strip() else ""
        size = f"{build['seconds']:.0f} s, {build['native_mib']} MiB"
        lines.append(f"- build for {build['architecture']} alone: {size}{failed}")
    return ["### Costs", "\n".join(lines)]


def _not_timed(side: dict[str, object]) -> list[str]:
    parts = []
    peers, notes = side.get("peers"), side.get("not timed")
    if isinstance(peers, dict):
        parts += ["### Peers", "\n".join(f"- {name}: {said}" for name, said in peers.items())]
    if isinstance(notes, list) and notes:
        parts += ["### Not timed, and why", "\n".join(f"- {note}" for note in notes)]
    return parts


def updated(readme: str, content: str) -> str:
    """Return ``readme`` with ``content`` between the markers."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{content}\n{END}{tail}"


def without_mark(text: str) -> str:
    """Return a text without its stale marks: a change of a kernel makes evidence stale, and README no lie."""
    return text.replace(MARK, "")


def differences() -> list[str]:
    """Return what differs from the committed rows: README's part, the report, or a figure of other rows."""
    found = []
    readme = README.read_text()
    if without_mark(updated(readme, content())) != without_mark(readme):
        found.append("README.md differs from the rows")
    report = harness.RESULTS / "REPORT.md"
    if not report.exists() or without_mark(report.read_text()) != without_mark(full(evidence())):
        found.append("results/REPORT.md differs from the rows")
    for path in evidence():
        for drawing in (harness.RESULTS / FIGURES_FOLDER).glob(f"{path.stem}-*.svg"):
            shown = re.search(r"rows ([0-9a-f]{12})", drawing.read_text())
            if shown is None or shown[1] != figures.rows_hash(path):
                found.append(f"{drawing.name} shows other rows")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Draw everything anew, or with --check return 1 if something differs from the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README and rows differ")
    check = parser.parse_args(arguments).check
    for path in evidence():
        if is_stale(harness.read(path)):
            print(f"{path.name}: {figures.STALE}")
    if check:
        found = differences()
        print("\n".join([*found, "run python -m benchmarks report"] if found else ["README and rows agree"]))
        return int(bool(found))
    for path in evidence():
        for old in (harness.RESULTS / FIGURES_FOLDER).glob("*.svg"):
            # Only what the newest files show is kept beside them.
            if not any(old.name.startswith(kept.stem) for kept in evidence()):
                old.unlink()
        figures.draw(path, harness.RESULTS / FIGURES_FOLDER)
    (harness.RESULTS / "REPORT.md").write_text(full(evidence()))
    README.write_text(updated(README.read_text(), content()))
    print(f"drew {', '.join(path.name for path in evidence())} into README.md, results/REPORT.md and results/figures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
