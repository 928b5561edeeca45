"""Times of several ways to do one thing, taken in turn, so that whatever else a machine does hits all of them.

On a CPU the clock is the host's, the order of the ways is drawn anew for each sample, and samples that others' work ran
through can be thrown away. On a GPU it is events around replays of CUDA graphs, each after a buffer larger than the
second-level cache has been written; the same calls are also timed without a graph, launch overhead included.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from fastvit.commands import quiet
from fastvit.testing import ieee_float32

Call = Callable[[], object]
DEVICE = "cuda"
FLUSH_BYTES = 256 << 20
WARM_UPS = 2
# A sample shorter than this is lengthened by calling more than once: the clock itself takes about 0.1 µs.
SHORTEST_SAMPLE = 1e-4
# A call longer than this is not made twice for a sample: what the other one left in the caches is a thousandth of it.
LONGEST_TWICE = 0.5
# The relative difference (in the Euclidean norm) beyond which two ways cannot have done the same thing. The gate has
# judged ours by the tolerance rule before; this is for a peer that was called in a wrong way.
SAME_WITHIN = 0.05


@dataclass(frozen=True)
class Entry:
    """One way to do the work: ``build`` makes the call (and what it needs) where it is to be timed.

    ``floor`` marks a call that does less than the work, shown as a bound and never as a rival. ``follows_itself``: in
    use one call follows another of the same, as a model's do, so that an untimed one comes before each sample. A
    ``gauge`` is not timed: what it returns, a rate of a CPU, is the sample.
    """

    name: str
    build: Callable[[], Call]
    version: str = ""
    floor: bool = False
    graph: bool = True
    follows_itself: bool = False
    gauge: bool = False


@dataclass
class Times:
    """Seconds per call of one entry: ``samples`` by the main clock, ``eager`` without a graph, peak memory in MiB.

    ``disturbed`` of the samples were taken while others used the processor, and count for want of enough better ones.
    """

    samples: list[float] = field(default_factory=list)
    eager: list[float] = field(default_factory=list)
    mib: float = 0.0
    clock: str = "host"
    disturbed: int = 0


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(levels).tolist()
    return p20, p50, p80


def first_line(error: BaseException) -> str:
    """Return an error's first line, for a reason that fits into one."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:300]


def difference(reference: object, result: object) -> float:
    """Return the relative difference of two results, tensors or tuples of them; 0 where there is nothing to compare."""
    pairs = [
        [part for part in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(part, torch.Tensor)]
        for value in (reference, result)
    ]
    if not all(pairs):
        return 0.0
    if [part.shape for part in pairs[0]] != [part.shape for part in pairs[1]]:
        return math.inf
    worst = 0.0
    for left, right in zip(*pairs, strict=True):
        error = (left.detach().float() - right.detach().float()).norm() / left.detach().float().norm().clamp_min(1e-12)
        worst = max(worst, error.nan_to_num(math.inf).item())
    return worst


def is_lost(device: str) -> bool:
    """Return whether the device's context has met an error that stays."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class DiffersError(RuntimeError):
    """A way does not do what the first one does."""


def _check_same(entry: Entry, reference: object, result: object) -> None:
    error = difference(reference, result)
    if error > SAME_WITHIN:
        raise DiffersError(f"its result differs from the first one's by {error:.2g} of its norm, so it is not timed")


@ieee_float32()
def measure(
    entries: Sequence[Entry], repeats: int, device: str, patience: float = 0.0
) -> tuple[dict[str, Times], dict[str, str]]:
    """Return the times of each entry by name, and why an entry has none; float32 is float32 for all of them.

    On a CPU, a round of samples counts where the machine was quiet before and after it; ``patience`` is how many
    seconds may go by in waiting for that and in rounds that do not count. Then rounds are taken as they come, and the
    disturbed ones count where less than ``quiet.ENOUGH`` of all were quiet.
    """
    return _on_device(entries, repeats) if device == "cuda" else _on_host(entries, repeats, patience)


def _quiet_round(
    one_round: Callable[[], dict[str, float]], is_quiet: quiet.Quiet, patience: float
) -> tuple[dict[str, float], bool, float]:
    """Return a round of samples, whether it was disturbed all the same, and the seconds of ``patience`` spent on it."""
    spent = 0.0
    while True:
        spent += is_quiet.wait(patience - spent)
        begin = time.perf_counter()
        samples = one_round()
        disturbed = not is_quiet()
        if not disturbed or spent >= patience:
            return samples, disturbed, spent
        spent += time.perf_counter() - begin


def _on_host(entries: Sequence[Entry], repeats: int, patience: float) -> tuple[dict[str, Times], dict[str, str]]:
    calls: dict[str, tuple[Call, int, bool]] = {}
    gauges: dict[str, Call] = {}
    absent: dict[str, str] = {}
    times: dict[str, Times] = {}
    reference: object = None
    for entry in entries:
        try:
            call = entry.build()
            for _ in range(WARM_UPS):
                result = call()
            if entry.gauge:
                gauges[entry.name], times[entry.name] = call, Times()
                continue
            if calls:
                _check_same(entry, reference, result)
            else:
                reference = result
        except Exception as error:
            # Whatever a peer raises is its reason, and costs no other row.
            absent[entry.name] = first_line(error)
            continue
        # Not from one call: the third call of a process takes several times as long as the hundredth.
        number = 1
        while (seconds := _seconds(call, number)) < SHORTEST_SAMPLE:
            number = max(2 * number, math.ceil(number * SHORTEST_SAMPLE / max(seconds, 1e-7)))
        # Untimed at first: the call before it was another way's, and left the caches to that one.
        twice = number > 1 or (entry.follows_itself and seconds < LONGEST_TWICE)
        calls[entry.name] = (call, number, twice)
        times[entry.name] = Times()
    gc.collect()
    # In an order drawn anew each time: who always comes after the same other finds the caches as that one leaves them,
    # and an SDPA that follows a call on the same tensors has them warm.
    order = [*calls, *gauges]
    draw = random.Random(0)

    def one_round() -> dict[str, float]:
        draw.shuffle(order)
        samples = {}
        for name in order:
            if name in gauges:
                samples[name] = float(gauges[name]())  # type: ignore[arg-type]
                continue
            call, number, twice = calls[name]
            if twice:
                call()
            samples[name] = _seconds(call, number) / number
        return samples

    is_quiet = quiet.of_threads(torch.get_num_threads()) if patience else None
    calm: list[dict[str, float]] = []
    disturbed: list[dict[str, float]] = []
    for _ in range(repeats):
        if is_quiet is None:
            calm.append(one_round())
            continue
        samples, company, spent = _quiet_round(one_round, is_quiet, patience)
        patience -= spent
        (disturbed if company else calm).append(samples)
    if len(calm) >= quiet.ENOUGH * repeats:
        disturbed = []
    for name, value in times.items():
        value.samples = [samples[name] for samples in calm + disturbed]
        value.disturbed = len(disturbed)
    return times, absent


def _seconds(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - start


def _on_device(entries: Sequence[Entry], repeats: int) -> tuple[dict[str, Times], dict[str, str]]:
    # Forward, backward and capture share a stream: autograd runs a backward pass on the stream of its forward pass.
    stream = torch.cuda.Stream()
    calls: dict[str, tuple[Call, Call | None]] = {}
    absent: dict[str, str] = {}
    times: dict[str, Times] = {}
    reference: object = None
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for entry in entries:
            try:
                call, memory, result = _warm(entry)
                if calls:
                    _check_same(entry, reference, result)
                else:
                    reference = result
                del result
                replay = _captured(call, stream) if entry.graph else None
            except Exception as error:
                # Whatever a peer raises is its reason, and costs no other row.
                absent[entry.name] = first_line(error)
                torch.cuda.synchronize()
                continue
            calls[entry.name] = (call, replay)
            times[entry.name] = Times(mib=memory, clock="graph" if replay else "events")
        for repeat in range(repeats):
            for name, (call, replay) in calls.items():
                if replay is not None:
                    times[name].samples.append(_between_events(replay, flush))
                # Without a graph the host sets the pace: a third of the samples is enough to show by how much.
                if replay is None or repeat % 3 == 0:
                    times[name].eager.append(_between_events(call, flush, from_idle=True))
    for value in times.values():
        value.samples = value.samples or value.eager
    calls.clear()
    reference = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return times, absent


def _warm(entry: Entry) -> tuple[Call, float, object]:
    # What the other entries hold is not this one's; its own weights and inputs, made by build, are.
    before = torch.cuda.memory_allocated()
    call = entry.build()
    result = call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    return call, (torch.cuda.max_memory_allocated() - before) / 2**20, result


def _captured(call: Call, stream: torch.cuda.Stream) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def _between_events(call: Call, flush: torch.Tensor, from_idle: bool = False) -> float:
    flush.zero_()
    if from_idle:
        # Else the host issues the call while the device still writes, and the time of that is not seen.
        torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(call: Call, repeats: int, device: str, patience: float = 0.0) -> float:
    """Return the median seconds of ``call`` by the plainest clock of the device, for the roofline."""
    times, absent = measure([Entry("roof", lambda: call, graph=False)], repeats, device, patience)
    if absent:
        raise RuntimeError(absent["roof"])
    return statistics.median(times["roof"].samples)
