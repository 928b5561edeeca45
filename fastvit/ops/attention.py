"""Fused attention, softmax(scale QKᵀ + bias) V without the N×N matrix: the public functions and the ops behind them.

The order of this file is the way of a call: check → schema → fake → autograd → autocast → select.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels.spec import AttentionSpec
from fastvit.ops.autocast import register_autocast
from fastvit.ops.backends import check_backend_name, requested_backend, select
from fastvit.ops.checks import check_bias, check_head_dim, check_same, check_scale, check_tensor


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
    check_tensor("query", query, 4, "[B, H, Nq, D]")
    check_tensor("key", key, 4, "[B, H, Nk, D]")
    check_tensor("value", value, 4, "[B, H, Nk, Dv]")
    check_same("key", key, "query", query)
    check_same("value", value, "query", query)
    batch, heads, seqlen_q, head_dim = query.shape
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
    check_backend_name(backend)
    bias = check_bias("bias", bias, query, (batch, heads, seqlen_q, key.shape[2]))
    output, lse = torch.ops.fastvit.attention(
        query, key, value, bias, is_causal, check_scale(scale, head_dim), backend
    )
    return (output, lse) if return_lse else output


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
    check_tensor("qkv", qkv, 5, "[B, N, 3, H, D]")
    batch, seqlen, three, heads, head_dim = qkv.shape
    if three != 3:
        raise ValueError(f"qkv: got shape {tuple(qkv.shape)}; accepted is [B, N, 3, H, D], 3 for query, key and value")
    check_head_dim("qkv", head_dim)
    check_backend_name(backend)
    bias = check_bias("bias", bias, qkv, (batch, heads, seqlen, seqlen))
    output, lse = torch.ops.fastvit.attention_qkvpacked(qkv, bias, is_causal, check_scale(scale, head_dim), backend)
    return (output, lse) if return_lse else output


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
        As :func:`attention`; NotImplementedError for ``dropout_p`` > 0.
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
    if query.dim() == 4:
        return attention(query, key, value, bias=attn_mask, is_causal=is_causal, scale=scale)
    leading = query.shape[:-2]
    if attn_mask is not None and attn_mask.dim() > 2 and len(leading) != 2:
        attn_mask = _as_rank_4(attn_mask.expand(*leading, *attn_mask.shape[-2:]))
    output = attention(
        _as_rank_4(query), _as_rank_4(key), _as_rank_4(value), bias=attn_mask, is_causal=is_causal, scale=scale
    )
    return output.reshape(*leading, *output.shape[-2:])


def _as_rank_4(tensor: Tensor) -> Tensor:
    if tensor.dim() <= 3:
        return tensor.unflatten(0, (1, tensor.shape[0])) if tensor.dim() == 3 else tensor[None, None]
    return tensor.flatten(0, -4)


def _repeat_heads(name: str, tensor: Tensor, query: Tensor) -> Tensor:
    if query.dim() < 3 or tensor.shape[-3] == 0 or query.shape[-3] % tensor.shape[-3]:
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}; with enable_gqa its number of heads must divide query's "
            f"{tuple(query.shape)}"
        )
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], dim=-3)


_LIBRARY = torch.library.Library("fastvit", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, bool is_causal, float scale, str? backend)"
    " -> (Tensor output, Tensor lse)"
)
_LIBRARY.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias,"
    " Tensor output, Tensor lse, bool is_causal, float scale, str? backend)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
_LIBRARY.define(
    "attention_qkvpacked(Tensor qkv, Tensor? bias, bool is_causal, float scale, str? backend)"
    " -> (Tensor output, Tensor lse)"
)
_LIBRARY.define(
    "attention_qkvpacked_backward(Tensor? grad_output, Tensor? grad_lse, Tensor qkv, Tensor? bias, Tensor output,"
    " Tensor lse, bool is_causal, float scale, str? backend) -> Tensor grad_qkv"
)


def _allocate_outputs(query: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q, _ = query.shape
    output = query.new_empty(batch, seqlen_q, heads, head_dim_v).transpose(1, 2)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, seqlen_q, dtype=lse_dtype)


def _allocate_outputs_packed(qkv: Tensor) -> tuple[Tensor, Tensor]:
    query, _, _ = _unpack(qkv)
    output, lse = _allocate_outputs(query, query.shape[3])
    return output.transpose(1, 2), lse


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
    return query, key, value


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _spec(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool) -> AttentionSpec:
    batch, heads, seqlen_q, head_dim = query.shape
    return AttentionSpec(
        batch,
        heads,
        seqlen_q,
        key.shape[2],
        head_dim,
        value.shape[3],
        query.dtype,
        None if bias is None else bias.dtype,
        is_causal,
        query.device,
    )


def _run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> None:
    kernels = select(_spec(query, key, value, bias, is_causal), backend)
    if lse.numel() == 0:
        return
    if key.shape[2] == 0:
        output.zero_()
        lse.fill_(-torch.inf)
        return
    if bias is not None:
        bias = bias.expand(*lse.shape, key.shape[2])
    query, key, value = _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value)
    kernels.attention_forward(query, key, value, bias, output, lse, is_causal=is_causal, scale=scale)


def _run_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> None:
    kernels = select(_spec(query, key, value, bias, is_causal), backend)
    if lse.numel() == 0 or key.shape[2] == 0:
        for grad in grads:
            grad.zero_()
        return
    if bias is not None:
        bias = bias.expand(*lse.shape, key.shape[2])
    grad_output = torch.zeros_like(output) if grad_output is None else _rows_contiguous(grad_output)
    query, key, value = _rows_contiguous(query), _rows_contiguous(key), _rows_contiguous(value)
    kernels.attention_backward(
        grad_output, grad_lse, query, key, value, bias, output, lse, *grads, is_causal=is_causal, scale=scale
    )


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    output, lse = _allocate_outputs(query, value.shape[3])
    _run_forward(query, key, value, bias, output, lse, is_causal, scale, backend)
    return output, lse


@torch.library.impl(_LIBRARY, "attention_qkvpacked", "CompositeExplicitAutograd")
def _attention_qkvpacked(
    qkv: Tensor, bias: Tensor | None, is_causal: bool, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    output, lse = _allocate_outputs_packed(qkv)
    _run_forward(*_unpack(qkv), bias, output.transpose(1, 2), lse, is_causal, scale, backend)
    return output, lse


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    _run_backward(grad_output, grad_lse, query, key, value, bias, output, lse, grads, is_causal, scale, backend)
    return grads


@torch.library.impl(_LIBRARY, "attention_qkvpacked_backward", "CompositeExplicitAutograd")
def _attention_qkvpacked_backward(
    grad_output: Tensor | None,
    grad_lse: Tensor | None,
    qkv: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    backend: str | None,
) -> Tensor:
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if grad_output is not None:
        grad_output = grad_output.transpose(1, 2)
    _run_backward(
        grad_output,
        grad_lse,
        *_unpack(qkv),
        bias,
        output.transpose(1, 2),
        lse,
        _unpack(grad_qkv),
        is_causal,
        scale,
        backend,
    )
    return grad_qkv


@torch.library.register_fake("fastvit::attention", lib=_LIBRARY)
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _allocate_outputs(query, value.shape[3])


@torch.library.register_fake("fastvit::attention_qkvpacked", lib=_LIBRARY)
def _attention_qkvpacked_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _allocate_outputs_packed(qkv)


@torch.library.register_fake("fastvit::attention_backward", lib=_LIBRARY)
def _attention_backward_fake(
    grad_output: Tensor | None, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.register_fake("fastvit::attention_qkvpacked_backward", lib=_LIBRARY)
def _attention_qkvpacked_backward_fake(
    grad_output: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, backend = inputs
    # The backward may run in another thread, which does not see the enclosing `fastvit.backend` block.
    ctx.backend = requested_backend(backend)
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = torch.ops.fastvit.attention_backward(
        grad_output, grad_lse, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.backend
    )
    return *grads, None, None, None, None


def _differentiate_packed(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_qkv = torch.ops.fastvit.attention_qkvpacked_backward(
        grad_output, grad_lse, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.backend
    )
    return grad_qkv, None, None, None, None


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("fastvit attention: the second derivative is not supported; use torch's own attention")


torch.library.register_autograd(
    "fastvit::attention", _differentiate, setup_context=_save_for_backward, lib=_LIBRARY
)
torch.library.register_autograd(
    "fastvit::attention_qkvpacked", _differentiate_packed, setup_context=_save_for_backward, lib=_LIBRARY
)
for _name in ("attention_backward", "attention_qkvpacked_backward"):
    torch.library.register_autograd(f"fastvit::{_name}", _refuse_double_backward, lib=_LIBRARY)
for _name in ("attention", "attention_qkvpacked"):
    register_autocast(_LIBRARY, getattr(torch.ops.fastvit, _name), _name)
