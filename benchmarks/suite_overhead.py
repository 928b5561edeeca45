"""What is paid before any arithmetic: a tiny eager call, the import, a process's first call, the build, the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastvit
from benchmarks import harness
from benchmarks.cases import AttentionShape, Work
from benchmarks.harness import Contest
from benchmarks.suite_attention import gate
from benchmarks.timers import Call, Entry

# A process takes seconds.
PROCESSES = 5
TINY = AttentionShape(1, 1, 16, 64)


def contest(work: Work, device: str, backends: Sequence[str], costly: bool = False) -> Contest:
    """Return one contest; processes are timed on the host, whatever the device."""
    rules, absent = gate(TINY, work.dtype, "separate", device, backends)
    what, version = work.details, f"torch {torch.__version__}"
    if what.startswith("eager call"):
        backward = "backward" in what
        call = partial(_call, device=device, dtype=work.dtype, backward=backward)
        ours = tuple(Entry(name, partial(call, name), graph=False) for name in rules)
        peers = (Entry("SDPA", partial(call, ""), version, graph=False),)
    elif what == "import":
        rules = dict(list(rules.items())[:1])
        ours = tuple(Entry(name, lambda: _process("import fastvit"), graph=False) for name in rules)
        peers = (Entry("import torch", lambda: _process("import torch"), version, graph=False),)
    else:
        first = partial(_first_call, device=device, dtype=work.dtype)
        ours = tuple(Entry(name, lambda name=name: _process(first(name)), graph=False) for name in rules)  # type: ignore[misc]
        peers = (Entry("SDPA", lambda: _process(first("")), version, graph=False),)
    host = not what.startswith("eager call")
    return Contest(
        work.suite, work.case, work.dtype, ours, peers, rules, absent=absent,
        repeats=PROCESSES if host else 0, clock="cpu",
    )  # fmt: skip


def _call(backend: str, device: str, dtype: torch.dtype, backward: bool) -> Call:
    generator = torch.Generator(device).manual_seed(0)
    sizes = (TINY.batch, TINY.heads, TINY.seqlen, TINY.head_dim)
    query, key, value = (
        torch.randn(*sizes, generator=generator, device=device).to(dtype).requires_grad_(backward) for _ in range(3)
    )
    grad = torch.ones(sizes, device=device, dtype=dtype)

    def forward() -> torch.Tensor:
        if backend:
            return fastvit.attention(query, key, value, backend=backend)
        return F.scaled_dot_product_attention(query, key, value)

    if not backward:
        return torch.no_grad()(forward)
    return lambda: torch.autograd.grad(forward(), (query, key, value), grad)


def _first_call(backend: str, device: str, dtype: torch.dtype) -> str:
    function = (
        f"fastvit.attention(x, x, x, backend={backend!r})" if backend else "F.scaled_dot_product_attention(x, x, x)"
    )
    imports = "import torch, torch.nn.functional as F\n" + ("import fastvit\n" if backend else "")
    wait = "torch.cuda.synchronize()\n" if device == "cuda" else ""
    return f"{imports}x = torch.randn(1, 1, 16, 64, device={device!r}, dtype={dtype})\n{function}\n{wait}"


def _process(program: str) -> Call:
    """Return a call that runs a program in a process of its own, as on a machine that has compiled no kernel yet."""

    def call() -> None:
        with tempfile.TemporaryDirectory() as empty:
            variables = {**os.environ, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, "-c", program]
            subprocess.run(command, cwd=harness.ROOT, env=variables, check=True, capture_output=True)

    return call


# What a build leaves, and what is not built from.
NOT_SOURCES = shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__", ".*", "results", "demo")


def build_wheel(architectures: str = "") -> dict[str, Any]:
    """Build a wheel without a network, from nothing: of a copy of the tree, whose own build would be gone on with.

    Returns its seconds and MiB, or why there is none.
    """
    variables = {**os.environ, **({"TORCH_CUDA_ARCH_LIST": architectures} if architectures else {})}
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(harness.ROOT, Path(folder) / "fastvit", ignore=NOT_SOURCES)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
        start = time.perf_counter()
        result = subprocess.run(
            [*command, "--wheel-dir", folder, str(copy)],
            capture_output=True,
            text=True,
            env=variables,
            check=False,
        )
        seconds = time.perf_counter() - start
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
            return {"why not": f"pip wheel: exit status {result.returncode}: {lines[-1][:300]}"}
        return {
            "build_seconds": round(seconds, 1),
            "wheel_mib": round(wheels[0].stat().st_size / 2**20, 2),
            "architectures": architectures or "default",
        }
