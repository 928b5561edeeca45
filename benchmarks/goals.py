"""The goals of the project on a CPU, as data, and how far the rows of a file are from them.

A goal names the cases that it is about (suite, dtype and shapes of :mod:`benchmarks.cases`) and the peers that count:
of those the fastest at each shape. It is met on so many threads when the geometric mean over all of its cases and the
least of them reach their limits. The goals on a GPU are in gpu_goals.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Column, Table

from benchmarks import cases, harness
from benchmarks.cases import AttentionShape, ModelShape, PatchShape
from benchmarks.harness import Row
from benchmarks.suite_patch_embed import CHANNELS_LAST
from benchmarks.tables import geometric_mean

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
# Whose rows count: the kernels of csrc/cpu.
BACKEND = "cpu"


@dataclass(frozen=True)
class Goal:
    """One line: the geometric mean of its cases is to reach ``mean``, each of them ``least``; a limit of 0 is none.

    Both are ratios, the time of the fastest of ``peers`` over ours, or without peers shares of the rate of
    multiply-adds in registers (1 is all of it). ``work`` is what the line is called where that is not its suite.
    ``stricter`` is a further peer, which does not count but is shown.
    """

    suite: str
    dtype: str
    cases: tuple[str, ...]
    peers: tuple[str, ...]
    mean: float
    least: float
    layout: str = ""
    work: str = ""
    against: str = ""
    stricter: str = ""

    @property
    def name(self) -> str:
        """What the line is called."""
        return self.work or self.suite

    @property
    def is_share(self) -> bool:
        """Whether its figures are shares instead of ratios."""
        return not self.peers

    def value(self, rows: Iterable[Row], peers: Sequence[str]) -> float | None:
        """Return what the rows of one case say against the fastest of ``peers``, None where one of them is missing."""
        ratios, shares = {}, []
        for row in rows:
            ratios[row.peer] = row.ratio
            shares.append(row.fma_share)
        if not peers:
            # A rate of 0 is one that was not measured.
            return max(shares, default=0.0) or None
        return min(ratios[peer] for peer in peers) if set(peers) <= ratios.keys() else None


ATTENTION = tuple(AttentionShape(*sizes) for sizes in cases.CPU_ATTENTION)
# From so many tokens on the products are most of the work, so that a share of the FMA rate says how good they are.
LONG = 197
PATCHES = tuple(PatchShape(*sizes).case for sizes in cases.PATCHES["cpu"])
MODELS = tuple(
    ModelShape(name, vit, batch).case
    for name, vit in cases.MODELS
    if name in cases.TELLING_MODELS["cpu"]
    for batch in cases.MODEL_BATCHES["cpu"]
)


def _attention(mode: str, dtype: str, mean: float, least: float, against: str = "") -> Goal:
    shapes = tuple(shape.case for shape in ATTENTION)
    return Goal(f"attention {mode}", dtype, shapes, ("SDPA",), mean, least, layout="packed", against=against)


def _patches(mode: str, dtype: str, mean: float, least: float) -> Goal:
    # Images in channels_last are another input than ours gets: a bound for whole models, see NOTES.md.
    return Goal(
        f"patch_embed {mode}", dtype, PATCHES, ("Conv2d", "unfold + Linear"), mean, least,
        against="best of Conv2d, unfold + Linear", stricter=CHANNELS_LAST,
    )  # fmt: skip


GOALS = (
    _attention("forward", "float32", 1.6, 1.3),
    _attention("forward", "bfloat16", 1.6, 1.3),
    _attention("forward", "float16", 1.6, 1.3),
    _attention("forward + backward", "float32", 1.4, 1.1),
    _attention("forward, bias", "float32", 1.6, 1.3, "SDPA with that bias"),
    _patches("forward", "float32", 1.3, 1.0),
    _patches("forward", "bfloat16", 2.5, 1.5),
    _patches("forward + backward", "float32", 1.2, 1.0),
    Goal("model inference, eager", "float32", MODELS, ("timm",), 1.05, 1.0, against="timm, unswapped"),
    Goal(
        "attention forward", "float32", tuple(shape.case for shape in ATTENTION if shape.seqlen >= LONG), (), 0.0, 0.6,
        layout="packed", work=f"attention forward, N ≥ {LONG}: of the FMA peak", against="–",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """What rows say of a goal on ``threads`` threads.

    ``values`` has, for each case that has rows, what the goal is about, ``stricter`` the same with the further peer.
    ``stale`` says whether the kernels have changed since any of these rows was measured, and ``disturbed`` in how many
    cases others used the processor.
    """

    goal: Goal
    threads: int
    values: dict[str, float]
    stricter: dict[str, float] = field(default_factory=dict)
    stale: bool = False
    disturbed: int = 0

    @property
    def verdict(self) -> str:
        """One of MET, MISSED and NOT_MEASURED: a missing case may be the one that misses, but not mend another."""
        found = self.values.values()
        if found and min(found) < self.goal.least:
            return MISSED
        if len(found) < len(self.goal.cases):
            return NOT_MEASURED
        return MET if geometric_mean(found) >= self.goal.mean else MISSED


def lines(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[Line]:
    """Return every goal for each number of threads that has rows, whatever they are of."""
    return [_line(rows, goal, threads) for threads in sorted({row.threads for row in rows}) for goal in goals]


def _line(rows: Sequence[Row], goal: Goal, threads: int) -> Line:
    groups: dict[str, list[Row]] = {case: [] for case in goal.cases}
    for row in rows:
        if row.work == (goal.suite, row.case, goal.dtype, goal.layout, threads) and row.backend == BACKEND:
            groups.get(row.case, []).append(row)

    def values(peers: Sequence[str]) -> dict[str, float]:
        found = {case: goal.value(group, peers) for case, group in groups.items()}
        return {case: value for case, value in found.items() if value is not None}

    stricter = values((*goal.peers, goal.stricter)) if goal.stricter else {}
    stale = harness.is_stale(row for group in groups.values() for row in group)
    disturbed = sum(any(row.disturbed for row in group) for group in groups.values())
    return Line(goal, threads, values(goal.peers), stricter, stale, disturbed)


HEAD = (
    "work", "dtype", "against", "threads", "geometric mean (goal)", "least (goal)", "at", f"with {CHANNELS_LAST}",
    "goal is",
)  # fmt: skip


def cells(line: Line) -> tuple[str, ...]:
    """Return a line under HEAD; figures have three digits, so that a miss by a hair does not read as the limit."""
    goal, measured = line.goal, line.values
    mean = least = at = stricter = "–"
    if measured:
        mean, least = (_shown(goal, value) for value in _mean_and_least(measured))
        at = min(measured, key=lambda case: measured[case])
    if line.stricter:
        stricter = ", least ".join(_shown(goal, value) for value in _mean_and_least(line.stricter))
    limits = [f" ({100 * limit:g} %)" if goal.is_share else f" ({limit})" for limit in (goal.mean, goal.least)]
    verdict = line.verdict
    if len(measured) < len(goal.cases):
        verdict += f", {len(measured)} of {len(goal.cases)} cases"
    if line.disturbed:
        verdict += f", {line.disturbed} disturbed"
    against = goal.against or ", ".join(goal.peers)
    return (
        goal.name, goal.dtype, against, str(line.threads), mean + limits[0] * bool(goal.mean), least + limits[1], at,
        stricter, verdict,
    )  # fmt: skip


def _mean_and_least(values: dict[str, float]) -> tuple[float, float]:
    return geometric_mean(values.values()), min(values.values())


def _shown(goal: Goal, value: float) -> str:
    return f"{100 * value:.1f} %" if goal.is_share else f"{value:.3f}"


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the goals and what the rows say of them; a line that rests on stale rows says so."""
    table = Table(*(Column(name, overflow="fold") for name in HEAD), title="Goals")
    for line in lines(rows):
        *shown, verdict = cells(line)
        table.add_row(*shown, verdict + ", stale" * line.stale, end_section=line.goal == GOALS[-1])
    console.print(table)
