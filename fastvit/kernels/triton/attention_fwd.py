"""Fused attention, forward: O = softmax(scale Q Kᵀ + bias) V and the row LSE, one pass over the keys, no N×N matrix.

Shapes: query [B, H, Nq, D], key [B, H, Nk, D], value [B, H, Nk, Dv], output [B, H, Nq, Dv], LSE [B, H, Nq]. A program
owns BLOCK_M queries of one head. It visits full key blocks without a bounds check, then one smaller checked tail, so
that 197 = 3 · 64 + 5 costs 208 keys and not 256. Exponentials are 2^(x log2 e), which is one instruction. FOLD turns
scale · s and · log2 e into one multiply-add: right to 2⁻²⁴ of the score, which 16 bits do not see; float32 subtracts
the maximum first, right to 2⁻²⁴ of the difference.
Source: Dao 2023, FlashAttention-2, algorithm 1 (online softmax).
"""

# ruff: noqa: N803 - Triton's constexpr parameters are constants and are written as such.
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec
from fastvit.kernels.triton import configs
from fastvit.kernels.triton.products import add_product, sliced_product

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def head_base(pointer, strides, batch, head, ALIGNED: tl.constexpr):
    """Return where a head's matrix begins; ALIGNED promises that all of its rows do at multiples of 8 elements.

    A launch tells the compiler of strides that are multiples of 16. The heads of 72, 88 or 104 in a packed projection
    are not, and without the promise each of their elements would be a load of its own.
    """
    offset = batch * strides[0] + head * strides[1]
    if ALIGNED:
        offset = tl.multiple_of(offset, 8)
    return pointer + offset


@triton.jit
def row_stride(strides, ALIGNED: tl.constexpr):
    """Return the stride from row to row in 64 bits, with the promise of ``head_base``."""
    stride = tl.cast(strides[2], tl.int64)
    if ALIGNED:
        stride = tl.multiple_of(stride, 8)
    return stride


@triton.jit
def load_tile(
    base, start, stride, limit,
    DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
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
def store_tile(base, start, stride, limit, tile, DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr):
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
    scores, bias_base, bias_strides, rows, columns, seqlen_q, seqlen_k,
    BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, CHECK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the bias to scaled scores and put -inf where a key takes no part.

    ``rows`` and ``columns`` are index tensors that broadcast to the scores, in either orientation.
    """
    if BIAS != "none":
        offsets = rows.to(tl.int64) * bias_strides[2] + columns.to(tl.int64) * bias_strides[3]
        bias = tl.load(bias_base + offsets, mask=(rows < seqlen_q) & (columns < seqlen_k), other=0)
        if BIAS == "bool":
            scores = tl.where(bias != 0, scores, float("-inf"))
        else:
            scores += bias.to(tl.float32)
    if IS_CAUSAL:
        scores = tl.where(columns <= rows, scores, float("-inf"))
    if CHECK_COLUMNS:
        scores = tl.where(columns < seqlen_k, scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    accumulator, row_max, row_sum, query, query_base, query_stride, key_base, key_stride, value_base, value_stride,
    bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_KEYS: tl.constexpr, SLICE: tl.constexpr, BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHECKED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the key block that begins at ``start`` into the running maximum, sum and output of the query block."""
    rows, columns = first_row + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_KEYS)
    if SLICE > 0:
        scores = sliced_product(
            query_base, first_row, query_stride, seqlen_q, key_base, start, key_stride, seqlen_k,
            HEAD_DIM, SLICE, BLOCK_M, BLOCK_KEYS,
        )  # fmt: skip
    else:
        key = load_tile(key_base, start, key_stride, seqlen_k, HEAD_DIM, BLOCK_KEYS, BLOCK_D, CHECKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_KEYS]
    if not FOLD:
        scores *= scale
    scores = bias_and_mask(
        scores, bias_base, bias_strides, rows[:, None], columns[None, :], seqlen_q, seqlen_k, BIAS, IS_CAUSAL, CHECKED
    )
    block_max = tl.max(scores, 1)  # [BLOCK_M]
    if FOLD:
        block_max *= scale
    new_max = tl.maximum(row_max, block_max)
    # A row that has seen only -inf would compute -inf - -inf; any finite shift gives the right 0. NaN goes through.
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    if FOLD:
        probabilities = tl.exp2(scores * (scale * LOG2_E) - (shift * LOG2_E)[:, None])
    else:
        probabilities = tl.exp2((scores - shift[:, None]) * LOG2_E)
    rescale = tl.exp2((row_max - shift) * LOG2_E)
    row_sum = row_sum * rescale + tl.sum(probabilities, 1)
    accumulator = accumulator * rescale[:, None]
    value = load_tile(value_base, start, value_stride, seqlen_k, HEAD_DIM_V, BLOCK_KEYS, BLOCK_DV, CHECKED)
    accumulator = add_product(accumulator, probabilities.to(value.dtype), value, PRECISION)
    return accumulator, new_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "seqlen_q", "seqlen_k"])
def attention_forward_kernel(
    query_ptr, key_ptr, value_ptr, bias_ptr, output_ptr, lse_ptr,
    query_strides, key_strides, value_strides, bias_strides, output_strides,
    num_heads, seqlen_q, seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, SLICE: tl.constexpr,
    BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all of its keys. Strides are those of [B, H, N(, Nk)]."""
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    if IS_CAUSAL:
        # The last queries see the most keys: starting them first leaves the short programs to fill the end.
        block = num_blocks - 1 - block
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)

    query_base = head_base(query_ptr, query_strides, batch, head, ALIGNED)
    key_base = head_base(key_ptr, key_strides, batch, head, ALIGNED)
    value_base = head_base(value_ptr, value_strides, batch, head, ALIGNED)
    key_stride, value_stride = row_stride(key_strides, ALIGNED), row_stride(value_strides, ALIGNED)
    bias_base = bias_ptr
    if BIAS != "none":
        bias_base += batch * bias_strides[0] + head * bias_strides[1]
    query_stride = row_stride(query_strides, ALIGNED)
    query = load_tile(query_base, first_row, query_stride, seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    # Keys below full_end need neither a bounds check nor, in a causal row, a comparison with the diagonal.
    end = tl.minimum(seqlen_k, first_row + BLOCK_M) if IS_CAUSAL else seqlen_k
    full_end = (tl.minimum(seqlen_k, first_row + 1) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    for start in tl.range(0, full_end, BLOCK_N):
        accumulator, row_max, row_sum = _attend(
            accumulator, row_max, row_sum, query, query_base, query_stride, key_base, key_stride, value_base,
            value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale, HEAD_DIM, HEAD_DIM_V,
            BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SLICE, BIAS, False, False, FOLD, PRECISION,
        )  # fmt: skip
    for start in tl.range(full_end, end, BLOCK_TAIL, num_stages=1):
        accumulator, row_max, row_sum = _attend(
            accumulator, row_max, row_sum, query, query_base, query_stride, key_base, key_stride, value_base,
            value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale, HEAD_DIM, HEAD_DIM_V,
            BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_TAIL, SLICE, BIAS, IS_CAUSAL, True, FOLD, PRECISION,
        )  # fmt: skip

    # Only a sum of exactly 0 means that no key took part; a sum of NaN must stay NaN.
    empty = row_sum == 0.0
    accumulator *= tl.where(empty, 0.0, 1.0 / row_sum)[:, None]
    lse = tl.where(empty, float("-inf"), row_max + tl.log2(row_sum) * LN_2)
    output_base = head_base(output_ptr, output_strides, batch, head, ALIGNED)
    output_stride = row_stride(output_strides, ALIGNED)
    store_tile(output_base, first_row, output_stride, seqlen_q, accumulator, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    tl.store(lse_ptr + batch_head * seqlen_q + rows, lse, mask=rows < seqlen_q)


def why_not(spec: AttentionSpec) -> list[str]:
    """Return the reasons why these kernels cannot run ``spec``; empty means that they can."""
    reasons = configs.device_why_not(spec.device, spec.dtype, interpreted=not isinstance(_attend, triton.JITFunction))
    for name, head_dim in (("head_dim", spec.head_dim), ("head_dim_v", spec.head_dim_v)):
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            reasons.append(f"{name} {head_dim}: at least 1, at most {MAX_HEAD_DIM}")
    if spec.bias_dtype not in (None, torch.bool, torch.float32, spec.dtype):
        reasons.append(f"bias {spec.bias_dtype}: bool, float32 or query's dtype")
    return reasons


def bias_arguments(bias: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], str]:
    """Return the bias as the kernels take it (bool as bytes), its strides, and the kind of bias."""
    if bias is None:
        return None, (0, 0, 0, 0), "none"
    if bias.dtype == torch.bool:
        return bias.view(torch.uint8), bias.stride(), "bool"
    return bias, bias.stride(), "additive"


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, output: Tensor, lse: Tensor, *,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write softmax(scale QKᵀ + bias) V to ``output`` [B, H, Nq, Dv] and the row log-sum-exp to ``lse`` [B, H, Nq].

    float32, float16 or bfloat16, accumulated in float32; ``lse`` is contiguous float32. Any strides, the last one 1.
    """
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k, head_dim_v = key.shape[2], value.shape[3]
    block_d, block_dv = configs.padded(head_dim), configs.padded(head_dim_v)
    family, width = configs.device_family(query.device), max(block_d, block_dv)
    config = configs.attention_config("attention_forward", query.element_size(), width, bias is not None, family)
    bias, bias_strides, bias_kind = bias_arguments(bias)
    with torch.cuda.device_of(query):
        attention_forward_kernel[configs.grid(batch * num_heads, seqlen_q, config.block_m)](
            query, key, value, bias, output, lse,
            query.stride()[:3], key.stride()[:3], value.stride()[:3], bias_strides, output.stride()[:3],
            num_heads, seqlen_q, seqlen_k, scale,
            head_dim, head_dim_v, block_d, block_dv, config.block_m, config.block_n,
            config.block_n if is_causal else configs.tail_block(seqlen_k, config.block_n),
            configs.head_dim_slice(query), bias_kind, is_causal,
            configs.folds(query, bias, scale), configs.dot_precision(query),
            configs.rows_aligned(query, key, value, output),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
