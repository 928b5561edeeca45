"""The machine that is measured: its name and versions, and its own copy bandwidth and matrix rate.

Both roofs are measured first in each run, with PyTorch's own copy and matrix product on random data: a share of them
says how far a kernel is from what this very machine does, clocks, neighbours and power limit included.
"""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastvit
from benchmarks import harness
from benchmarks.timers import median_seconds
from fastvit.commands import quiet
from fastvit.commands.env import cpu_name
from fastvit.ops.backends import device_family

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
# Square products; the best counts, because a library may be tuned for one size and not for another.
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
REPEATS = 5
FMA_SECONDS = 0.2


@dataclass(frozen=True)
class Machine:
    """One device with a number of threads (0 on a GPU); ``peaks`` are GFLOP/s by dtype, 0 where not measured.

    ``fma_gflops`` is what float32 multiply-adds in registers reach on a CPU: no product can be faster.
    """

    device: str
    name: str
    capability: str
    threads: int
    driver: str
    peaks: dict[str, float]
    gbs: float
    fma_gflops: float = 0.0

    def peak(self, dtype: torch.dtype) -> float:
        """Return the measured matrix rate in GFLOP/s."""
        return self.peaks.get(harness.short(dtype), 0.0)

    def describe(self) -> str:
        """Return one line for people."""
        peaks = ", ".join(f"{name} {peak / 1e3:.3g}" for name, peak in self.peaks.items())
        threads = f", {self.threads} threads" if self.threads else ""
        fma = f", FMA in registers {self.fma_gflops / 1e3:.3g}" if self.fma_gflops else ""
        return f"{self.name} ({self.capability}{threads}): copy {self.gbs:.0f} GB/s, products in TFLOP/s: {peaks}{fma}"


def copy_bandwidth(device: str, size: int | None = None, repeats: int = REPEATS) -> float:
    """Return GB/s of a copy, its bytes counted once read and once written (McCalpin 1995, STREAM's Copy)."""
    size = size or COPY_BYTES[device]
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), repeats, device, harness.PATIENCE)
    return 2.0 * size / seconds / 1e9


def matrix_rate(device: str, dtype: torch.dtype, sizes: tuple[int, ...] | None = None, repeats: int = REPEATS) -> float:
    """Return GFLOP/s of the best square product of random matrices, 2 n³ FLOP each."""
    rates = []
    for size in sizes or MATRIX_SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        call = partial(torch.mm, left, right, out=out)
        seconds = median_seconds(call, repeats, device, harness.PATIENCE)
        rates.append(2.0 * size**3 / seconds / 1e9)
    return max(rates)


def fma_rate(device: str) -> float:
    """Return GFLOP/s of float32 multiply-adds in registers, in our kernels' instruction set and on torch's threads.

    0 on a GPU. It is a loop of our own without memory or latency in its way (csrc/cpu/fma_peak.h), not torch's product.
    """
    if device == "cuda":
        return 0.0
    quiet.of_threads(torch.get_num_threads()).wait(harness.PATIENCE)
    return float(importlib.import_module("fastvit._C").fma_peak(FMA_SECONDS))


def device_name(device: str) -> str:
    """Return the device's name as the system has it."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def measure(
    device: str,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    size: int | None = None,
    sizes: tuple[int, ...] | None = None,
) -> Machine:
    """Measure the roofs of ``device`` with the number of threads that torch has now."""
    with torch.inference_mode():
        peaks = {harness.short(dtype): round(matrix_rate(device, dtype, sizes), 2) for dtype in dtypes}
        bandwidth = round(copy_bandwidth(device, size), 2)
    capability = device_family(torch.device(device)) if device == "cuda" else harness.capability()
    threads = 0 if device == "cuda" else torch.get_num_threads()
    fma = round(fma_rate(device), 2)
    return Machine(device, device_name(device), capability, threads, driver(device), peaks, bandwidth, fma)


def driver(device: str) -> str:
    """Return the NVIDIA driver's version; the kernel's on a CPU."""
    if device == "cpu":
        return platform.release()
    from torch.utils import collect_env

    return collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"


def installed(package: str) -> str:
    """Return a package's version, empty when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def environment(machines: list[Machine]) -> dict[str, Any]:
    """Return what a reader needs to repeat a run: torch's own collection, ours, and the roofs."""
    from torch.utils import collect_env

    from fastvit.commands.env import environment as fastvit_environment

    collected = {key: str(value) for key, value in collect_env.get_env_info()._asdict().items()}
    return {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": harness.commit(),
        "sources": {backend: harness.source_hash(backend) for backend in harness.SOURCES},
        "fastvit": fastvit.__version__,
        "variables": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ},
        "environment": fastvit_environment(),
        "collect_env": collected,
        "roofline": [vars(machine) for machine in machines],
    }
