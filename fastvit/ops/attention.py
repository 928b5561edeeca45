"""Fused attention, softmax(scale QKᵀ + bias) V without the N×N matrix: the public functions.

They check their input and call the ops of attention_op.py.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fastvit.ops import attention_op as _attention_op  # noqa: F401 (importing it registers the ops)
from fastvit.ops.backends import check_backend_name
from fastvit.ops.checks import broadcasts, check_bias, check_head_dim, check_same, check_scale, check_tensor
from fastvit.ops.eager import attention_goes_straight, packed_goes_straight


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return softmax(scale · query keyᵀ + bias) value, computed without the N×N matrix.

    Args:
        query: [B, H, Nq, D], float16, bfloat16, float32 or float64 (float64: cpu and reference backends).
        key: [B, H, Nk, D], same dtype and device. Nk may differ from Nq.
        value: [B, H, Nk, Dv]. D and Dv are 1 to 256.
        bias: broadcasts to [B, H, Nq, Nk]; bool (True = take part), or added to the scaled scores (query's dtype or
            float32). It is never expanded in memory and has no gradient yet.
        is_causal: query i sees keys j <= i (aligned at the top left, as torch's).
        scale: softmax scale; 1/√D if None.
        return_lse: also return the log-sum-exp of the scores, [B, H, Nq], float32 (float64 for float64), natural log;
            it is differentiable.
        backend: run on this backend or raise; None chooses from the measured order.

    Returns:
        [B, H, Nq, Dv] in query's dtype. Its memory is [B, Nq, H, Dv], so ``out.transpose(1, 2).flatten(2)`` is a view.
        A query whose keys are all masked gives 0 (and LSE −inf), as torch's does.

    Every stride is honoured; only a last dimension that is not contiguous is copied first. Backward is deterministic.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: a gradient of ``bias`` is asked for.
        RuntimeError: the requested backend cannot run the call.

    Source: Vaswani et al. 2017, equation 1; the tiling is that of Dao et al. 2022 (FlashAttention).
    """
    straight = attention_goes_straight(backend, query, key, value, bias)
    if not straight:
        check_backend_name(backend)
        _check_three(query, key, value)
    batch, heads, seqlen_q, head_dim = query.shape
    if bias is not None:
        bias = check_bias("bias", bias, query, (batch, heads, seqlen_q, key.shape[2]))
    scale = check_scale(scale, head_dim)
    if straight:
        output, lse = torch.ops.fastvit.attention.cpu(query, key, value, bias, is_causal, scale)
    else:
        output, lse = torch.ops.fastvit.attention(query, key, value, bias, is_causal, scale, backend)
    return (output, lse) if return_lse else output


def _check_three(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise unless query, key and value are what :func:`attention` accepts."""
    check_tensor("query", query, 4, "[B, H, Nq, D]")
    check_tensor("key", key, 4, "[B, H, Nk, D]")
    check_tensor("value", value, 4, "[B, H, Nk, Dv]")
    check_same("key", key, "query", query)
    check_same("value", value, "query", query)
    batch, heads, _, head_dim = query.shape
    if key.shape[:2] != query.shape[:2] or key.shape[3] != head_dim:
        raise ValueError(
            f"key: got shape {tuple(key.shape)}; accepted is (batch, num_heads, seqlen_k, head_dim) = "
            f"({batch}, {heads}, any, {head_dim}) as query's"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value: got shape {tuple(value.shape)}; accepted is (batch, num_heads, seqlen_k, head_dim_v) = "
            f"({', '.join(map(str, key.shape[:3]))}, any) as key's"
        )
    check_head_dim("query", head_dim)
    check_head_dim("value", value.shape[3])


@overload
def attention_qkvpacked(
    qkv: Tensor,
    *,
    bias: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def attention_qkvpacked(
    qkv: Tensor,
    *,
    bias: Tensor | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention_qkvpacked(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return self-attention of a packed projection, read in place: nothing is transposed or copied around the kernel.

    Args:
        qkv: [B, N, 3, H, D], as ``qkv_linear(x).view(B, N, 3, H, D)`` gives it; query, key, value in this order.
        bias, is_causal, scale, return_lse, backend: as in :func:`attention`.

    Returns:
        [B, N, H, D], contiguous, so ``out.flatten(2)`` is the input of the output projection; with ``return_lse`` also
        the LSE [B, H, N]. The gradient of ``qkv`` is written in its own layout.

    Raises:
        As :func:`attention`.
    """
    straight = packed_goes_straight(backend, qkv, bias)
    if not straight:
        check_backend_name(backend)
        _check_packed(qkv)
    batch, seqlen, _, heads, head_dim = qkv.shape
    if bias is not None:
        bias = check_bias("bias", bias, qkv, (batch, heads, seqlen, seqlen))
    scale = check_scale(scale, head_dim)
    if straight:
        output, lse = torch.ops.fastvit.attention_qkvpacked.cpu(qkv, bias, is_causal, scale)
    else:
        output, lse = torch.ops.fastvit.attention_qkvpacked(qkv, bias, is_causal, scale, backend)
    return (output, lse) if return_lse else output


def _check_packed(qkv: Tensor) -> None:
    """Raise unless the packed projection is what :func:`attention_qkvpacked` accepts."""
    check_tensor("qkv", qkv, 5, "[B, N, 3, H, D]")
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}; accepted is [B, N, 3, H, D], 3 for query, key and value")
    check_head_dim("qkv", qkv.shape[4])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what ``torch.nn.functional.scaled_dot_product_attention`` does, with its signature, order and meaning.

    Args:
        query: [..., Hq, L, E]; two or more dimensions, leading ones are batch dimensions.
        key: [..., H, S, E]; value: [..., H, S, Ev].
        attn_mask: broadcasts to [..., Hq, L, S]; bool (True = take part) or additive.
        dropout_p: only 0.0 for now.
        is_causal: mask above the diagonal; excludes ``attn_mask``, as in torch.
        scale: 1/√E if None.
        enable_gqa: let each key/value head serve Hq/H query heads (keys and values are repeated in memory).

    Returns:
        [..., Hq, L, Ev] in query's dtype.

    Raises:
        As :func:`attention`; ValueError for leading dimensions of key or value that are not query's;
        NotImplementedError for ``dropout_p`` > 0.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}; accepted is a tensor")
        if tensor.dim() < 2 or tensor.dim() != query.dim():
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}; accepted are two or more dimensions, as many as query's"
            )
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; accepted are 0.0 to 1.0")
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p: got {dropout_p}; accepted is 0.0 for now (torch's own function has dropout)"
        )
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask: got a mask together with is_causal=True; accepted is one of the two")
    if enable_gqa:
        key, value = _repeat_heads("key", key, query), _repeat_heads("value", value, query)
    leading = query.shape[:-2]
    # As [B, H, N, D] batches that only hold as many would look alike.
    for name, tensor in (("key", key), ("value", value)):
        if query.dim() > 4 and tensor.shape[:-2] != leading:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}; accepted are leading dimensions {tuple(leading)} as query's"
            )
    if attn_mask is not None:
        attn_mask = _mask_as_bias(attn_mask, query, key)
    if query.dim() == 4:
        return attention(query, key, value, bias=attn_mask, is_causal=is_causal, scale=scale)
    output = attention(
        _as_rank_4(query), _as_rank_4(key), _as_rank_4(value), bias=attn_mask, is_causal=is_causal, scale=scale
    )
    return output.reshape(*leading, *output.shape[-2:])


def _as_rank_4(tensor: Tensor) -> Tensor:
    if tensor.dim() <= 3:
        return tensor.unflatten(0, (1, tensor.shape[0])) if tensor.dim() == 3 else tensor[None, None]
    return tensor.flatten(0, -4)


def _mask_as_bias(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """Return ``attn_mask`` as :func:`attention` takes it for the operands of rank 4, else raise."""
    if query.dim() == 4 or not isinstance(attn_mask, Tensor):
        return check_bias("attn_mask", attn_mask, query, (*query.shape[:3], key.shape[-2]))
    leading, lengths = query.shape[:-2], (query.shape[-2], key.shape[-2])
    scores = (*leading, *lengths)
    if not broadcasts(attn_mask, scores):
        raise ValueError(f"attn_mask: got shape {tuple(attn_mask.shape)}; accepted is what broadcasts to {scores}")
    if attn_mask.dim() > 2:
        attn_mask = _as_rank_4(attn_mask.expand(*leading, *attn_mask.shape[-2:]))
    batch, heads = math.prod(leading[:-1]), leading[-1] if leading else 1
    return check_bias("attn_mask", attn_mask, query, (batch, heads, *lengths))


def _repeat_heads(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    if query.dim() < 3 or tensor.shape[-3] == 0 or query.shape[-3] % tensor.shape[-3]:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}; with enable_gqa its number of heads must divide query's "
            f"{tuple(query.shape)}"
        )
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)
