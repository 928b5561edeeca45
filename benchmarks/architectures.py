"""What ``fastvit.swap`` does to the models that people run: ``python -m benchmarks architectures [--write]``.

For each architecture: which layers were swapped and which were left alone and why; the errors of outputs and gradients
as a part of what the tolerance rule allows; graph breaks of torch.compile; whether torch.export takes it; and the time
of the unswapped model over that of the swapped one. ``--write`` renews results/architectures.csv and ARCHITECTURES.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

import fastvit
from benchmarks import harness
from benchmarks.zoo import Architecture, architectures
from fastvit.commands.env import cpu_name
from fastvit.commands.timing import race
from fastvit.testing import check_model, livened

CSV = harness.RESULTS / "architectures.csv"
PAGE = harness.RESULTS / "ARCHITECTURES.md"
REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One architecture; errors are parts of what the rule allows (1 is the limit), ``speed`` is a ratio of medians."""

    library: str
    model: str
    swapped: str
    left_alone: str
    outputs: float
    gradients: float
    tensors: int
    graph_breaks: int
    export: str
    speed: float
    machine: str


def measure(architecture: Architecture) -> Row:
    """Build one architecture, swap it, and fill its row."""
    torch.manual_seed(0)
    plain = livened(architecture.build())
    call, named = architecture.inputs, architecture.keywords
    comparisons = check_model(plain, *call, **named)
    outputs = [each.ratio for each in comparisons if each.name.startswith("output ")]
    gradients = [each.ratio for each in comparisons if not each.name.startswith("output ")]
    swapped = copy.deepcopy(plain)
    report = fastvit.swap(swapped)
    with torch.no_grad():
        device = torch.device("cpu")
        speed = race(
            architecture.name, lambda: plain(*call, **named), lambda: swapped(*call, **named), device, 0.0, REPEATS
        ).ratio
        breaks = _graph_breaks(swapped, call, named)
        export = _export(swapped, call, named)
    return Row(
        architecture.library,
        architecture.name,
        ", ".join(f"{count} {kind}" for kind, count in Counter(row.original_type for row in report.swapped).items()),
        "; ".join(sorted({f"{row.original_type}: {row.reason}" for row in report.left_alone})),
        round(max(outputs), 2),
        round(max(gradients), 2),
        len(comparisons),
        breaks,
        export,
        round(speed, 3),
        machine(),
    )


def machine() -> str:
    """Return the processor, the instruction set in use, the threads and torch's version."""
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {harness.capability()}, {threads} threads, torch {torch.__version__}"


def _graph_breaks(model: nn.Module, call: tuple[Any, ...], named: dict[str, Any]) -> int:
    torch._dynamo.reset()
    return int(torch._dynamo.explain(model)(*call, **named).graph_break_count)


def _export(model: nn.Module, call: tuple[Any, ...], named: dict[str, Any]) -> str:
    try:
        program = torch.export.export(model, call, named)
    except Exception as error:  # any library may raise anything, and the reason belongs into the table
        return f"no: {type(error).__name__}"
    return "yes" if "fastvit" in str(program.graph) else "yes, plain"


def write(rows: list[Row], path: Path = CSV, page: Path = PAGE) -> None:
    """Write the rows as CSV, and as the page that a reader opens."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    page.write_text(page_of(read(path)), encoding="utf-8")


def read(path: Path = CSV) -> list[Row]:
    """Read rows that :func:`write` wrote."""
    kinds = {"str": str, "int": int, "float": float}
    with open(path, newline="") as file:
        return [Row(**{each.name: kinds[str(each.type)](record[each.name]) for each in fields(Row)})
                for record in csv.DictReader(file)]  # fmt: skip


def page_of(rows: list[Row]) -> str:
    """Return the Markdown page of these rows."""
    head = f"""# What a swap does to {len(rows)} architectures

Made by `python -m benchmarks architectures --write`. Real classes at their real width, two layers deep, random weights,
float32, on the CPU. *Outputs* and *gradients* are the worst error against float64 as a part of what the tolerance rule
allows (1.00 is the limit; gradients of every parameter). *Breaks* are graph breaks of torch.compile in the whole model.
*Speed* is the median time of the unswapped model over that of the swapped one, one image, without gradients, taken in
turn, on {" and ".join(sorted({row.machine for row in rows}))}.

| library | model | swapped | outputs | gradients | breaks | export | speed | left alone |
|---|---|---|---|---|---|---|---|---|
"""
    lines = [
        f"| {row.library} | {row.model} | {row.swapped or 'nothing'} | {row.outputs:.2f} | {row.gradients:.2f} "
        f"| {row.graph_breaks} | {row.export} | {row.speed:.2f} × | {row.left_alone or '–'} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Measure the chosen architectures; 1 if one misses the rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks architectures", description=__doc__)
    parser.add_argument("-k", dest="words", default="", metavar="WORDS", help="only names with all of these words")
    parser.add_argument("--write", action="store_true", help=f"renew {CSV.name} and {PAGE.name} (needs all of them)")
    got = parser.parse_args(arguments)
    if got.words and got.write:
        parser.error("--write: got -k as well; the page has all architectures or none")
    words = got.words.split()
    chosen = [each for each in architectures() if all(word in f"{each.library} {each.name}" for word in words)]
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for architecture in track(chosen, "architectures", disable=not sys.stderr.isatty()):
            rows.append(measure(architecture))
            print(rows[-1], flush=True)
    missed = [row.model for row in rows if not max(row.outputs, row.gradients) <= 1.0]
    print(f"{len(rows)} architectures, {len(missed)} miss the rule: {', '.join(missed) or 'none'}")
    if got.write and not missed:
        write(rows)
    return 1 if missed else 0
