"""Fused attention, forward: O = softmax(scale Q Kᵀ + bias) V and the row LSE, one pass over the keys, no N×N matrix.

Shapes: query [B, H, Nq, D], key [B, H, Nk, D], value [B, H, Nk, Dv], output [B, H, Nq, Dv], LSE [B, H, Nq]. A program
owns BLOCK_M queries of one head. It visits full key blocks without a bounds check, then one smaller checked tail, so
that 197 = 3 · 64 + 5 costs 208 keys and not 256. Scores live in the log2 domain: 2^(s log2 e) is one instruction.
Source: Dao 2023, FlashAttention-2, algorithm 1 (online softmax).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels.spec import AttentionSpec
from fastvit.kernels.triton import configs

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def load_tile(
    base,
    start,
    stride,
    limit,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Load rows ``start``… of a matrix with contiguous rows; what lies past ``limit`` or DIM reads as 0."""
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    # The start is added to the scalar, so that the tile of 64-bit offsets is the same in every iteration.
    pointers = base + start * stride + (rows.to(tl.int64)[:, None] * stride + dims[None, :])
    if CHECK_ROWS and DIM < BLOCK_DIM:
        tile = tl.load(pointers, mask=(start + rows < limit)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=(start + rows < limit)[:, None], other=0.0)
    elif DIM < BLOCK_DIM:
        tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile  # [BLOCK_ROWS, BLOCK_DIM]


@triton.jit
def store_tile(
    base,
    start,
    stride,
    limit,
    tile,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Store rows ``start``… of a matrix with contiguous rows, up to ``limit`` and DIM."""
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    pointers = base + start * stride + (rows.to(tl.int64)[:, None] * stride + dims[None, :])
    mask = (start + rows < limit)[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dims < DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def bias_and_mask(
    scores,
    bias_base,
    rows,
    columns,
    stride_row,
    stride_column,
    seqlen_q,
    seqlen_k,
    BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):
    """Add the bias to scores in the log2 domain and put -inf where a key takes no part.

    ``rows`` and ``columns`` are index tensors that broadcast to the scores, in either orientation.
    """
    if BIAS != "none":
        in_range = (rows < seqlen_q) & (columns < seqlen_k)
        bias = tl.load(
            bias_base + (rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column), mask=in_range, other=0
        )
        if BIAS == "bool":
            scores = tl.where(bias != 0, scores, float("-inf"))
        else:
            scores += bias.to(tl.float32) * 1.4426950408889634
    if IS_CAUSAL:
        scores = tl.where(columns <= rows, scores, float("-inf"))
    if CHECK_COLUMNS:
        scores = tl.where(columns < seqlen_k, scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    accumulator,
    row_max,
    row_sum,
    query,
    key_base,
    value_base,
    bias_base,
    rows,
    start,
    stride_kn,
    stride_vn,
    stride_bm,
    stride_bn,
    seqlen_q,
    seqlen_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    CHECKED: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold the key block that begins at ``start`` into the running maximum, sum and output of the query block."""
    key = load_tile(key_base, start, stride_kn, seqlen_k, HEAD_DIM, BLOCK_KEYS, BLOCK_D, CHECKED)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_KEYS]
    if not SCALE_MAX:
        scores *= scale_log2
    scores = bias_and_mask(
        scores,
        bias_base,
        rows[:, None],
        (start + tl.arange(0, BLOCK_KEYS))[None, :],
        stride_bm,
        stride_bn,
        seqlen_q,
        seqlen_k,
        BIAS,
        IS_CAUSAL,
        CHECKED,
    )
    block_max = tl.max(scores, 1)  # [BLOCK_M]
    if SCALE_MAX:
        block_max *= scale_log2
    new_max = tl.maximum(row_max, block_max)
    # A row that has seen only -inf would compute -inf - -inf; any finite shift gives the right 0. NaN goes through.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if SCALE_MAX:
        probabilities = tl.exp2(scores * scale_log2 - shift[:, None])
    else:
        probabilities = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(probabilities, 1)
    accumulator = accumulator * rescale[:, None]
    value = load_tile(value_base, start, stride_vn, seqlen_k, HEAD_DIM_V, BLOCK_KEYS, BLOCK_DV, CHECKED)
    accumulator = tl.dot(probabilities.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, new_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "seqlen_q", "seqlen_k"])
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    bias_ptr,
    output_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_ob,
    stride_oh,
    stride_om,
    num_heads,
    seqlen_q,
    seqlen_k,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
    BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head against all of its keys."""
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    if IS_CAUSAL:
        # The last queries see the most keys: starting them first leaves the short programs to fill the end.
        block = num_blocks - 1 - block
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    key_base = key_ptr + batch * stride_kb + head * stride_kh
    value_base = value_ptr + batch * stride_vb + head * stride_vh
    bias_base = bias_ptr
    if BIAS != "none":
        bias_base += batch * stride_bb + head * stride_bh
    stride_qm, stride_om = tl.cast(stride_qm, tl.int64), tl.cast(stride_om, tl.int64)
    stride_kn, stride_vn = tl.cast(stride_kn, tl.int64), tl.cast(stride_vn, tl.int64)

    query_base = query_ptr + batch * stride_qb + head * stride_qh
    query = load_tile(query_base, first_row, stride_qm, seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Keys below full_end need neither a bounds check nor, in a causal row, a comparison with the diagonal.
    if IS_CAUSAL:
        end = tl.minimum(seqlen_k, first_row + BLOCK_M)
        full_end = tl.minimum(seqlen_k, first_row + 1) // BLOCK_N * BLOCK_N
    else:
        end = seqlen_k
        full_end = seqlen_k // BLOCK_N * BLOCK_N
    for start in tl.range(0, full_end, BLOCK_N):
        accumulator, row_max, row_sum = _attend(
            accumulator,
            row_max,
            row_sum,
            query,
            key_base,
            value_base,
            bias_base,
            rows,
            start,
            stride_kn,
            stride_vn,
            stride_bm,
            stride_bn,
            seqlen_q,
            seqlen_k,
            scale_log2,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_N,
            BLOCK_D,
            BLOCK_DV,
            BIAS,
            False,
            False,
            SCALE_MAX,
            PRECISION,
        )
    for start in tl.range(full_end, end, BLOCK_TAIL, num_stages=1):
        accumulator, row_max, row_sum = _attend(
            accumulator,
            row_max,
            row_sum,
            query,
            key_base,
            value_base,
            bias_base,
            rows,
            start,
            stride_kn,
            stride_vn,
            stride_bm,
            stride_bn,
            seqlen_q,
            seqlen_k,
            scale_log2,
            HEAD_DIM,
            HEAD_DIM_V,
            BLOCK_TAIL,
            BLOCK_D,
            BLOCK_DV,
            BIAS,
            IS_CAUSAL,
            True,
            SCALE_MAX,
            PRECISION,
        )

    # Only a sum of exactly 0 means that no key took part; a sum of NaN must stay NaN.
    empty = row_sum == 0.0
    inverse = tl.where(empty, 0.0, 1.0 / row_sum)
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    output_base = output_ptr + batch * stride_ob + head * stride_oh
    store_tile(
        output_base, first_row, stride_om, seqlen_q, accumulator * inverse[:, None], HEAD_DIM_V, BLOCK_M, BLOCK_DV
    )
    tl.store(lse_ptr + batch_head * seqlen_q + rows, lse, mask=rows < seqlen_q)
