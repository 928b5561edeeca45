"""Random cases for the fuzz tests (hypothesis)."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from fastvit.testing import AttentionCase, PatchEmbedCase

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The rule compares the largest of two samples of errors; of a handful of elements that is no statistic, so batches grow
# until there are this many: more where the kernel is native (with sharp logits a few rows make the error), and only so
# many heads where an interpreter takes milliseconds for each.
MIN_ELEMENTS = 768
# Beyond that they grow only while the largest operand stays below this: with one query and 130 keys of 256 elements
# the float64 truth would take gigabytes, and the test its time limit.
MOST_OPERAND = 2**22


def fuzz(examples: int, shrink: bool = True) -> settings:
    """Settings for ``examples`` cases, the same in every run; FASTVIT_FUZZ=N multiplies them and makes them random."""
    factor = int(os.environ.get("FASTVIT_FUZZ", "0"))
    return settings(
        max_examples=examples * max(factor, 1),
        derandomize=factor == 0,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def attention_cases(
    draw: st.DrawFn,
    max_seqlen: int = 130,
    min_elements: int = MIN_ELEMENTS,
    most_heads: int = 2**20,
    min_queries: int = 1,
    keys: tuple[int, int] | None = None,
) -> AttentionCase:
    """Any attention problem that the op accepts; the batch grows for ``min_elements`` up to ``most_heads`` in all.

    ``keys`` are the fewest and the most of them, where those of ``max_seqlen`` do not serve.
    """
    seqlen_q = draw(st.integers(min_queries, max_seqlen))
    seqlen_k = draw(st.integers(*keys) if keys else st.one_of(st.just(seqlen_q), st.integers(1, max_seqlen)))
    head_dim = draw(st.one_of(st.sampled_from((32, 64, 72, 80, 88, 128)), st.integers(1, 256)))
    head_dim_v = draw(st.one_of(st.just(head_dim), st.just(head_dim), st.integers(1, 256)))
    heads = draw(st.integers(1, 4))
    elements = heads * min(seqlen_q, seqlen_k)  # the LSE, the smallest of the tensors
    operand = heads * max(seqlen_q, seqlen_k) * max(head_dim, head_dim_v)
    wanted = min(-(-min_elements // elements), max(-(-MIN_ELEMENTS // elements), MOST_OPERAND // operand))
    batch = max(draw(st.integers(1, 3)), min(wanted, most_heads // heads))
    dtype = draw(st.sampled_from(DTYPES))
    bias = draw(st.sampled_from((None, None, "bool", "additive", "float32")))
    shape = (batch, heads, seqlen_q, seqlen_k)
    return AttentionCase(
        batch=batch,
        num_heads=heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        bias=bias,
        bias_shape=tuple(size if draw(st.booleans()) else 1 for size in shape) if bias else None,
        is_causal=draw(st.sampled_from((False, False, True))),
        scale=draw(st.one_of(st.none(), st.floats(0.01, 0.5))),
        sharpness=draw(st.sampled_from((1.0, 4.0))),
        layout=draw(st.sampled_from(("packed", "packed", "bnhd", "bnhd", "bhnd", "bhdn"))),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def patch_embed_cases(draw: st.DrawFn, max_grid: int = 9, min_elements: int = MIN_ELEMENTS) -> PatchEmbedCase:
    """Any patch embedding that the op accepts: of three, two whose patches tile the images."""
    patch_height = draw(st.one_of(st.sampled_from((4, 8, 14, 16, 32)), st.integers(1, 20)))
    patch_width = draw(st.one_of(st.just(patch_height), st.integers(1, 20)))
    channels = draw(st.sampled_from((1, 3, 4)))
    grid = (draw(st.integers(1, max_grid)), draw(st.integers(1, max_grid)))
    embed_dim = draw(st.one_of(st.sampled_from((32, 192)), st.integers(1, 200)))
    stride, padding = None, (0, 0)
    if draw(st.integers(0, 2)) == 2:
        stride = (draw(st.integers(1, patch_height + 2)), draw(st.integers(1, patch_width + 2)))
        padding = (draw(st.integers(0, (patch_height - 1) // 2)), draw(st.integers(0, (patch_width - 1) // 2)))
    shape = PatchEmbedCase(grid=grid, patch=(patch_height, patch_width), stride=stride, padding=padding)
    elements = min(grid[0] * grid[1] * embed_dim, channels * shape.image_size[0] * shape.image_size[1])
    return replace(
        shape,
        batch=max(draw(st.integers(1, 3)), -(-min_elements // elements)),
        in_channels=channels,
        embed_dim=embed_dim,
        dtype=draw(st.sampled_from(DTYPES)),
        has_bias=draw(st.booleans()),
        layout=draw(st.sampled_from(("nchw", "nhwc"))),
        seed=draw(st.integers(0, 2**16)),
    )
