"""Correctness, then speed, of the Triton kernels on a GPU: ``python -m benchmarks.gpu`` (``make gpu``).

A case that misses the tolerance rule is not timed. Attention meets each of SDPA's backends, pinned one at a time;
times are of CUDA graphs, between events, with a buffer larger than the second-level cache written before each replay.
Needs no network. Without a GPU it says so and exits 3.
"""

from __future__ import annotations

import argparse
import itertools
import math
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


def correctness() -> list[str]:
    """Apply the rule on the device; return one line per case that misses it."""
    misses = []
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    checks: list[tuple[object, Callable[[], list[fastvit.testing.Comparison]]]] = [
        *((case, lambda case=case: check_attention(case, "triton", "cuda")) for case in vit_attention_cases(dtypes)),
        *(
            (case, lambda case=case: check_patch_embed(case, "triton", "cuda"))
            for case in vit_patch_embed_cases(dtypes)
        ),
    ]
    for case, check in checks:
        misses += [f"{case}: {result}" for result in check() if not result.passed]
    print(f"correctness on {torch.cuda.get_device_name()}: {len(checks)} cases, {len(misses)} tensors miss the rule")
    return misses


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


def _row(suite: str, case: str, flop: float, rule: float, times: dict[str, tuple[float, float, float]]) -> Row:
    ours = times["ours"]
    peer = min((name for name in times if name != "ours"), key=lambda name: times[name][1], default="none")
    theirs = times.get(peer, (math.nan,) * 3)
    major, minor = torch.cuda.get_device_capability()
    milliseconds = [round(value * 1e3, 5) for value in (*ours, *theirs)]
    return Row(
        suite, case, "bfloat16", 0, "triton", peer, *milliseconds, round(theirs[1] / ours[1], 3),
        round(flop / ours[1] / 1e9, 1), round(flop / theirs[1] / 1e9, 1), round(rule, 3),
        torch.cuda.get_device_name(), f"sm_{major}{minor}", torch.__version__, fastvit.__version__, harness.commit(),
        harness.source_hash("triton"),
    )  # fmt: skip


def attention_rows() -> Iterator[Row]:
    """Yield attention forward and backward, bfloat16, on packed projections."""
    for batch, heads, seqlen, dim in SHAPES:
        case = AttentionCase(2, heads, seqlen, seqlen, dim, dim, torch.bfloat16)
        rule = max(result.ratio for result in check_attention(case, "triton", "cuda"))
        if not rule <= 1.0:
            print(f"attention N{seqlen} D{dim}: {rule:.2f} of what is allowed, so not timed")
            continue
        packed = torch.randn(batch, seqlen, 3, heads, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        grad = torch.randn(batch, seqlen, heads, dim, dtype=torch.bfloat16, device="cuda")

        def ours(packed: torch.Tensor = packed) -> torch.Tensor:
            return fastvit.attention_qkvpacked(packed, backend="triton")

        def theirs(packed: torch.Tensor = packed) -> torch.Tensor:
            query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

        for mode, factor in (("forward", 1.0), ("forward + backward", 3.5)):
            times = {"ours": time_graph(_mode(ours, mode, packed, grad))}
            for name, backend in PEERS.items():
                try:
                    with sdpa_kernel(backend):
                        times[name] = time_graph(_mode(theirs, mode, packed, grad))
                except RuntimeError as error:
                    print(f"{name}: absent for N{seqlen} D{dim}: {str(error).splitlines()[0]}")
            flop = factor * attention_flop(batch, heads, seqlen, dim)
            yield _row(f"attention {mode}", f"B{batch} H{heads} N{seqlen} D{dim}", flop, rule, times)


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
        case = replace(PatchEmbedCase(), grid=(grid, grid), patch=(patch, patch), dtype=torch.bfloat16)
        rule = max(result.ratio for result in check_patch_embed(case, "triton", "cuda"))
        if not rule <= 1.0:
            print(f"patch_embed P{patch}: {rule:.2f} of what is allowed, so not timed")
            continue
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        images = torch.randn(batch, 3, side, side, **options)
        weight, bias = torch.randn(embed_dim, 3, patch, patch, **options) * 0.03, torch.randn(embed_dim, **options)
        functions: dict[str, Callable[[], object]] = {
            "ours": lambda i=images, w=weight, b=bias: fastvit.patch_embed(i, w, b, backend="triton"),
            "Conv2d": lambda i=images, w=weight, b=bias, p=patch: (
                F.conv2d(i, w, b, stride=p).flatten(2).transpose(1, 2).contiguous()
            ),
        }
        times = {name: time_graph(torch.no_grad()(function)) for name, function in functions.items()}
        flop = patch_embed_flop(batch, grid**2, embed_dim, 3 * patch**2)
        yield _row("patch_embed forward", f"B{batch} {side}² P{patch} D{embed_dim}", flop, rule, times)


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
    misses = correctness()
    print("\n".join(misses))
    for row in itertools.chain(attention_rows(), patch_embed_rows()):
        rows.append(row)
        print(f"{row.suite:20} {row.case:26} {row.ours_p50 * 1e3:9.1f} µs  {row.ratio:.2f} × {row.peer}", flush=True)
        if time.monotonic() - begin > arguments.budget:
            break
    if rows:
        name = rows[0].device.lower().replace(" ", "-")
        path = arguments.out / f"gpu-{name}-{date.today()}.csv"
        harness.write(rows, path)
        print(f"wrote {len(rows)} rows to {path}")
    sys.exit(1 if misses else 0)


if __name__ == "__main__":
    main()
