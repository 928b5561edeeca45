"""The one entry point: ``python -m benchmarks SUITE [options]``.

Suites: attention, patch_embed, models, overhead, all; cpu (all of them on this CPU: tables, a file, the goals), gpu
(``make gpu``), roofline. Commands: compare, report, architectures (what a swap does to the models that people run).
``-h`` after any of them has its options.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import cases, compare, goals, harness, report, roofline, runner, suite_overhead, tables

NARROWEST = 150
# What `make bench` measures when it is not told: the telling cases and the sweeps.
CPU_TIER = 1


def main(arguments: list[str] | None = None) -> int:
    """Run one suite or command and return its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    command, rest = (given[0], given[1:]) if given else ("", [])
    if command == "compare":
        return compare.main(rest)
    if command == "report":
        return report.main(rest)
    if command == "architectures":
        from benchmarks import architectures

        return architectures.main(rest)
    if command == "gpu":
        from benchmarks import gpu

        return gpu.main(rest)
    if command == "roofline":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(roofline.measure(device).describe())
        return 0
    suites = tuple(cases.SUITES) if command in ("cpu", "all") else (command,)
    if not set(suites) <= set(cases.SUITES):
        print(f"{__doc__}\ngot {command!r}", file=sys.stderr)
        return 2
    return suite(suites, rest, "cpu" if command == "cpu" else "")


def suite(suites: tuple[str, ...], arguments: list[str], device: str = "") -> int:
    """Run suites on a device and print their table."""
    options, got = _options(suites, arguments, device)
    if got.list:
        for work in cases.select(options.device, suites, options.words, options.last_tier, options.quick):
            print(f"tier {work.tier}  {work.label}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch finds no CUDA device on this machine; nothing was run")
        return 3
    console = Console(width=None if Console().is_terminal else NARROWEST)
    facts = {"wheel": suite_overhead.build_wheel()} if got.build else {}
    for name, value in facts.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    result = runner.run(options, console, facts)
    if result.rows:
        tables.show(result.rows, console)
    for note in sorted(set(result.notes)):
        console.print(f"not timed: {note}", markup=False, highlight=False, soft_wrap=True)
    if result.path:
        console.print(f"wrote {len(result.rows)} rows to {result.path}", soft_wrap=True)
    if device == "cpu" and result.rows:
        goals.show(result.rows, console)
    if result.ended == runner.INTERRUPTED:
        return 130
    return 0 if result.rows else 1


def _options(suites: tuple[str, ...], arguments: list[str], device: str) -> tuple[runner.Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks SUITE", description=__doc__)
    if not device:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", choices=("cpu", "cuda"), default=automatic)
    parser.add_argument("-k", dest="words", default="", metavar="WORDS", help="only cases whose name has all the words")
    parser.add_argument("--list", action="store_true", help="print the cases in their order, and run nothing")
    parser.add_argument("--quick", action="store_true", help="a few cases, for a look and for CI; writes no file")
    parser.add_argument("--full", action="store_true", help="every case (on a CPU: hours), not the telling ones alone")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after this"
    )
    samples = "samples per case (CPU: {cpu}, GPU: {cuda})".format(**runner.REPEATS)
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help=samples)
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="CPU: numbers of threads (1 and all)")
    parser.add_argument("--all-peers", action="store_true", help="also peers that compile for every shape")
    parser.add_argument("--build", action="store_true", help="first build a wheel: its time and size, in minutes")
    parser.add_argument("--again", action="store_true", help="measure fresh rows anew")
    parser.add_argument("--out", type=Path, help="CSV, or a folder for <device>-<date>.csv (benchmarks/results)")
    got = parser.parse_args(arguments)
    chosen = device or got.device
    out = got.out or (None if got.quick else harness.RESULTS)
    threads = got.threads or ([1, torch.get_num_threads()] if chosen == "cpu" else ())
    tier = CPU_TIER if chosen == "cpu" and not (got.full or got.words) else 3
    options = runner.Options(
        chosen, suites, got.words, tier, got.quick, got.budget, got.repeats, threads, out, got.again, got.all_peers
    )
    return options, got


if __name__ == "__main__":
    sys.exit(main())
