"""Fused attention, backward: gradients of query, key and value from the saved LSE; deterministic, no atomics.

With P = exp(S − LSE), S the scaled and biased scores, and Δ_i = Σ_d dO_id O_id − dLSE_i:
    dV = Pᵀ dO;  dS = P ∘ (dO Vᵀ − Δ);  dQ = scale dS K;  dK = scale dSᵀ Q.
Shapes: query [B, H, Nq, D], key [B, H, Nk, D], value [B, H, Nk, Dv], output [B, H, Nq, Dv], LSE and Δ [B, H, Nq].
Three kernels: Δ; dK and dV (a program owns BLOCK_N keys and visits all queries); dQ (a program owns BLOCK_M queries and
visits all keys). Scores are computed twice, which is the price of having every gradient summed in one order.
Source: Dao 2023, FlashAttention-2, algorithm 2.
"""

# ruff: noqa: N803 - Triton's constexpr parameters are constants and are written as such.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels.triton import configs
from fastvit.kernels.triton.attention_fwd import (
    LOG2_E,
    bias_and_mask,
    bias_arguments,
    head_base,
    load_tile,
    row_stride,
    store_tile,
)
from fastvit.kernels.triton.products import add_product, sliced_product


@triton.jit
def load_row_statistics(lse_ptr, delta_ptr, rows, seqlen_q):
    """Load the LSE, +inf where no key takes part or no row is, and Δ: then P is 0 there, not NaN."""
    lse = tl.load(lse_ptr + rows, mask=rows < seqlen_q, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    delta = tl.load(delta_ptr + rows, mask=rows < seqlen_q, other=0.0)
    return lse, delta


@triton.jit
def recomputed_probabilities(
    scores, lse, bias_base, bias_strides, rows, columns, seqlen_q, seqlen_k, scale,
    BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, CHECK_COLUMNS: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Return P from the raw scores and the LSE, in either orientation (see FOLD in ``attention_fwd``)."""
    if not FOLD:
        scores *= scale
    scores = bias_and_mask(
        scores, bias_base, bias_strides, rows, columns, seqlen_q, seqlen_k, BIAS, IS_CAUSAL, CHECK_COLUMNS
    )
    return tl.exp2(scores * (scale * LOG2_E) - lse * LOG2_E if FOLD else (scores - lse) * LOG2_E)


@triton.jit
def score_gradients(probabilities, grad_probabilities, delta, DELTA: tl.constexpr):
    """Return dS = P ∘ (dP − Δ), in either orientation."""
    if DELTA == "one key":
        # Its mean over one key is dP itself. The difference is 0, or NaN where dP is not finite.
        grad_probabilities -= grad_probabilities
    return probabilities * (grad_probabilities - delta)


@triton.jit(do_not_specialize=["num_heads", "seqlen_q"])
def delta_kernel(
    grad_output_ptr, grad_lse_ptr, output_ptr, lse_ptr, delta_ptr, grad_output_strides, grad_lse_strides,
    output_strides, num_heads, seqlen_q,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
    DELTA: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: Δ of BLOCK_M queries of one head, or only −dLSE where the rest comes later (``configs.delta``)."""
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    first_row = tl.program_id(0) % num_blocks * BLOCK_M
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    rows = first_row + tl.arange(0, BLOCK_M)

    delta = tl.zeros([BLOCK_M], tl.float32)
    if DELTA == "output":
        output_base = head_base(output_ptr, output_strides, batch, head, ALIGNED)
        output_stride = row_stride(output_strides, ALIGNED)
        output = load_tile(output_base, first_row, output_stride, seqlen_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
        grad_base = head_base(grad_output_ptr, grad_output_strides, batch, head, ALIGNED)
        grad_stride = row_stride(grad_output_strides, ALIGNED)
        grad_output = load_tile(grad_base, first_row, grad_stride, seqlen_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
        delta = tl.sum(output.to(tl.float32) * grad_output.to(tl.float32), 1)  # [BLOCK_M]
    if HAS_GRAD_LSE:
        grad_lse_base = grad_lse_ptr + batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        offsets = rows.to(tl.int64) * grad_lse_strides[2]
        delta -= tl.load(grad_lse_base + offsets, mask=rows < seqlen_q, other=0.0)

    # A row without keys has no gradient, whatever flows into its LSE of -inf: 0 · NaN must not happen.
    lse = tl.load(lse_ptr + batch_head * seqlen_q + rows, mask=rows < seqlen_q, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + batch_head * seqlen_q + rows, delta, mask=rows < seqlen_q)


@triton.jit
def _add_query_block(
    grad_key, grad_value, key_base, key_stride, key, value_base, value_stride, value, query_base, query_stride,
    grad_base, grad_stride, lse_ptr, delta_ptr, normaliser_ptr, bias_base, bias_strides, first_column, start, seqlen_q,
    seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr, SLICE: tl.constexpr, BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHECKED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """Add what the query block that begins at ``start`` gives to dK (before scaling) and dV; tiles are key by query."""
    query = load_tile(query_base, start, query_stride, seqlen_q, HEAD_DIM, BLOCK_ROWS, BLOCK_D, CHECKED)
    grad_output = load_tile(grad_base, start, grad_stride, seqlen_q, HEAD_DIM_V, BLOCK_ROWS, BLOCK_DV, CHECKED)
    rows, columns = start + tl.arange(0, BLOCK_ROWS), first_column + tl.arange(0, BLOCK_N)
    lse, delta = load_row_statistics(lse_ptr, delta_ptr, rows, seqlen_q)
    if SLICE > 0:
        scores = sliced_product(
            key_base, first_column, key_stride, seqlen_k, query_base, start, query_stride, seqlen_q,
            HEAD_DIM, SLICE, BLOCK_N, BLOCK_ROWS,
        )  # fmt: skip
    else:
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [BLOCK_N, BLOCK_ROWS]
    probabilities = recomputed_probabilities(
        scores, lse[None, :], bias_base, bias_strides, rows[None, :], columns[:, None], seqlen_q, seqlen_k, scale,
        BIAS, IS_CAUSAL, False, FOLD,
    )  # fmt: skip
    if DELTA == "probabilities":
        probabilities *= tl.load(normaliser_ptr + rows, mask=rows < seqlen_q, other=0.0)[None, :]
    grad_value = add_product(grad_value, probabilities.to(query.dtype), grad_output, PRECISION)
    if SLICE > 0:
        grad_probabilities = sliced_product(
            value_base, first_column, value_stride, seqlen_k, grad_base, start, grad_stride, seqlen_q,
            HEAD_DIM_V, SLICE, BLOCK_N, BLOCK_ROWS,
        )  # fmt: skip
    else:
        grad_probabilities = tl.dot(value, tl.trans(grad_output), input_precision=PRECISION)
    grad_scores = score_gradients(probabilities, grad_probabilities, delta[None, :], DELTA)
    grad_key = add_product(grad_key, grad_scores.to(query.dtype), query, PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["num_heads", "seqlen_q", "seqlen_k"])
def grad_key_value_kernel(
    grad_output_ptr, query_ptr, key_ptr, value_ptr, bias_ptr, lse_ptr, delta_ptr, normaliser_ptr, grad_key_ptr,
    grad_value_ptr,
    grad_output_strides, query_strides, key_strides, value_strides, bias_strides, grad_key_strides,
    grad_value_strides, num_heads, seqlen_q, seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_TAIL: tl.constexpr, SLICE: tl.constexpr,
    BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, DELTA: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: dK and dV of BLOCK_N keys of one head, from all queries."""
    num_blocks = tl.cdiv(seqlen_k, BLOCK_N)
    first_column = tl.program_id(0) % num_blocks * BLOCK_N
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads

    key_base = head_base(key_ptr, key_strides, batch, head, ALIGNED)
    key_stride = row_stride(key_strides, ALIGNED)
    key = load_tile(key_base, first_column, key_stride, seqlen_k, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    value_base = head_base(value_ptr, value_strides, batch, head, ALIGNED)
    value_stride = row_stride(value_strides, ALIGNED)
    value = load_tile(value_base, first_column, value_stride, seqlen_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
    query_base = head_base(query_ptr, query_strides, batch, head, ALIGNED)
    grad_base = head_base(grad_output_ptr, grad_output_strides, batch, head, ALIGNED)
    query_stride, grad_stride = row_stride(query_strides, ALIGNED), row_stride(grad_output_strides, ALIGNED)
    lse_ptr += batch_head * seqlen_q
    delta_ptr += batch_head * seqlen_q
    normaliser_ptr += batch_head * seqlen_q
    bias_base = bias_ptr
    if BIAS != "none":
        bias_base += batch * bias_strides[0] + head * bias_strides[1]
    grad_key = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    # In a causal head the queries before the block's first key give nothing; the block of queries may straddle it.
    begin = first_column // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    full_end = seqlen_q // BLOCK_M * BLOCK_M
    for start in tl.range(begin, full_end, BLOCK_M):
        grad_key, grad_value = _add_query_block(
            grad_key, grad_value, key_base, key_stride, key, value_base, value_stride, value, query_base, query_stride,
            grad_base, grad_stride, lse_ptr, delta_ptr, normaliser_ptr, bias_base, bias_strides, first_column, start,
            seqlen_q, seqlen_k, scale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_M, SLICE, BIAS,
            IS_CAUSAL, False, FOLD, PRECISION, DELTA,
        )  # fmt: skip
    for start in tl.range(full_end, seqlen_q, BLOCK_TAIL, num_stages=1):
        grad_key, grad_value = _add_query_block(
            grad_key, grad_value, key_base, key_stride, key, value_base, value_stride, value, query_base, query_stride,
            grad_base, grad_stride, lse_ptr, delta_ptr, normaliser_ptr, bias_base, bias_strides, first_column, start,
            seqlen_q, seqlen_k, scale, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCK_TAIL, SLICE, BIAS,
            IS_CAUSAL, True, FOLD, PRECISION, DELTA,
        )  # fmt: skip

    grad_key_base = head_base(grad_key_ptr, grad_key_strides, batch, head, ALIGNED)
    grad_key_stride = row_stride(grad_key_strides, ALIGNED)
    store_tile(grad_key_base, first_column, grad_key_stride, seqlen_k, grad_key * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    grad_value_base = head_base(grad_value_ptr, grad_value_strides, batch, head, ALIGNED)
    grad_value_stride = row_stride(grad_value_strides, ALIGNED)
    store_tile(grad_value_base, first_column, grad_value_stride, seqlen_k, grad_value, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit
def _visit_key_block(
    query_base, query_stride, query, grad_base, grad_stride, grad_output, lse, key_base, key_stride,
    value_base, value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_KEYS: tl.constexpr, SLICE: tl.constexpr, BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, CHECKED: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the key block that begins at ``start``, and P and dP of the query block against it."""
    key = load_tile(key_base, start, key_stride, seqlen_k, HEAD_DIM, BLOCK_KEYS, BLOCK_D, CHECKED)
    rows, columns = first_row + tl.arange(0, BLOCK_M), start + tl.arange(0, BLOCK_KEYS)
    if SLICE > 0:
        scores = sliced_product(
            query_base, first_row, query_stride, seqlen_q, key_base, start, key_stride, seqlen_k,
            HEAD_DIM, SLICE, BLOCK_M, BLOCK_KEYS,
        )  # fmt: skip
        grad_probabilities = sliced_product(
            grad_base, first_row, grad_stride, seqlen_q, value_base, start, value_stride, seqlen_k,
            HEAD_DIM_V, SLICE, BLOCK_M, BLOCK_KEYS,
        )  # fmt: skip
    else:
        value = load_tile(value_base, start, value_stride, seqlen_k, HEAD_DIM_V, BLOCK_KEYS, BLOCK_DV, CHECKED)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_M, BLOCK_KEYS]
        grad_probabilities = tl.dot(grad_output, tl.trans(value), input_precision=PRECISION)
    probabilities = recomputed_probabilities(
        scores, lse[:, None], bias_base, bias_strides, rows[:, None], columns[None, :], seqlen_q, seqlen_k, scale,
        BIAS, IS_CAUSAL, CHECKED, FOLD,
    )  # fmt: skip
    return key, probabilities, grad_probabilities


@triton.jit(do_not_specialize=["num_heads", "seqlen_q", "seqlen_k"])
def grad_query_kernel(
    grad_output_ptr, query_ptr, key_ptr, value_ptr, bias_ptr, lse_ptr, delta_ptr, normaliser_ptr, grad_query_ptr,
    grad_output_strides, query_strides, key_strides, value_strides, bias_strides, grad_query_strides,
    num_heads, seqlen_q, seqlen_k, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAIL: tl.constexpr, SLICE: tl.constexpr,
    BIAS: tl.constexpr, IS_CAUSAL: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    DELTA: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: dQ of BLOCK_M queries of one head, from all keys that take part.

    With DELTA "probabilities" a pass before adds Σ_j P_ij dP_ij to Δ and stores it, in place of Σ_d dO_id O_id: the
    same number, but of the very dP from which it will be subtracted, so that in float32 a row of few keys cancels as it
    should. It also stores what P of the rounded LSE must be multiplied by to sum to 1.
    """
    num_blocks = tl.cdiv(seqlen_q, BLOCK_M)
    block = tl.program_id(0) % num_blocks
    if IS_CAUSAL:
        block = num_blocks - 1 - block
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)

    query_base = head_base(query_ptr, query_strides, batch, head, ALIGNED)
    query_stride = row_stride(query_strides, ALIGNED)
    query = load_tile(query_base, first_row, query_stride, seqlen_q, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    grad_base = head_base(grad_output_ptr, grad_output_strides, batch, head, ALIGNED)
    grad_stride = row_stride(grad_output_strides, ALIGNED)
    grad_output = load_tile(grad_base, first_row, grad_stride, seqlen_q, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    key_base = head_base(key_ptr, key_strides, batch, head, ALIGNED)
    value_base = head_base(value_ptr, value_strides, batch, head, ALIGNED)
    key_stride, value_stride = row_stride(key_strides, ALIGNED), row_stride(value_strides, ALIGNED)
    offset = batch_head * seqlen_q
    lse, delta = load_row_statistics(lse_ptr + offset, delta_ptr + offset, rows, seqlen_q)
    bias_base = bias_ptr
    if BIAS != "none":
        bias_base += batch * bias_strides[0] + head * bias_strides[1]
    grad_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    end = tl.minimum(seqlen_k, first_row + BLOCK_M) if IS_CAUSAL else seqlen_k
    full_end = (tl.minimum(seqlen_k, first_row + 1) if IS_CAUSAL else seqlen_k) // BLOCK_N * BLOCK_N
    normaliser = tl.full([BLOCK_M], 1.0, tl.float32)
    if DELTA == "probabilities":
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_delta = tl.zeros([BLOCK_M], tl.float32)
        for start in tl.range(0, end, BLOCK_N, num_stages=1):
            _, probabilities, grad_probabilities = _visit_key_block(
                query_base, query_stride, query, grad_base, grad_stride, grad_output, lse, key_base, key_stride,
                value_base, value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SLICE, BIAS, IS_CAUSAL, True, FOLD,
                PRECISION,
            )  # fmt: skip
            row_sum += tl.sum(probabilities, 1)
            row_delta += tl.sum(probabilities * grad_probabilities, 1)
        # A row without keys sums to 0.
        normaliser = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)
        delta += row_delta * normaliser
        tl.store(delta_ptr + offset + rows, delta, mask=rows < seqlen_q)
        tl.store(normaliser_ptr + offset + rows, normaliser, mask=rows < seqlen_q)
    for start in tl.range(0, full_end, BLOCK_N):
        key, probabilities, grad_probabilities = _visit_key_block(
            query_base, query_stride, query, grad_base, grad_stride, grad_output, lse, key_base, key_stride,
            value_base, value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SLICE, BIAS, False, False, FOLD, PRECISION,
        )  # fmt: skip
        if DELTA == "probabilities":
            probabilities *= normaliser[:, None]
        grad_scores = score_gradients(probabilities, grad_probabilities, delta[:, None], DELTA)
        grad_query = add_product(grad_query, grad_scores.to(key.dtype), key, PRECISION)
    for start in tl.range(full_end, end, BLOCK_TAIL, num_stages=1):
        key, probabilities, grad_probabilities = _visit_key_block(
            query_base, query_stride, query, grad_base, grad_stride, grad_output, lse, key_base, key_stride,
            value_base, value_stride, bias_base, bias_strides, first_row, start, seqlen_q, seqlen_k, scale,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_TAIL, SLICE, BIAS, IS_CAUSAL, True, FOLD,
            PRECISION,
        )  # fmt: skip
        if DELTA == "probabilities":
            probabilities *= normaliser[:, None]
        grad_scores = score_gradients(probabilities, grad_probabilities, delta[:, None], DELTA)
        grad_query = add_product(grad_query, grad_scores.to(key.dtype), key, PRECISION)

    grad_query_base = head_base(grad_query_ptr, grad_query_strides, batch, head, ALIGNED)
    grad_query_stride = row_stride(grad_query_strides, ALIGNED)
    store_tile(grad_query_base, first_row, grad_query_stride, seqlen_q, grad_query * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


def attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None,
    output: Tensor, lse: Tensor, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, *,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write the gradients of query, key and value; the same inputs give the same bits in every run.

    float32, float16 or bfloat16, any strides, the last one 1; ``lse`` contiguous float32, as the forward wrote it.
    In 16 bits P and dS are rounded to the input dtype before their products; sums are float32.
    """
    with torch.cuda.device_of(query):
        delta_kind = configs.delta_kind(query, key, is_causal)
        delta = _launch_delta(grad_output, grad_lse, output, lse, delta_kind)
        normaliser = torch.empty_like(delta) if delta_kind == "probabilities" else delta
        # dQ first: in float32 it completes Δ.
        _launch_grad_query(
            grad_output, query, key, value, bias, lse, delta, normaliser, grad_query,
            is_causal=is_causal, scale=scale, delta_kind=delta_kind,
        )  # fmt: skip
        _launch_grad_key_value(
            grad_output, query, key, value, bias, lse, delta, normaliser, grad_key, grad_value,
            is_causal=is_causal, scale=scale, delta_kind=delta_kind,
        )  # fmt: skip


def _launch_delta(grad_output: Tensor, grad_lse: Tensor | None, output: Tensor, lse: Tensor, delta_kind: str) -> Tensor:
    batch, num_heads, seqlen_q, head_dim_v = output.shape
    block_dv = configs.padded(head_dim_v)
    block_m = configs.ROW_SUM_ELEMENTS // block_dv
    delta = torch.empty_like(lse)
    delta_kernel[configs.grid(batch * num_heads, seqlen_q, block_m)](
        grad_output, grad_lse, output, lse, delta,
        grad_output.stride()[:3], (0, 0, 0) if grad_lse is None else grad_lse.stride(), output.stride()[:3],
        num_heads, seqlen_q, head_dim_v, block_dv, block_m, grad_lse is not None, delta_kind,
        configs.rows_aligned(grad_output, output),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return delta


def _launch_grad_key_value(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor,
    normaliser: Tensor, grad_key: Tensor, grad_value: Tensor, *, is_causal: bool, scale: float, delta_kind: str,
) -> None:  # fmt: skip
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k, head_dim_v = key.shape[2], value.shape[3]
    block_d, block_dv = configs.padded(head_dim), configs.padded(head_dim_v)
    family, width = configs.device_family(query.device), max(block_d, block_dv)
    config = configs.attention_config("grad_key_value", query.element_size(), width, bias is not None, family)
    bias, bias_strides, bias_kind = bias_arguments(bias)
    grad_key_value_kernel[configs.grid(batch * num_heads, seqlen_k, config.block_n)](
        grad_output, query, key, value, bias, lse, delta, normaliser, grad_key, grad_value,
        grad_output.stride()[:3], query.stride()[:3], key.stride()[:3], value.stride()[:3], bias_strides,
        grad_key.stride()[:3], grad_value.stride()[:3], num_heads, seqlen_q, seqlen_k, scale,
        head_dim, head_dim_v, block_d, block_dv, config.block_n, config.block_m,
        configs.tail_block(seqlen_q, config.block_m), configs.head_dim_slice(query), bias_kind, is_causal,
        configs.folds(query, bias, scale), configs.dot_precision(query), delta_kind,
        configs.rows_aligned(grad_output, query, key, value, grad_key, grad_value),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _launch_grad_query(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, lse: Tensor, delta: Tensor,
    normaliser: Tensor, grad_query: Tensor, *, is_causal: bool, scale: float, delta_kind: str,
) -> None:  # fmt: skip
    batch, num_heads, seqlen_q, head_dim = query.shape
    seqlen_k, head_dim_v = key.shape[2], value.shape[3]
    block_d, block_dv = configs.padded(head_dim), configs.padded(head_dim_v)
    family, width = configs.device_family(query.device), max(block_d, block_dv)
    config = configs.attention_config("grad_query", query.element_size(), width, bias is not None, family)
    bias, bias_strides, bias_kind = bias_arguments(bias)
    grad_query_kernel[configs.grid(batch * num_heads, seqlen_q, config.block_m)](
        grad_output, query, key, value, bias, lse, delta, normaliser, grad_query,
        grad_output.stride()[:3], query.stride()[:3], key.stride()[:3], value.stride()[:3], bias_strides,
        grad_query.stride()[:3], num_heads, seqlen_q, seqlen_k, scale,
        head_dim, head_dim_v, block_d, block_dv, config.block_m, config.block_n,
        config.block_n if is_causal else configs.tail_block(seqlen_k, config.block_n), configs.head_dim_slice(query),
        bias_kind, is_causal, configs.folds(query, bias, scale), configs.dot_precision(query), delta_kind,
        configs.rows_aligned(grad_output, query, key, value, grad_query),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
