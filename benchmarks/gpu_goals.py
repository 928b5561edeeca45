"""The goals of the project on an H200, as data, and how far the rows of a file are from them.

bfloat16, useful FLOP, timed by CUDA graphs. A goal is about one case; of ours the fastest backend counts. Those on a
CPU are in goals.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Column, Table

from benchmarks import harness
from benchmarks.cases import Work
from benchmarks.goals import MET, MISSED, NOT_MEASURED
from benchmarks.harness import FLOOR, Row
from benchmarks.suite_patch_embed import FLOOR as LINEAR

DTYPE = "bfloat16"
TFLOPS, MICROSECONDS, BANDWIDTH = "TFLOP/s", "µs", "% of the copy bandwidth"
# Any of PyTorch's attention backends: the fastest that was timed.
SDPA = "the best SDPA backend"


@dataclass(frozen=True)
class Limit:
    """``value`` of ``unit``, at least; of µs at most. Without a unit: so many times as fast as ``peer``."""

    value: float
    unit: str = ""
    peer: str = ""

    def measured(self, rows: Sequence[Row]) -> float | None:
        """Return what the rows of one backend say, None where they have no such peer."""
        row = rows[0]
        if self.unit == TFLOPS:
            return row.ours_gflops / 1e3
        if self.unit == MICROSECONDS:
            return 1e3 * row.ours_p50
        if self.unit == BANDWIDTH:
            return 100 * row.ours_gbs / row.peak_gbs if row.peak_gbs else None
        found = [row.ratio for row in rows if self._is_about(row.peer)]
        return min(found, default=None)

    def _is_about(self, peer: str) -> bool:
        return peer.startswith("SDPA ") if self.peer == SDPA else peer == self.peer

    def holds(self, value: float) -> bool:
        """Return whether ``value`` keeps the limit."""
        return value <= self.value if self.unit == MICROSECONDS else value >= self.value

    def shown(self, value: float) -> str:
        """Return a value of this limit with its unit; three digits, so that a miss by a hair does not read as it."""
        return f"{value:.4g} {self.unit}" if self.unit else f"{value:.3f} × {self.peer}"


@dataclass(frozen=True)
class Goal:
    """One case and the limits that it is to keep."""

    suite: str
    case: str
    limits: tuple[Limit, ...]
    layout: str = ""


def _attention(mode: str, case: str, *limits: Limit) -> Goal:
    return Goal(f"attention {mode}", case, limits, layout="packed")


def _model(name: str, ratio: float) -> Goal:
    return Goal("model inference, compiled", f"{name} B256", (Limit(ratio, peer="timm compiled"),))


GOALS = (
    _attention("forward", "B256 H12 N197 D64", Limit(300, TFLOPS), Limit(1.3, peer=SDPA)),
    _attention("forward", "B64 H16 N257 D64", Limit(340, TFLOPS), Limit(1.3, peer=SDPA)),
    _attention("forward", "B64 H16 N257 D80", Limit(330, TFLOPS), Limit(1.3, peer=SDPA)),
    _attention("forward, bias", "B2048 H12 N49 D32", Limit(75, BANDWIDTH), Limit(2.0, peer=SDPA)),
    _attention("forward", "B4 H16 N577 D64", Limit(32, MICROSECONDS), Limit(1.25, peer="SDPA flash")),
    _attention("forward", "B16 H16 N1025 D64", Limit(400, TFLOPS), Limit(1.1, peer="SDPA cuDNN")),
    _attention("forward", "B16 H16 N1370 D64", Limit(430, TFLOPS), Limit(1.1, peer="SDPA cuDNN")),
    _attention("forward", "B2 H12 N4096 D64", Limit(450, TFLOPS), Limit(1.1, peer="SDPA cuDNN")),
    _attention(
        "backward", "B256 H12 N197 D64",
        Limit(250, TFLOPS), Limit(1.5, peer="SDPA flash"), Limit(1.2, peer="SDPA cuDNN"),
    ),
    # 1.05 times the time of F.linear on patches that lie ready, at the most.
    Goal("patch_embed forward", "B256 224² P16 D768", (Limit(120, MICROSECONDS), Limit(1 / 1.05, peer=LINEAR + FLOOR))),
    Goal("patch_embed stem", "B256 224² P16 D768", (Limit(1.5, peer="Conv2d stem"),)),
    _model("vit_base_patch16_224", 1.08),
    _model("vit_base_patch16_384", 1.15),
    _model("vit_base_patch14_518", 1.2),
)  # fmt: skip


def rank(work: Work) -> int:
    """Return the number of the goal that a case is about, in their order; behind all of them for any other."""
    keys = [(goal.suite, goal.case, DTYPE, goal.layout) for goal in GOALS]
    return keys.index(work.key) if work.key in keys else len(keys)


@dataclass(frozen=True)
class Line:
    """What rows say of one limit of a goal; ``value`` is None where nothing was measured."""

    goal: Goal
    limit: Limit
    value: float | None = None
    backend: str = ""
    stale: bool = False

    @property
    def verdict(self) -> str:
        """One of MET, MISSED and NOT_MEASURED."""
        if self.value is None:
            return NOT_MEASURED
        return MET if self.limit.holds(self.value) else MISSED


def lines(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[Line]:
    """Return a line for each limit of each goal."""
    return [line for goal in goals for line in _lines(rows, goal)]


def _lines(rows: Sequence[Row], goal: Goal) -> Iterator[Line]:
    of_case = [row for row in rows if row.work[:4] == (goal.suite, goal.case, DTYPE, goal.layout)]
    fastest = min(of_case, key=lambda row: row.ours_p50, default=None)
    if fastest is None:
        yield from (Line(goal, limit) for limit in goal.limits)
        return
    ours = [row for row in of_case if row.backend == fastest.backend]
    stale = harness.is_stale(ours)
    for limit in goal.limits:
        yield Line(goal, limit, limit.measured(ours), fastest.backend, stale)


HEAD = ("work", "goal", "measured", "by", "goal is")


def cells(line: Line) -> tuple[str, ...]:
    """Return a line under HEAD."""
    limit = line.limit
    sign = "≤" if limit.unit == MICROSECONDS else "≥"
    measured = "–" if line.value is None else limit.shown(line.value)
    verdict = line.verdict + ", stale" * line.stale
    return f"{line.goal.suite} {line.goal.case}", f"{sign} {limit.shown(limit.value)}", measured, line.backend, verdict


def show(rows: Sequence[Row], console: Console) -> None:
    """Print the goals and what the rows say of them."""
    table = Table(*(Column(name, overflow="fold") for name in HEAD), title="Goals on an H200")
    for line in lines(rows):
        table.add_row(*cells(line), end_section=line.limit == line.goal.limits[-1])
    console.print(table)
