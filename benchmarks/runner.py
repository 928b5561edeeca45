"""The loop behind every suite: most telling case first, fresh rows skipped, every finished row on disk at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import (
    cases,
    correctness,
    earlier_runs,
    gpu_goals,
    harness,
    peers,
    roofline,
    suite_attention,
    suite_models,
    suite_overhead,
    suite_patch_embed,
    timers,
)
from benchmarks.cases import Work
from benchmarks.earlier_runs import Earlier
from benchmarks.harness import Contest, Outcome, Row
from benchmarks.roofline import Machine
from benchmarks.timers import first_line, is_lost
from fastvit.commands.timing import Clock
from fastvit.testing import ieee_float32

CONTESTS: dict[str, Callable[..., Contest]] = {
    "attention": suite_attention.contest,
    "patch_embed": suite_patch_embed.contest,
    "models": suite_models.contest,
    "overhead": suite_overhead.contest,
}
BACKENDS = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
# Our own helpers (git, collect_env) count as others: what a short run shows of them is less than this.
BUSY = 0.25
INTERRUPTED = "interrupted"
# How a run ends whose device has faulted: what comes after in the same process fails, whatever it is.
LOST = "the device is lost to this process"
REPEATS = {"cpu": 24, "cuda": 30}
# How often a run comes back to the cases that others disturbed.
RETURNS = 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Options:
    """What to run, on what, for how long, and where to.

    ``red`` has the kernels that missed the rule on this device, as (backend, work, dtype): see :func:`is_red`. ``skip``
    says of the labels of cases that are not to be run why not, and ``note`` is told the label of each case when it
    begins.
    """

    device: str = "cpu"
    suites: Sequence[str] = tuple(cases.SUITES)
    words: str = ""
    last_tier: int = 3
    quick: bool = False
    budget: float = float("inf")
    repeats: int = 0
    threads: Sequence[int] = ()
    out: Path | None = None
    again: bool = False
    all_peers: bool = False
    backends: Sequence[str] = ()
    red: set[tuple[str, str, str]] = field(default_factory=set)
    skip: dict[str, str] = field(default_factory=dict)
    note: Callable[[str], None] = lambda label: None


@dataclass
class Report:
    """What a run left: all rows of its file, how many of them are new, one line per thing that was not timed.

    ``ran`` has the labels of the cases that it began, ``environment`` is this run's own.
    """

    rows: list[Row] = field(default_factory=list)
    new: int = 0
    notes: list[str] = field(default_factory=list)
    machines: list[Machine] = field(default_factory=list)
    path: Path | None = None
    ended: str = "finished"
    facts: dict[str, Any] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    environment: dict[str, Any] = field(default_factory=dict)
    earlier: Earlier = field(default_factory=Earlier)


def run(options: Options, console: Console | None = None, facts: dict[str, Any] | None = None) -> Report:
    """Run the suites within the budget; a keyboard interrupt ends the run and loses no finished row."""
    console = console or Console()
    begin, clock = time.monotonic(), Clock()
    report = Report(facts=facts or {})
    works = cases.select(options.device, options.suites, options.words, options.last_tier, options.quick)
    report.ran = {work.label for work in works} & set(options.skip)
    report.notes = [f"{label}: {options.skip[label]}" for label in sorted(report.ran)]
    works = [work for work in works if work.label not in options.skip]
    if options.device == "cuda":
        # A run may end before the first tier does.
        works.sort(key=gpu_goals.rank)
    if not works:
        report.ended = "no case has this name"
        return report
    threads = sorted(set(options.threads)) or ([torch.get_num_threads()] if options.device == "cpu" else [0])
    before = torch.get_num_threads()
    try:
        for machine in _machines(options, threads, console):
            report.machines.append(machine)
            _open(report, options, machine)
        todo = [
            (work, machine)
            for work in works
            for machine in report.machines
            if not _is_done(work, machine, report, options)
        ]
        # What a backend could not do before, with these kernels, is tried again when all else is done.
        todo.sort(
            key=lambda one: _has_failed(one[0], report.earlier.notes, options.backends or BACKENDS[options.device])
        )
        skipped = len(works) * len(report.machines) - len(todo)
        if skipped:
            console.print(f"{skipped} cases have fresh rows and are skipped (--again measures them anew)")
        disturbed = _measure(todo, report, options, begin, console)
        if options.device == "cuda" and not options.all_peers:
            # Once more with the peers that compile for every shape: they would take the goals' time.
            costly = [one for one in todo if cases.is_costly(one[0], options.device)]
            _measure(costly, report, replace(options, all_peers=True), begin, console)
        for _ in range(RETURNS):
            if disturbed:
                console.print(f"{len(disturbed)} cases that others' work disturbed are measured anew")
                disturbed = _measure(disturbed, report, options, begin, console)
    except KeyboardInterrupt:
        report.ended = INTERRUPTED
    finally:
        torch.set_num_threads(before)
        # A reader must know whether the machine was idle; a CPU's rows are worth nothing if it was not.
        busy = round(clock.processors_busy_elsewhere(), 2)
        report.environment |= {
            "processors busy elsewhere": busy,
            # Rows that were measured once more, or by themselves, are another thing than those of a whole run.
            "run": {"cases": options.words, "last tier": options.last_tier, "again": options.again},
            "ended": report.ended,
        }
        save(report)
    if busy > BUSY:
        console.print(f"other processes kept {busy} processors busy: these times are not to be trusted")
    console.print(
        f"{report.ended}: {report.new} new rows, {len(report.rows)} in all" + f", {report.path}" * bool(report.path),
        soft_wrap=True,
    )
    return report


def _machines(options: Options, threads: Sequence[int], console: Console) -> Iterator[Machine]:
    for number in threads:
        if options.device == "cpu":
            torch.set_num_threads(number)
        small = {"size": 32 << 20, "sizes": (512,)} if options.quick and options.device == "cpu" else {}
        machine = roofline.measure(options.device, DTYPES, **small)  # type: ignore[arg-type]
        console.print(f"roofline: {machine.describe()}", soft_wrap=True)
        yield machine


def _open(report: Report, options: Options, machine: Machine) -> None:
    """Take over the rows of this device's files that are fresh, into the file of today."""
    if options.out is None or report.path is not None:
        return
    slug = harness.device_slug(machine.device, machine.name)
    if options.out.suffix == ".csv":
        report.path, paths = options.out, [options.out] if options.out.exists() else []
    else:
        report.path, paths = options.out / f"{slug}-{date.today()}.csv", earlier_runs.files(options.out, slug)
    report.earlier = earlier_runs.earlier(paths, report.path, machine)
    report.rows = report.earlier.rows
    report.facts = report.earlier.facts | report.facts


def _is_done(work: Work, machine: Machine, report: Report, options: Options) -> bool:
    if options.again:
        return False
    wanted = {name for name in options.backends or BACKENDS[options.device] if not is_red(name, work, options.red)}
    done = {
        row.backend
        for row in report.rows
        if row.work == (*work.key, machine.threads) and harness.is_fresh(row, machine) and not row.disturbed
    }
    return bool(done) and wanted <= done | _cannot(work, wanted - done, options.device)


def _cannot(work: Work, backends: set[str], device: str) -> set[str]:
    """Return the backends that cannot run attention of this dtype and head_dim at all: no row is to be expected."""
    from fastvit.kernels.spec import AttentionSpec
    from fastvit.ops.backends import BACKENDS as TABLE

    shape = work.details
    if not isinstance(shape, cases.AttentionShape):
        # Models and patches: judged by ViT-B's attention and its patches in this dtype.
        from fastvit.commands.env import standard_specs

        specs = standard_specs(torch.device(device), work.dtype).values()
        return {name for name in backends if any(TABLE[name].why_not(spec) for spec in specs)}
    spec = AttentionSpec(
        shape.batch, shape.heads, shape.seqlen, shape.seqlen, shape.head_dim, shape.head_dim, work.dtype,
        work.dtype if shape.bias else None, False, torch.device(device),
    )  # fmt: skip
    return {name for name in backends if TABLE[name].why_not(spec)}


def _has_failed(work: Work, notes: Sequence[str], backends: Sequence[str]) -> bool:
    """Return whether one of our backends has left a line instead of a row; that a peer has is no matter.

    Nor is that a backend could not run the call: it may not have been built then.
    """
    tried = [note for note in notes if correctness.CANNOT not in note]
    return any(note.startswith(f"{work.label}: {name}: ") for note in tried for name in backends)


def is_red(backend: str, work: Work, red: set[tuple[str, str, str]]) -> bool:
    """Return whether a kernel that ``work`` would run has missed the rule on this device.

    ``red`` names a kernel as (backend, "attention forward" | "attention backward" | "patch_embed forward" |
    "patch_embed backward", dtype), attention's also for one head_dim alone ("attention forward D64"). A backward pass
    needs the forward pass of its op, a model both ops.
    """
    backward = "backward" in work.suite or "training" in work.suite
    ops = {"attention": ["attention"], "patch_embed": ["patch_embed"], "overhead": ["attention"]}.get(
        work.kind, ["attention", "patch_embed"]
    )
    directions = ["forward", "backward"] if backward else ["forward"]
    dtype = harness.short(work.dtype)
    kernels = [f"{op} {direction}" for op in ops for direction in directions]
    if (head_dim := cases.head_dim(work)) is not None:
        kernels += [f"{kernel} {correctness.part_of(head_dim)}" for kernel in kernels]
    return any((backend, kernel, dtype) in red for kernel in kernels)


def _measure(
    todo: list[tuple[Work, Machine]], report: Report, options: Options, begin: float, console: Console
) -> list[tuple[Work, Machine]]:
    """Measure the cases in their order; return those that others disturbed, or none where the run has ended."""
    repeats, disturbed = options.repeats or REPEATS[options.device], []
    with _progress(len(todo), console) as advance:
        for work, machine in todo:
            if time.monotonic() - begin > options.budget:
                report.ended = f"the budget of {options.budget:.0f} s is spent"
                return []
            if options.device == "cpu":
                torch.set_num_threads(machine.threads)
            options.note(work.label)
            report.ran.add(work.label)
            outcome = measure_one(work, machine, options, repeats)
            if is_lost(machine.device):
                # Whatever was timed before the fault is not to be believed either.
                report.ended = LOST
                return []
            if any(row.disturbed for row in outcome.rows):
                disturbed.append((work, machine))
            _merge(report, outcome, machine)
            for row in harness.best(outcome.rows) or outcome.rows[:1]:
                console.print(line(row), highlight=False, markup=False, soft_wrap=True)
            save(report)
            advance(work.label)
    return disturbed


def measure_one(work: Work, machine: Machine, options: Options, repeats: int) -> Outcome:
    """Return the rows of one case; an error of any kind costs this case and no other."""
    wanted = options.backends or BACKENDS[options.device]
    green = [name for name in wanted if not is_red(name, work, options.red)]
    notes = [
        f"{work.label}: {name}: its kernel missed the rule on this device, so it is not timed"
        for name in wanted
        if name not in green
    ]
    if not green:
        return Outcome(notes=notes)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        # A function that was compiled for eight shapes is given up: each case begins anew.
        torch._dynamo.reset()
    costly = options.all_peers or (machine.device == "cpu" and cases.is_costly(work, machine.device))
    try:
        # The gate's yardstick too, and what a contest compiles.
        with ieee_float32():
            contest = CONTESTS[work.kind](work, machine.device, green, costly)
            outcome = harness.run(_told(contest, lambda: options.note(work.label)), machine, repeats)
    except Exception as error:
        # An unattended run goes on with the next case, and says why.
        outcome = Outcome(notes=[f"{work.label}: failed: {first_line(error)}"])
    outcome.notes = notes + outcome.notes
    return outcome


def _told(contest: harness.Contest, note: Callable[[], None]) -> harness.Contest:
    """Return a contest that calls ``note`` before each entry is built: several compiled models are no hang."""

    def telling(entry: harness.Entry) -> harness.Entry:
        def build() -> timers.Call:
            note()
            return entry.build()

        return replace(entry, build=build)

    return replace(contest, ours=tuple(map(telling, contest.ours)), peers=tuple(map(telling, contest.peers)))


def _merge(report: Report, outcome: Outcome, machine: Machine) -> None:
    """Take over an outcome; of two that others disturbed, the one with more quiet samples stays."""
    before = {
        (row.work, row.backend): row.disturbed
        for row in report.rows
        if row.disturbed and harness.is_fresh(row, machine)
    }
    rows = [row for row in outcome.rows if row.disturbed <= before.get((row.work, row.backend), row.disturbed)]
    replaced = {(row.work, row.backend) for row in rows}
    report.rows = [row for row in report.rows if (row.work, row.backend) not in replaced] + rows
    report.new += len(rows)
    report.notes += outcome.notes


def save(report: Report) -> None:
    """Write the rows, and beside them one JSON with the environment and with what was not timed, and why."""
    before = report.earlier
    if report.path is None or not report.machines or not (report.rows or report.notes):
        return
    if report.rows:
        harness.write(report.rows, report.path)
    if report.new and "commit" not in report.environment:
        # Once per run: it asks the system a dozen questions.
        report.environment |= earlier_runs.environment(report.machines, before.environments)
    # A run that measured nothing says nothing about the rows.
    environments = [*before.environments, *([report.environment] if report.new else [])]
    content = {
        "facts": report.facts | {"environment": environments},
        "peers": peers.availability(report.machines[0].device),
        "not timed": earlier_runs.merged(before.notes, report.ran, report.notes),
        "ended": report.ended,
    }
    report.path.with_suffix(".json").write_text(json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")


def line(row: Row) -> str:
    """Return a finished row for the console."""
    share = f"  {100 * row.share:3.0f} % of {row.bound}" if row.bound else ""
    share += f"  {100 * row.fma_share:3.0f} % of FMA" if row.fma_share else ""
    share += f"  disturbed: {row.disturbed} of {row.samples} samples" if row.disturbed else ""
    threads = f" {row.threads}t" if row.threads else ""
    name = " ".join(filter(None, (row.suite, row.case, row.dtype, row.layout)))
    return f"{name:66}{threads} {row.backend:6} {row.ours_p50:9.4g} ms  {row.ratio:5.2f} × {row.peer}{share}"


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[str], None]]:
    """Show a bar on a terminal; a log gets its lines from the rows."""
    if not console.is_terminal:
        yield lambda label: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("benchmarks", total=total)
        yield lambda label: progress.update(task, advance=1, description=label[:48])
