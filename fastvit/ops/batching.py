"""What ``torch.vmap`` does with the ops: the mapped dimension becomes part of the batch, so that one kernel runs.

Only where the kernel has nowhere to put it (a gradient of weights per sample, weights and images mapped together) is
the op called once per entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]


def _front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return the tensor with the mapped dimension in front; one that is not mapped is expanded, without a copy."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _folded(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return the tensor with the mapped dimension folded into its first; one that is not mapped is repeated."""
    tensor = _front(tensor, dim, size)
    return None if tensor is None else tensor.flatten(0, 1)


def _folded_bias(bias: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    if bias is None or (dim is None and bias.shape[0] == 1):
        return bias
    bias = _front(bias, dim, size)
    return None if bias is None else bias.expand(-1, batch, -1, -1, -1).flatten(0, 1)


def _one_by_one(op: Callable[..., Any], size: int, dims: Dims, args: tuple[Any, ...], *rest: Any) -> tuple[Any, Any]:
    """Call ``op`` for each entry; ``args`` are its tensors and what may stand for one, ``rest`` is as it is."""
    calls = [
        op(*(arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, dims, strict=False)), *rest)
        for index in range(size)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(tensors) for tensors in zip(*calls, strict=True)), (0,) * len(calls[0])
    return torch.stack(calls), 0


def _attention_rule(op: Callable[..., Any], bias_at: int, query_at: int, tensors: int) -> Callable[..., Any]:
    """Return the rule of an attention op with ``tensors`` tensor arguments, of which the bias broadcasts."""

    def rule(info: Any, dims: Dims, *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        query, query_dim = args[query_at], dims[query_at]
        batch = query.shape[0] if query_dim is None else query.movedim(query_dim, 0).shape[1]
        given = [
            _folded_bias(arg, dim, size, batch) if index == bias_at else _folded(arg, dim, size)
            for index, (arg, dim) in enumerate(zip(args[:tensors], dims[:tensors], strict=True))
        ]
        outputs = op(*given, *args[tensors:])
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, batch)), 0
        return tuple(output.unflatten(0, (size, batch)) for output in outputs), (0,) * len(outputs)

    return rule


def _patch_embed(info: Any, dims: Dims, images: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
    op, size = torch.ops.fastvit.patch_embed, info.batch_size
    images_dim, weight_dim, bias_dim = dims[:3]
    if weight_dim is None and bias_dim is None:
        tokens = op(_folded(images, images_dim, size), weight, bias, *rest)
        return tokens.unflatten(0, (size, -1) if images.numel() else (size, 0)), 0
    if images_dim is None:
        # An ensemble on the same images is one embedding of size × D features.
        tokens = op(images, _folded(weight, weight_dim, size), _folded(bias, bias_dim, size), *rest)
        return tokens.unflatten(2, (size, -1)), 2
    return _one_by_one(op, size, dims, (images, weight, bias), *rest)


def _patch_embed_backward_weight(
    info: Any, dims: Dims, grad_output: Tensor, images: Tensor, weight: Tensor, *rest: Any
) -> Any:
    op, size = torch.ops.fastvit.patch_embed_backward_weight, info.batch_size
    if dims[1] is not None:
        return _one_by_one(op, size, dims, (grad_output, images, weight), *rest)
    grad_output = grad_output.expand(size, *grad_output.shape) if dims[0] is None else grad_output.movedim(dims[0], 0)
    features = grad_output.permute(1, 2, 0, 3).flatten(2)  # [B, N, size · D]
    grads = op(features, images, _folded(weight, dims[2], size), *rest)
    return tuple(grad.unflatten(0, (size, -1)) for grad in grads), (0, 0)


def _patch_embed_backward_images(
    info: Any, dims: Dims, grad_output: Tensor, images: Tensor, weight: Tensor, *rest: Any
) -> Any:
    op, size = torch.ops.fastvit.patch_embed_backward_images, info.batch_size
    if dims[2] is not None:
        return _one_by_one(op, size, dims, (grad_output, images, weight), *rest)
    folded = op(_folded(grad_output, dims[0], size), _folded(images, dims[1], size), weight, *rest)
    return folded.unflatten(0, (size, -1)), 0


def register_batching(library: torch.library.Library) -> None:
    """Register the batching rules of the attention ops with the fragment that owns them."""
    ops = torch.ops.fastvit
    for name, bias_at, query_at, tensors in (
        ("attention", 3, 0, 4),
        ("attention_backward", 5, 2, 8),
        ("attention_qkvpacked", 1, 0, 2),
        ("attention_qkvpacked_backward", 3, 2, 6),
    ):
        rule = _attention_rule(getattr(ops, name), bias_at, query_at, tensors)
        torch.library.register_vmap(f"fastvit::{name}", rule, lib=library)


def register_patch_embed_batching(library: torch.library.Library) -> None:
    """Register the batching rules of the patch-embedding ops with the fragment that owns them."""
    for rule in (_patch_embed, _patch_embed_backward_weight, _patch_embed_backward_images):
        torch.library.register_vmap(f"fastvit::{rule.__name__.removeprefix('_')}", rule, lib=library)
