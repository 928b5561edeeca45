"""torch.cuda as far as the timers need it, without a GPU: streams, events, graphs that replay, a cold cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timers


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


def fake_cuda(monkeypatch: pytest.MonkeyPatch, log: list[str]) -> None:
    """Have ``timers`` find a device that is a CPU.

    ``log`` is told of replays (by what they captured), of flushes, and of waits until the device is idle.
    """

    class Graph:
        name = "graph"

        def replay(self) -> None:
            log.append(f"replay {self.name}")

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        length = len(log)
        yield
        if len(log) > length:
            graph.name = log[length]

    fake = SimpleNamespace(
        Stream=lambda: SimpleNamespace(wait_stream=lambda other: None), current_stream=lambda: None, CUDAGraph=Graph,
        graph=capture, Event=Event, stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda: log.append("idle"),
        reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 5 << 20,
        memory_allocated=lambda: 2 << 20, empty_cache=lambda: None, is_available=lambda: False,
        is_current_stream_capturing=lambda: False,
    )  # fmt: skip
    zero = torch.Tensor.zero_

    def flush(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.int8:
            log.append("flush")
        return zero(tensor)

    monkeypatch.setattr(timers.torch, "cuda", fake)
    monkeypatch.setattr(timers, "DEVICE", "cpu")
    monkeypatch.setattr(timers, "FLUSH_BYTES", 8)
    monkeypatch.setattr(timers.torch.Tensor, "zero_", flush)
