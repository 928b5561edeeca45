"""Correctness, then speed, of the Triton and CUDA kernels on a GPU: ``python -m benchmarks.gpu`` (``make gpu``).

A case that misses the tolerance rule is not timed. Attention meets each of SDPA's backends, pinned one at a time;
times are of CUDA graphs, between events, with a buffer larger than the second-level cache written before each replay.
Small cases of the CUDA kernels also run under compute-sanitizer, memcheck and racecheck, where there is one. Needs no
network. Without a GPU it says so and exits 3.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from benchmarks import harness
from benchmarks.harness import Row, attention_flop, patch_embed_flop
from fastvit.testing import (
    AttentionCase,
    PatchEmbedCase,
    check_attention,
    check_patch_embed,
    vit_attention_cases,
    vit_patch_embed_cases,
)

# (batch, heads, seqlen, head_dim), the most telling first.
SHAPES = ((256, 12, 197, 64), (64, 16, 257, 80), (64, 12, 577, 64), (16, 16, 1025, 64), (16, 16, 1370, 64))
PEERS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA mem-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FLUSH_BYTES = 256 << 20
BACKENDS = ("triton", "cuda")
FORMS_SECONDS = 90


def correctness(backend: str) -> list[str]:
    """Apply the rule to a backend on the device; return one line per tensor that misses it or case that fails."""
    misses = []
    dtypes = [torch.bfloat16, torch.float16] + ([torch.float32] if backend == "triton" else [])
    checks: list[tuple[object, Callable[[], list[fastvit.testing.Comparison]]]] = [
        *((case, lambda case=case: check_attention(case, backend, "cuda")) for case in vit_attention_cases(dtypes)),
        *((case, lambda case=case: check_patch_embed(case, backend, "cuda")) for case in vit_patch_embed_cases(dtypes)),
    ]
    for case, check in checks:
        try:
            misses += [f"{backend}: {case}: {result}" for result in check() if not result.passed]
        except RuntimeError as error:
            misses.append(f"{backend}: {case}: {str(error).splitlines()[0]}")
    print(f"{backend} on {torch.cuda.get_device_name()}: {len(checks)} cases, {len(misses)} misses", flush=True)
    return misses


# One small case of each kernel and form: sanitizers slow a kernel down by a factor of a hundred and more.
SANITIZED = """
import torch
from fastvit.testing import AttentionCase, PatchEmbedCase, check_attention, check_patch_embed
for seqlen, features in ((50, {}), (197, {}), (197, {"bias": "additive"}), (77, {"is_causal": True}), (1025, {})):
    check_attention(AttentionCase(1, 2, seqlen, seqlen, dtype=torch.bfloat16, **features), "cuda", "cuda")
for patch, layout in ((16, "nchw"), (14, "nhwc")):
    case = PatchEmbedCase(1, grid=(5, 5), patch=(patch, patch), dtype=torch.bfloat16, layout=layout)
    check_patch_embed(case, "cuda", "cuda")
torch.cuda.synchronize()
"""


def sanitize() -> list[str]:
    """Run small cases of the CUDA kernels under compute-sanitizer; return what it found."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer was not found on PATH: memcheck and racecheck were not run")
        return []
    found = []
    for tool in ("memcheck", "racecheck"):
        # PyTorch's own kernels are left out: their findings are not ours.
        command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kernel_substring=fastvit"]
        result = subprocess.run(
            [*command, sys.executable, "-c", SANITIZED], capture_output=True, text=True, check=False
        )
        summary = next((line for line in result.stdout.splitlines()[::-1] if "SUMMARY" in line), "no summary")
        print(f"compute-sanitizer {tool}: exit status {result.returncode}, {summary.strip('= ')}", flush=True)
        if result.returncode:
            found.append(f"compute-sanitizer {tool}:\n{(result.stdout + result.stderr)[-3000:]}")
    return found


def time_graph(function: Callable[[], object], repeats: int = 30) -> tuple[float, float, float]:
    """Return p20, p50 and p80 in seconds of replays of ``function`` as a CUDA graph, each with a cold cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return harness.quantiles(times)


Times = dict[str, tuple[float, float, float]]


def _row(suite: str, case: str, backend: str, flop: float, rule: float, times: Times) -> Row:
    ours = times[backend]
    peer = min((name for name in times if name not in BACKENDS), key=lambda name: times[name][1], default="none")
    theirs = times.get(peer, (math.nan,) * 3)
    major, minor = torch.cuda.get_device_capability()
    milliseconds = [round(value * 1e3, 5) for value in (*ours, *theirs)]
    return Row(
        suite, case, "bfloat16", 0, backend, peer, *milliseconds, round(theirs[1] / ours[1], 3),
        round(flop / ours[1] / 1e9, 1), round(flop / theirs[1] / 1e9, 1), round(rule, 3),
        torch.cuda.get_device_name(), f"sm_{major}{minor}", torch.__version__, fastvit.__version__, harness.commit(),
        harness.source_hash(backend),
    )  # fmt: skip


def _timed(name: str, function: Callable[[], object], times: Times, label: str) -> None:
    try:
        times[name] = time_graph(function)
    except RuntimeError as error:
        print(f"{name}: absent for {label}: {str(error).splitlines()[0]}")


def _rules(label: str, check: Callable[[str], list[fastvit.testing.Comparison]]) -> dict[str, float]:
    """Return, for each backend that may be timed, its worst error as a part of what is allowed."""
    rules = {}
    for backend in BACKENDS:
        try:
            worst = max(result.ratio for result in check(backend))
        except RuntimeError as error:
            print(f"{backend}: {label}: {str(error).splitlines()[0]}")
            continue
        if worst <= 1.0:
            rules[backend] = worst
        else:
            print(f"{backend}: {label}: {worst:.2f} of what is allowed, so not timed")
    return rules


def attention_rows() -> Iterator[Row]:
    """Yield attention forward and backward, bfloat16, on packed projections."""
    for batch, heads, seqlen, dim in SHAPES:
        label = f"B{batch} H{heads} N{seqlen} D{dim}"
        case = AttentionCase(2, heads, seqlen, seqlen, dim, dim, torch.bfloat16)
        rules = _rules(label, lambda backend, case=case: check_attention(case, backend, "cuda"))
        packed = torch.randn(batch, seqlen, 3, heads, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        grad = torch.randn(batch, seqlen, heads, dim, dtype=torch.bfloat16, device="cuda")

        def theirs(packed: torch.Tensor = packed) -> torch.Tensor:
            query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

        for mode, factor in (("forward", 1.0), ("forward + backward", 3.5)):
            times: Times = {}
            for backend in rules:

                def ours(packed: torch.Tensor = packed, backend: str = backend) -> torch.Tensor:
                    return fastvit.attention_qkvpacked(packed, backend=backend)

                _timed(backend, _mode(ours, mode, packed, grad), times, label)
            for name, pinned in PEERS.items():
                with sdpa_kernel(pinned):
                    _timed(name, _mode(theirs, mode, packed, grad), times, label)
            flop = factor * attention_flop(batch, heads, seqlen, dim)
            for backend in rules.keys() & times.keys():
                yield _row(f"attention {mode}", label, backend, flop, rules[backend], times)


def _mode(
    function: Callable[[], torch.Tensor], mode: str, packed: torch.Tensor, grad: torch.Tensor
) -> Callable[[], object]:
    if mode == "forward":
        return torch.no_grad()(function)
    return lambda: torch.autograd.grad(function(), packed, grad)


def patch_embed_rows() -> Iterator[Row]:
    """Yield the patch embedding of ViT-B/16 and of a /14, bfloat16."""
    for batch, side, patch, embed_dim in ((256, 224, 16, 768), (64, 518, 14, 1024)):
        grid = side // patch
        label = f"B{batch} {side}² P{patch} D{embed_dim}"
        case = replace(PatchEmbedCase(), grid=(grid, grid), patch=(patch, patch), dtype=torch.bfloat16)
        rules = _rules(label, lambda backend, case=case: check_patch_embed(case, backend, "cuda"))
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        images = torch.randn(batch, 3, side, side, **options)
        weight, bias = torch.randn(embed_dim, 3, patch, patch, **options) * 0.03, torch.randn(embed_dim, **options)
        functions: dict[str, Callable[[], object]] = {
            backend: lambda i=images, w=weight, b=bias, name=backend: fastvit.patch_embed(i, w, b, backend=name)
            for backend in rules
        }
        functions["Conv2d"] = lambda i=images, w=weight, b=bias, p=patch: (
            F.conv2d(i, w, b, stride=p).flatten(2).transpose(1, 2).contiguous()
        )
        times: Times = {}
        for name, function in functions.items():
            _timed(name, torch.no_grad()(function), times, label)
        flop = patch_embed_flop(batch, grid**2, embed_dim, 3 * patch**2)
        for backend in rules.keys() & times.keys():
            yield _row("patch_embed forward", label, backend, flop, rules[backend], times)


def compare_forms() -> list[str]:
    """Run benchmarks.cuda_forms last, in a process of its own: a kernel that waits for ever must not cost the rows."""
    try:
        result = subprocess.run([sys.executable, "-m", "benchmarks.cuda_forms"], check=False, timeout=FORMS_SECONDS)
    except subprocess.TimeoutExpired:
        return [f"benchmarks.cuda_forms: stopped after {FORMS_SECONDS} s; does a kernel wait for ever?"]
    # 3: no GPU of compute capability 9.0.
    return [f"benchmarks.cuda_forms: exit status {result.returncode}"] if result.returncode not in (0, 3) else []


def main() -> None:
    """Run everything within the budget and write what was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=480.0, help="seconds after which no new case is begun")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the CSV")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device on this machine; nothing was run")
        sys.exit(3)
    begin, rows = time.monotonic(), []
    misses = [miss for backend in BACKENDS for miss in correctness(backend)]
    misses += sanitize()
    print("\n".join(misses))
    for row in itertools.chain(attention_rows(), patch_embed_rows()):
        rows.append(row)
        print(
            f"{row.suite:20} {row.case:26} {row.backend:7} {row.ours_p50 * 1e3:9.1f} µs  {row.ratio:.2f} × {row.peer}",
            flush=True,
        )
        if time.monotonic() - begin > arguments.budget:
            break
    if rows:
        name = rows[0].device.lower().replace(" ", "-")
        path = arguments.out / f"gpu-{name}-{date.today()}.csv"
        harness.write(rows, path)
        print(f"wrote {len(rows)} rows to {path}")
    misses += compare_forms()
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
