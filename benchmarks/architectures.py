"""What ``fastvit.swap`` does to the models that people run: ``python -m benchmarks architectures [--write]``.

For each architecture: which layers were swapped and which were left alone and why; the errors of outputs and gradients
as a part of what the tolerance rule allows; graph breaks of torch.compile; whether torch.export takes it; and the time
of the unswapped model over that of the swapped one. ``--write`` renews results/architectures.csv and ARCHITECTURES.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastvit
from benchmarks import harness
from benchmarks.report import MARK
from benchmarks.zoo import Architecture, architectures
from fastvit.commands.env import cpu_name
from fastvit.commands.timing import race
from fastvit.modules.fused import FusedForward
from fastvit.testing import check_model, livened

CSV = harness.RESULTS / "architectures.csv"
PAGE = harness.RESULTS / "ARCHITECTURES.md"
REPEATS = 15


@dataclass(frozen=True)
class Row:
    """One architecture; errors are parts of what the rule allows (1 is the limit), ``speed`` is a ratio of medians.

    ``inference`` and ``training`` say in how many of the swapped layers of each kind an op of ours ran, without and
    with gradients: "2/2 attention, 1/1 patch embedding". Columns after ``machine`` are absent from older files.
    """

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
    inference: str = ""
    training: str = ""
    fastvit: str = ""
    commit: str = ""
    sources: str = ""
    measured: str = ""

    @property
    def idle(self) -> bool:
        """Whether an attention that was swapped ran no op in inference: then the row claims what it did not do."""
        found = re.search(r"(\d+)/(\d+) attention", self.inference)
        return found is not None and found[1] != found[2]


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
    training = ran(swapped, call, named)
    with torch.no_grad():
        inference = ran(swapped, call, named)
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
        inference,
        training,
        fastvit.__version__,
        harness.commit(),
        harness.source_hash(),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )


class _Watch(TorchDispatchMode):
    """Notes which swapped layers call an op of ours: the one that was entered last when an op is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entered: nn.Module | None = None
        self.ran: set[int] = set()
        # Containers call no op themselves. A hook before a layer leaves its path as it is.
        self.layers = [
            module for module in model.modules() if isinstance(module, FusedForward) and not module.fastvit_container
        ]
        self.hooks = [layer.register_forward_pre_hook(self._enter) for layer in self.layers]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.entered = module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastvit":
            self.ran.add(id(self.entered))
        return func(*args, **(kwargs or {}))


def ran(model: nn.Module, call: tuple[Any, ...], named: dict[str, Any]) -> str:
    """Return in how many of the swapped layers of each kind an op of ours runs in one forward."""
    watch = _Watch(model)
    with watch:
        model(*call, **named)
    for hook in watch.hooks:
        hook.remove()
    kinds = Counter(layer.fastvit_kind for layer in watch.layers)
    active = Counter(layer.fastvit_kind for layer in watch.layers if id(layer) in watch.ran)
    return ", ".join(f"{active[kind]}/{kinds[kind]} {kind}" for kind in sorted(kinds))


def machine() -> str:
    """Return the processor, the instruction set in use, the threads and torch's version."""
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {harness.capability()}, {threads} threads, torch {torch.__version__}"


def _graph_breaks(model: nn.Module, call: tuple[Any, ...], named: dict[str, Any]) -> int:
    torch._dynamo.reset()
    # As fullgraph=True sets them: numbers read out of tensors (Qwen's lengths of windows) are symbols of the graph.
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
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
    """Read rows that :func:`write` wrote, now or before the columns after ``machine`` existed."""
    kinds = {"str": str, "int": int, "float": float}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = [each for each in fields(Row) if each.name in (reader.fieldnames or ())]
        return [Row(**{each.name: kinds[str(each.type)](record[each.name]) for each in columns}) for record in reader]


def stale(rows: list[Row]) -> list[str]:
    """Return why the table is to be made again: architectures that it lacks, and kernels that have changed since."""
    reasons = [
        f"{each.library} {each.name} is missing"
        for each in architectures()
        if (each.library, each.name) not in {(row.library, row.model) for row in rows}
    ]
    if _kernels_changed(rows):
        reasons.append("the kernels have changed")
    return reasons


def _kernels_changed(rows: list[Row]) -> bool:
    return bool({row.sources for row in rows} - {harness.source_hash()})


def _ops(row: Row) -> str:
    if row.inference == row.training:
        return row.inference or "–"
    return f"{row.inference or 'none'}; with gradients {row.training or 'none'}"


def _versions(row: Row) -> str:
    return f"fastvit {row.fastvit}, commit {row.commit}, kernels {row.sources}" if row.sources else "earlier kernels"


def page_of(rows: list[Row]) -> str:
    """Return the Markdown page of these rows."""
    mark = MARK if _kernels_changed(rows) else ""
    head = f"""# What a swap does to {len(rows)} architectures

{mark}Made by `python -m benchmarks architectures --write`. Real classes at their real width, two layers deep, random
weights, float32, on the CPU. *Outputs* and *gradients* are the worst error against float64 as a part of what the
tolerance rule allows (1.00 is the limit; gradients of every parameter). *Breaks* are graph breaks of torch.compile in
the whole model. *Ran* is in how many of the swapped layers an op of ours ran (a dash: nothing was swapped): the
gradient of BEiT's bias has no kernel yet, and Qwen's patches lie in rows already, whose product torch computes.
*Export* is "yes, plain" where the graph has no op of ours. *Speed* is the median time of the unswapped model over that
of the swapped one, one image, without gradients, taken in turn, on
{_one_of_each(row.machine for row in rows)}; {_one_of_each(map(_versions, rows))}.

| library | model | swapped | ran | outputs | gradients | breaks | export | speed | left alone |
|---|---|---|---|---|---|---|---|---|---|
"""
    lines = [
        f"| {row.library} | {row.model} | {row.swapped or 'nothing'} | {_ops(row)} | {row.outputs:.2f} "
        f"| {row.gradients:.2f} | {row.graph_breaks} | {row.export} | {row.speed:.2f} × | {row.left_alone or '–'} |"
        for row in rows
    ]
    return head + "\n".join(lines) + "\n"


def _one_of_each(texts: Iterable[str]) -> str:
    return " and ".join(sorted(set(texts)))


def main(arguments: list[str]) -> int:
    """Measure the chosen architectures; 1 if one misses the rule, or does not run what it swapped."""
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
    idle = [row.model for row in rows if row.idle]
    print(f"attention was swapped and ran no op in {', '.join(idle) or 'none'}")
    if got.write and not missed and not idle:
        write(rows)
    return 1 if missed or idle else 0
