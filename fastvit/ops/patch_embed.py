"""Patch embedding, pixels to tokens in one pass: the public function and the ops behind it.

The order of this file is the way of a call: check → schema → fake → autograd → autocast → select.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvit.kernels.spec import PatchEmbedSpec
from fastvit.ops.autocast import register_autocast
from fastvit.ops.autograd import register_autograd
from fastvit.ops.backends import check_backend_name, requested_backend, select
from fastvit.ops.batching import register_patch_embed_batching
from fastvit.ops.checks import check_same, check_tensor, rows_contiguous


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Return the tokens of ``images``: a convolution whose stride is its kernel, written as [B, N, D] directly.

    Args:
        images: [B, C, H, W], NCHW or channels_last, read in place; float16, bfloat16, float32 or float64.
        weight: [D, C, Ph, Pw], Conv2d's own parameter; H and W must be multiples of Ph and Pw.
        bias: [D] or None.
        backend: run on this backend or raise; None chooses from the measured order.

    Returns:
        [B, N, D], contiguous, N = (H / Ph) · (W / Pw), row by row: ``conv2d(…).flatten(2).transpose(1, 2)``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the requested backend cannot run the call.

    Source: Dosovitskiy et al. 2021, equation 1.
    """
    check_tensor("images", images, 4, "[B, C, H, W]")
    check_tensor("weight", weight, 4, "[D, C, Ph, Pw]")
    check_same("weight", weight, "images", images)
    _, channels, height, width = images.shape
    embed_dim, weight_channels, patch_height, patch_width = weight.shape
    if min(weight.shape) < 1:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}; accepted are sizes of at least 1")
    if channels != weight_channels:
        raise ValueError(
            f"images: got {channels} channels in shape {tuple(images.shape)}; weight {tuple(weight.shape)} accepts "
            f"{weight_channels}"
        )
    if height < patch_height or width < patch_width:
        raise ValueError(
            f"images: got {height}×{width} pixels; accepted is at least one patch of {patch_height}×{patch_width}"
        )
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"images: got {height}×{width} pixels; accepted are multiples of the patch {patch_height}×{patch_width}"
        )
    if bias is not None:
        check_tensor("bias", bias, 1, "[D]")
        check_same("bias", bias, "images", images)
        if bias.shape[0] != embed_dim:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}; accepted is ({embed_dim},), weight's first size")
    check_backend_name(backend)
    return torch.ops.fastvit.patch_embed(images, weight, bias, backend)


_LIBRARY = torch.library.Library("fastvit", "FRAGMENT")
_LIBRARY.define("patch_embed(Tensor images, Tensor weight, Tensor? bias, str? backend) -> Tensor")
_LIBRARY.define(
    "patch_embed_backward_weight(Tensor grad_output, Tensor images, Tensor weight, str? backend)"
    " -> (Tensor grad_weight, Tensor grad_bias)"
)
_LIBRARY.define(
    "patch_embed_backward_images(Tensor grad_output, Tensor images, Tensor weight, str? backend) -> Tensor grad_images"
)


def _spec(images: Tensor, weight: Tensor) -> PatchEmbedSpec:
    batch, channels, height, width = images.shape
    embed_dim, _, patch_height, patch_width = weight.shape
    return PatchEmbedSpec(
        batch, channels, height, width, patch_height, patch_width, embed_dim, images.dtype, images.device
    )


def _allocate_tokens(images: Tensor, weight: Tensor) -> Tensor:
    batch, _, height, width = images.shape
    embed_dim, _, patch_height, patch_width = weight.shape
    return images.new_empty(batch, (height // patch_height) * (width // patch_width), embed_dim)


@torch.library.impl(_LIBRARY, "patch_embed", "CompositeExplicitAutograd")
def _patch_embed(images: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    kernels = select(_spec(images, weight), backend)
    output = _allocate_tokens(images, weight)
    if output.numel():
        kernels.patch_embed_forward(images, weight.contiguous(), None if bias is None else bias.contiguous(), output)
    return output


@torch.library.impl(_LIBRARY, "patch_embed_backward_weight", "CompositeExplicitAutograd")
def _patch_embed_backward_weight(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    kernels = select(_spec(images, weight), backend)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(weight.shape[0])
    if grad_output.numel():
        kernels.patch_embed_backward_weight(rows_contiguous(grad_output), images, grad_weight, grad_bias)
    else:
        grad_weight.zero_()
        grad_bias.zero_()
    return grad_weight, grad_bias


@torch.library.impl(_LIBRARY, "patch_embed_backward_images", "CompositeExplicitAutograd")
def _patch_embed_backward_images(grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    kernels = select(_spec(images, weight), backend)
    grad_images = torch.empty_like(images)
    if grad_output.numel():
        kernels.patch_embed_backward_images(rows_contiguous(grad_output), weight.contiguous(), grad_images)
    return grad_images


@torch.library.register_fake("fastvit::patch_embed", lib=_LIBRARY)
def _patch_embed_fake(images: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    return _allocate_tokens(images, weight)


@torch.library.register_fake("fastvit::patch_embed_backward_weight", lib=_LIBRARY)
def _patch_embed_backward_weight_fake(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), weight.new_empty(weight.shape[0])


@torch.library.register_fake("fastvit::patch_embed_backward_images", lib=_LIBRARY)
def _patch_embed_backward_images_fake(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None
) -> Tensor:
    return torch.empty_like(images)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, weight, bias, backend = inputs
    # The backward may run in another thread, which does not see the enclosing `fastvit.backend` block.
    ctx.backend = requested_backend(backend)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(images, weight)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    wants_images, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_images = grad_weight = grad_bias = None
    if wants_images:
        grad_images = torch.ops.fastvit.patch_embed_backward_images(grad_output, images, weight, ctx.backend)
    if wants_weight or wants_bias:
        grad_weight, grad_bias = torch.ops.fastvit.patch_embed_backward_weight(grad_output, images, weight, ctx.backend)
    return grad_images, grad_weight, grad_bias if ctx.has_bias else None, None


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("fastvit patch_embed: the second derivative is not supported; use torch's own conv2d")


_OPS = torch.ops.fastvit
register_autograd(_LIBRARY, _OPS.patch_embed.default, _differentiate, _save_for_backward)
for _name in ("patch_embed_backward_weight", "patch_embed_backward_images"):
    register_autograd(_LIBRARY, getattr(_OPS, _name).default, _refuse_double_backward)
register_autocast(_LIBRARY, _OPS.patch_embed, "patch_embed")
register_patch_embed_batching(_LIBRARY)
