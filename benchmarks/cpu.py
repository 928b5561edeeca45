"""The CPU suite, ``python -m benchmarks.cpu [--quick]``: ours against PyTorch's, a table and the rows behind it."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import cases, harness
from benchmarks.harness import Contest, Row
from fastvit.commands.env import cpu_name


def contests(quick: bool) -> Iterator[Contest]:
    """Yield every contest of the suite, the most telling first."""
    attention = cases.ATTENTION_SHAPES[:1] + cases.ATTENTION_SHAPES[-1:] if quick else cases.ATTENTION_SHAPES
    patches = cases.PATCH_EMBED_SHAPES[:1] if quick else cases.PATCH_EMBED_SHAPES
    yield from cases.attention_contests(torch.float32, "forward", attention)
    yield from cases.patch_embed_contests(torch.float32, "forward", patches)
    yield from cases.attention_contests(torch.float32, "backward", attention)
    yield from cases.attention_contests(torch.bfloat16, "forward", attention)
    yield from cases.patch_embed_contests(torch.bfloat16, "forward", patches)
    if not quick:
        yield from cases.model_contests(torch.float32)
        yield from cases.attention_contests(torch.float32, "bias", attention)
        yield from cases.attention_contests(torch.float16, "forward", attention)
        yield from cases.patch_embed_contests(torch.float32, "backward", patches)


def show(rows: list[Row]) -> None:
    """Print the rows, and the geometric mean and the least ratio of each suite."""
    console = Console(width=None if Console().is_terminal else 120)
    for threads in sorted({row.threads for row in rows}):
        table = Table("suite", "case", "dtype", "ours ms", "peer ms", "peer", "ratio", "GFLOP/s", "rule")
        for row in rows:
            if row.threads == threads:
                values = (f"{row.ours_p50:.3f}", f"{row.peer_p50:.3f}", row.peer, f"{row.ratio:.2f}")
                table.add_row(row.suite, row.case, row.dtype, *values, f"{row.ours_gflops:.0f}", f"{row.rule:.2f}")
        table.title = f"{rows[0].device}, {rows[0].capability}, torch {rows[0].torch}, threads: {threads}"
        console.print(table)
        for line in summaries([row for row in rows if row.threads == threads]):
            console.print(line)


def summaries(rows: list[Row]) -> list[str]:
    """Return one line per suite and dtype: geometric mean and least ratio; more than 1 is faster than the peer."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row.suite} {row.dtype}", []).append(row.ratio)
    return [
        f"{name}: geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} ×, least {min(ratios):.2f} ×"
        for name, ratios in groups.items()
    ]


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, for a look and for CI")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()], metavar="N")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: results/cpu-<device>-<date>.csv; --quick: none)"
    )
    arguments = parser.parse_args()
    device = cpu_name()
    torch.manual_seed(0)
    rows = []
    try:
        for threads in sorted(set(arguments.threads)):
            torch.set_num_threads(threads)
            for contest in contests(arguments.quick):
                row = harness.run(contest, arguments.repeats, device)
                if row is not None:
                    rows.append(row)
                    print(
                        f"{row.suite:20} {row.case:28} {row.dtype:9} {threads} threads  {row.ratio:.2f} ×", flush=True
                    )
    except KeyboardInterrupt:
        print("interrupted; the finished rows are kept")
    if not rows:
        raise SystemExit("no row was measured")
    show(rows)
    name = "-".join(device.lower().replace("(r)", "").replace("(tm)", "").split()[:4])
    out = arguments.out or (None if arguments.quick else harness.RESULTS / f"cpu-{name}-{date.today()}.csv")
    if out:
        harness.write(rows, out)
        print(f"wrote {len(rows)} rows to {out}")


if __name__ == "__main__":
    main()
