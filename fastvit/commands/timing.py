"""Two versions of the same work, timed in turn."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastvit.commands import quiet

WARM_UPS = 2
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one version: percentiles over ``rounds`` runs."""

    p20: float
    p50: float
    p80: float
    rounds: int


@dataclass(frozen=True)
class Race:
    """Both versions of one piece of work; ``ratio`` is PyTorch's p50 over fastvit's, so above 1 fastvit is faster.

    During ``disturbed`` of the rounds others used the processor: they count because too few others were quiet.
    """

    name: str
    pytorch: Timing
    fastvit: Timing
    disturbed: int = 0

    @property
    def ratio(self) -> float:
        """PyTorch's p50 over fastvit's p50."""
        return self.pytorch.p50 / self.fastvit.p50

    def figures(self) -> dict[str, Any]:
        """Return the race as JSON figures, times in milliseconds."""
        return {"name": self.name, "pytorch_ms": vars(self.pytorch), "fastvit_ms": vars(self.fastvit),
                "ratio": self.ratio, "disturbed_rounds": self.disturbed}  # fmt: skip


class Clock:
    """Measures, from its construction on, how busy others than this process and its children keep this machine."""

    def __init__(self) -> None:
        self._start = self._read()

    def processors_busy_elsewhere(self) -> float:
        """Return how many processors others kept busy on average, 0 where that is unknown."""
        elapsed, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        # The kernel counts in ticks of 10 ms: over a shorter time one of them may be more than there is.
        return min(max(busy - own, 0.0) / elapsed, os.cpu_count() or 1) if busy else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
            ticks = os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return time.perf_counter(), 0.0, _own_seconds()
        # user nice system idle iowait irq softirq steal (proc_stat(5)); stolen time belongs to nobody here.
        busy = sum(int(fields[index]) for index in (0, 1, 2, 5, 6)) / ticks
        return time.perf_counter(), busy, _own_seconds()


def _own_seconds() -> float:
    """Return the processor seconds of this process and of all that it started, such as Inductor's workers."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid … utime stime cutime cstime, the last four in places 14 to 17; a name may have ")".
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            # It has ended in between.
            continue
        parents[int(path.parent.name)] = int(fields[1])
        seconds[int(path.parent.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    descendants, last = set(), {os.getpid()}
    while last:
        last = {process for process, parent in parents.items() if parent in last}
        descendants |= last
    living = sum(seconds[process] for process in descendants)
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def ratio_text(ratio: float) -> str:
    """Return a ratio of times with two decimals, or two digits where those would hide it."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def race(name: str, pytorch: Work, fastvit: Work, device: torch.device, budget: float, rounds: int | None) -> Race:
    """Time both in one loop, first PyTorch's and then fastvit's, so that whatever the machine does meets both.

    On a CPU only rounds count that others' work did not run through, if a third of them are such, unless ``rounds``
    says how many are to count.

    Args:
        name: what is timed.
        pytorch, fastvit: the same work without arguments.
        device: where it runs; on a GPU the time is between two events, launches included.
        budget: seconds after which no further round starts, once there are a few; unless ``rounds`` gives their number.
        rounds: runs of each.
    """
    for _ in range(WARM_UPS):
        pytorch(), fastvit()
    is_quiet = quiet.of_threads(torch.get_num_threads()) if device.type == "cpu" else lambda: True
    calm: list[tuple[float, float]] = []
    disturbed: list[tuple[float, float]] = []
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for index in range(rounds or MOST_ROUNDS):
            if rounds is None and index >= FEWEST_ROUNDS and time.perf_counter() - started > budget:
                break
            before = is_quiet()
            samples = _milliseconds(pytorch, device), _milliseconds(fastvit, device)
            (calm if is_quiet() and before else disturbed).append(samples)
    finally:
        if was_enabled:
            gc.enable()
    is_enough = len(calm) >= quiet.ENOUGH * (len(calm) + len(disturbed))
    theirs, ours = zip(*calm, *([] if is_enough and rounds is None else disturbed), strict=True)
    return Race(name, _percentiles(theirs), _percentiles(ours), 0 if is_enough else len(disturbed))


def _milliseconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def _percentiles(times: Sequence[float]) -> Timing:
    p20, p50, p80 = (float(value) for value in np.percentile(times, (20, 50, 80)))
    return Timing(p20, p50, p80, len(times))
