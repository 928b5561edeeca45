"""The ops ``fastvit::attention`` and ``fastvit::attention_qkvpacked``, in the order of a call: schema → select → fake →
autograd → autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec
from fastvit.ops.autocast import register_autocast
from fastvit.ops.autograd import register_autograd
from fastvit.ops.backends import AUTOMATIC, requested_backend, runs_natively, select
from fastvit.ops.batching import register_batching
from fastvit.ops.checks import has_contiguous_rows, rows_contiguous

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

_OPS = torch.ops.fastvit
# For calling one op inside another: a redispatched call is none of its own in a profile.
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _allocate_outputs(query: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    batch, heads, seqlen_q, _ = query.shape
    output = query.new_empty(batch, seqlen_q, heads, head_dim_v).transpose(1, 2)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty(batch, heads, seqlen_q, dtype=lse_dtype)


def _allocate_outputs_packed(qkv: Tensor) -> tuple[Tensor, Tensor]:
    query, _, _ = _unpack(qkv)
    output, lse = _allocate_outputs(query, query.shape[3])
    return output.transpose(1, 2), lse


def _allocate_grads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate_grad(query), _allocate_grad(key), _allocate_grad(value)


def _allocate_grad(tensor: Tensor) -> Tensor:
    # In the tensor's own layout, unless kernels would not take that: of a transposed or an overlapping tensor.
    grad = torch.empty_like(tensor)
    return grad if has_contiguous_rows(grad) else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
    return query, key, value


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


def _is_native(tensor: Tensor, head_dim: int, backend: str | None) -> bool:
    """Return whether the op's overload in C++ is the call: the choice of ``select``, for what kernels accept."""
    return tensor.is_cpu and head_dim <= MAX_HEAD_DIM and runs_natively(backend)


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
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
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
    grad_output = torch.zeros_like(output) if grad_output is None else rows_contiguous(grad_output)
    query, key, value = rows_contiguous(query), rows_contiguous(key), rows_contiguous(value)
    # Forward wrote both in the layout that kernels read; torch.vmap may have expanded or moved them since.
    output, lse = rows_contiguous(output), lse.contiguous()
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
    if _is_native(query, max(query.shape[3], value.shape[3]), backend):
        return _OPS.attention.cpu.redispatch(_CPU, query, key, value, bias, is_causal, scale)
    output, lse = _allocate_outputs(query, value.shape[3])
    _run_forward(query, key, value, bias, output, lse, is_causal, scale, backend)
    return output, lse


@torch.library.impl(_LIBRARY, "attention_qkvpacked", "CompositeExplicitAutograd")
def _attention_qkvpacked(
    qkv: Tensor, bias: Tensor | None, is_causal: bool, scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    if _is_native(qkv, qkv.shape[4], backend):
        return _OPS.attention_qkvpacked.cpu.redispatch(_CPU, qkv, bias, is_causal, scale)
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
    has_work = grad_output is not None and lse.numel() > 0 and key.shape[2] > 0
    if has_work and _is_native(query, max(query.shape[3], value.shape[3]), backend):
        return _OPS.attention_backward.cpu.redispatch(
            _CPU, grad_output, grad_lse, query, key, value, bias, output, lse, is_causal, scale
        )
    grads = _allocate_grads(query, key, value)
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
    if grad_output is not None and qkv.numel() > 0 and _is_native(qkv, qkv.shape[4], backend):
        return _OPS.attention_qkvpacked_backward.cpu.redispatch(
            _CPU, grad_output, grad_lse, qkv, bias, output, lse, is_causal, scale
        )
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
    return _allocate_grads(query, key, value)


@torch.library.register_fake("fastvit::attention_qkvpacked_backward", lib=_LIBRARY)
def _attention_qkvpacked_backward_fake(
    grad_output: Tensor | None, grad_lse: Tensor | None, qkv: Tensor, *_: Any
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.is_causal, ctx.scale, backend = inputs
    # The backward may run in another thread, which does not see this `fastvit.backend` block, or inside of another one.
    ctx.backend = requested_backend(backend) or AUTOMATIC
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _refuse_bias_gradient(wanted: bool) -> None:
    # The public functions refuse such a bias; a graph exported without gradients calls the op past them.
    if wanted:
        raise NotImplementedError("fastvit attention: the gradient of bias is not supported yet; detach it")


def _differentiate(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_bias_gradient(ctx.needs_input_grad[3])
    grads = torch.ops.fastvit.attention_backward(
        grad_output, grad_lse, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.backend
    )
    return *grads, None, None, None, None


def _differentiate_packed(ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_bias_gradient(ctx.needs_input_grad[1])
    grad_qkv = torch.ops.fastvit.attention_qkvpacked_backward(
        grad_output, grad_lse, *ctx.saved_tensors, ctx.is_causal, ctx.scale, ctx.backend
    )
    return grad_qkv, None, None, None, None


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("fastvit attention: the second derivative is not supported; use torch's own attention")


register_autograd(_LIBRARY, _OPS.attention.default, _differentiate, _save_for_backward)
register_autograd(_LIBRARY, _OPS.attention_qkvpacked.default, _differentiate_packed, _save_for_backward)
for _name in ("attention_backward", "attention_qkvpacked_backward"):
    register_autograd(_LIBRARY, getattr(_OPS, _name).default, _refuse_double_backward)
for _name in ("attention", "attention_qkvpacked"):
    register_autocast(_LIBRARY, getattr(_OPS, _name), _name)
register_batching(_LIBRARY)
