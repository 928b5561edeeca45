"""Cases for a GPU: sizes at which the CUDA launchers take every kernel that they have, and each block several heads.

The cases of ``fastvit.testing`` have a few heads, so that any machine can run them. With those a launcher on a GPU cuts
heads into parts and tiles into quarters, which no benchmark times. What is reached is tested without a GPU, by asking
the launchers (tests/test_benchmarks_gates.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import fastvit
from benchmarks import formulas
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase

HEAD_DIMS = (64, 80, 32, 96, 72, 128, 104, 88)
# (batch, heads): more heads than twice the multiprocessors of any device, 188.
MANY = (24, 16)
# Of short sequences a multiprocessor takes several blocks, the more the narrower their heads.
SHORT_ELEMENTS = 2048 * 32
# As many large tiles as 222 multiprocessors take: 37 times 6, in each direction.
LARGE = PatchEmbedCase(24, grid=(14, 14), patch=(16, 16), embed_dim=768)


def _attention(batch: int, heads: int, seqlen: int, dim: int, dtype: torch.dtype, **features: Any) -> AttentionCase:
    return AttentionCase(batch, heads, seqlen, seqlen, dim, dim, dtype, sharpness=4.0, seed=seqlen + dim, **features)


def _short(dim: int, dtype: torch.dtype, seqlen: int = 50, **features: Any) -> AttentionCase:
    return _attention(SHORT_ELEMENTS // dim // 16, 16, seqlen, dim, dtype, **features)


def telling(dtype: torch.dtype) -> Iterator[AttentionCase | PatchEmbedCase]:
    """Yield the shapes that the benchmarks are about, with more heads and tiles than multiprocessors."""
    yield _attention(*MANY, 197, 64, dtype)
    yield _attention(*MANY, 257, 64, dtype)
    yield _short(32, dtype, 49, bias="additive")
    yield LARGE_IN[dtype]
    yield _short(64, dtype)
    yield _attention(*MANY, 257, 80, dtype)
    yield _attention(*MANY, 197, 64, dtype, bias="additive")
    yield _attention(*MANY, 257, 64, dtype, is_causal=True)
    yield _short(64, dtype, is_causal=True)
    yield _attention(*MANY, 197, 64, dtype, is_causal=True, bias="bool", bias_shape=(24, 1, 1, 197))
    yield _attention(*MANY, 257, 64, dtype, bias="additive")
    yield replace(LARGE_IN[dtype], layout="nhwc", patch=(14, 14), grid=(16, 16))
    yield _attention(9, 16, 577, 64, dtype)


LARGE_IN = {dtype: replace(LARGE, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)}


def every_form(dtype: torch.dtype) -> Iterator[AttentionCase | PatchEmbedCase]:
    """Yield, for each head dim that has kernels of its own, what the launchers take each of its kernels for."""
    yield PatchEmbedCase(1, grid=(5, 5), patch=(16, 16), dtype=dtype)
    for dim in HEAD_DIMS:
        # The first length that no block can hold, on the device with the most shared memory.
        long = 227 * 1024 // (4 * dim) + 41
        yield _attention(18, 16, 197, dim, dtype)
        # In one pass on every device, whatever shared memory it has.
        yield _attention(2, 16, 80, dim, dtype)
        yield _attention(2, 16, 80, dim, dtype, bias="additive")
        yield _short(dim, dtype, bias="additive")
        yield _attention(1, 2, long, dim, dtype)
        yield _attention(1, 2, long, dim, dtype, is_causal=True)
        yield _short(dim, dtype)


def sanitized() -> Iterator[AttentionCase | PatchEmbedCase]:
    """Yield one small case of each kind of kernel and dtype: a sanitizer slows it down a hundredfold and more.

    Heads of at most four tiles of sixteen rows stay whole in backward, however few they are.
    """
    for dtype in (torch.bfloat16, torch.float16):
        yield _attention(1, 2, 50, 64, dtype)
        # More heads than two or three blocks on each multiprocessor: a block prefetches the next.
        yield _attention(36, 16, 50, 128, dtype)
        yield _attention(6, 16, 197, 64, dtype)
        yield _attention(1, 2, 257, 80, dtype)
        yield _attention(1, 2, 64, 32, dtype, is_causal=True)
        yield _attention(6, 16, 77, 72, dtype, bias="additive")
        yield _attention(1, 2, 1025, 64, dtype)
        yield _attention(1, 1, 620, 104, dtype, is_causal=True)
        for patch, layout in ((16, "nchw"), (14, "nhwc")):
            yield PatchEmbedCase(1, grid=(5, 5), patch=(patch, patch), dtype=dtype, layout=layout)
        yield LARGE_IN[dtype]


def sanitized_sm90() -> Iterator[AttentionCase]:
    """Yield small cases of the form for sm_90a: whole rows of scores and not, one head of a block and several."""
    for dtype in (torch.bfloat16, torch.float16):
        for heads, seqlen, dim in ((2, 50, 64), (200, 197, 64), (2, 577, 64), (2, 197, 128), (2, 257, 128)):
            yield _attention(1, heads, seqlen, dim, dtype)


def run(case: AttentionCase | PatchEmbedCase, backend: str, device: str, backward: bool = True) -> list[Tensor]:
    """Return the output of a case and its gradients, by ours alone: a sanitizer slows down all that runs."""
    tensors = case.tensors(device)
    names = ("query", "key", "value") if isinstance(case, AttentionCase) else ("images", "weight", "bias")
    leaves = [tensor.requires_grad_(backward) for name in names if (tensor := tensors[name]) is not None]
    if isinstance(case, AttentionCase):
        output = fastvit.attention(*leaves, bias=tensors["bias"], is_causal=case.is_causal, backend=backend)
    else:
        output = fastvit.patch_embed(*leaves, backend=backend)
    return [output, *(torch.autograd.grad(output, leaves, tensors["grad_output"]) if backward else ())]


def _flop(case: AttentionCase | PatchEmbedCase) -> float:
    # All of attention's here are self-attention with one head dim.
    if isinstance(case, AttentionCase):
        return formulas.attention_flop(case.batch, case.num_heads, case.seqlen_q, case.head_dim)
    elements = case.in_channels * math.prod(case.patch)
    return formulas.patch_embed_flop(case.batch, math.prod(case.grid), case.embed_dim, elements)


def run_sanitized() -> None:
    """Run both on the GPU; what is right and wrong of the results is for :mod:`benchmarks.correctness`.

    The smallest cases come first: a tool that runs out of its time has then seen the most kernels.
    """
    for case in sorted(sanitized(), key=_flop):
        run(case, "cuda", "cuda")
    if torch.cuda.get_device_capability() == (9, 0):
        with cuda.form("sm90"):
            for attention in sanitized_sm90():
                run(attention, "cuda", "cuda", backward=False)
    torch.cuda.synchronize()
