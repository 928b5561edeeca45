"""Patch embedding, pixels to tokens in one pass: the public function and the ops behind it.

The order of this file is the way of a call: check → schema → fake → autograd → autocast → select.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels.spec import PatchEmbedSpec, patch_grid
from fastvit.ops.autocast import register_autocast
from fastvit.ops.autograd import register_autograd
from fastvit.ops.backends import AUTOMATIC, check_backend_name, requested_backend, select
from fastvit.ops.batching import register_patch_embed_batching
from fastvit.ops.channels_last import (
    Stride,
    as_one_channel,
    in_channels_last,
    reads_as_one_channel,
    stride_as_one_channel,
    weight_as_one_channel,
    weight_from_one_channel,
)
from fastvit.ops.checks import check_pair, check_same, check_tensor, rows_contiguous
from fastvit.ops.eager import patch_embed_goes_straight


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    backend: str | None = None,
) -> Tensor:
    """Return the tokens of ``images``: a convolution from pixels, written as [B, N, D] directly.

    Args:
        images: [B, C, H, W], NCHW or channels_last, read in place; float16, bfloat16, float32 or float64.
        weight: [D, C, Ph, Pw], Conv2d's own parameter.
        bias: [D] or None.
        stride: pixels from one patch to the next, one number or (down, right), as Conv2d's; None is the patch. Less
            than the patch makes patches overlap, more leaves gaps between them.
        padding: zeros around the images, one number or (above and below, left and right), as Conv2d's. They are added
            by ``torch.nn.functional.pad``, which copies the images once.
        backend: run on this backend or raise; None chooses from the measured order.

    Returns:
        [B, N, D], contiguous, row by row: ``conv2d(…).flatten(2).transpose(1, 2)``. There are (H + 2 padding − Ph) //
        stride + 1 rows of patches, and columns likewise; pixels beyond the last whole patch are dropped. Only with
        neither stride nor padding given, H and W must be multiples of Ph and Pw.

    The gradient of the images is a sum over patches where these overlap, and zero in gaps: with a stride other than the
    patch it is PyTorch's own (``aten::convolution_backward``), whatever the backend, and as deterministic as PyTorch
    makes it. Everything else is the backend's.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the requested backend cannot run the call.

    Source: Dosovitskiy et al. 2021, equation 1; Li et al. 2022 (MViTv2) for patches that overlap.
    """
    # False and 0.0 equal 0 too, and are refused below.
    pads = type(padding) not in (int, tuple) or padding not in (0, (0, 0))
    if stride is None and not pads and patch_embed_goes_straight(backend, images, weight, bias):
        return torch.ops.fastvit.patch_embed.cpu(images, weight, bias)
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
    above, left = check_pair("padding", padding, 0)
    tiles = stride is None and not (above or left)
    if height + 2 * above < patch_height or width + 2 * left < patch_width:
        padded = f" and padding {above}×{left}" if above or left else ""
        raise ValueError(
            f"images: got {height}×{width} pixels{padded}; accepted is at least one patch of "
            f"{patch_height}×{patch_width}"
        )
    if tiles and (height % patch_height or width % patch_width):
        raise ValueError(
            f"images: got {height}×{width} pixels; accepted are multiples of the patch {patch_height}×{patch_width}"
        )
    if bias is not None:
        check_tensor("bias", bias, 1, "[D]")
        check_same("bias", bias, "images", images)
        if bias.shape[0] != embed_dim:
            raise ValueError(f"bias: got shape {tuple(bias.shape)}; accepted is ({embed_dim},), weight's first size")
    check_backend_name(backend)
    if tiles:
        return torch.ops.fastvit.patch_embed(images, weight, bias, backend)
    steps = (patch_height, patch_width) if stride is None else check_pair("stride", stride, 1)
    if above or left:
        images = F.pad(images, (left, left, above, above))
    if steps != (patch_height, patch_width):
        return torch.ops.fastvit.patch_embed(images, weight, bias, backend, steps)
    height, width = images.shape[2:]
    if height % patch_height or width % patch_width:
        images = images[:, :, : height // patch_height * patch_height, : width // patch_width * patch_width]
    return torch.ops.fastvit.patch_embed(images, weight, bias, backend)


# Without a stride the patches tile the images, and every kernel may rely on that.
_LIBRARY = torch.library.Library("fastvit", "FRAGMENT")
_LIBRARY.define(
    "patch_embed(Tensor images, Tensor weight, Tensor? bias, str? backend, SymInt[2]? stride=None) -> Tensor"
)
_LIBRARY.define(
    "patch_embed_backward_weight(Tensor grad_output, Tensor images, Tensor weight, str? backend,"
    " SymInt[2]? stride=None) -> (Tensor grad_weight, Tensor grad_bias)"
)
_LIBRARY.define(
    "patch_embed_backward_images(Tensor grad_output, Tensor images, Tensor weight, str? backend,"
    " SymInt[2]? stride=None) -> Tensor grad_images"
)


def _spec(images: Tensor, weight: Tensor, stride: Stride) -> PatchEmbedSpec:
    batch, channels, height, width = images.shape
    embed_dim, _, patch_height, patch_width = weight.shape
    sizes = (batch, channels, height, width, patch_height, patch_width, embed_dim)
    return PatchEmbedSpec(*sizes, images.dtype, images.device, None if stride is None else (stride[0], stride[1]))


def _allocate_tokens(images: Tensor, weight: Tensor, stride: Stride) -> Tensor:
    rows, columns = patch_grid(images.shape[2:], weight.shape[2:], stride)
    return images.new_empty(images.shape[0], rows * columns, weight.shape[0])


@torch.library.impl(_LIBRARY, "patch_embed", "CompositeExplicitAutograd")
def _patch_embed(
    images: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None, stride: Stride = None
) -> Tensor:
    output = _allocate_tokens(images, weight, stride)
    if reads_as_one_channel(images, weight, output.shape[1]):
        stride = stride_as_one_channel(stride, images.shape[1])
        images, weight = as_one_channel(images), weight_as_one_channel(weight)
    kernels = select(_spec(images, weight, stride), backend)
    if output.numel():
        contiguous_bias = None if bias is None else bias.contiguous()
        kernels.patch_embed_forward(images, weight.contiguous(), contiguous_bias, output, stride)
    return output


@torch.library.impl(_LIBRARY, "patch_embed_backward_weight", "CompositeExplicitAutograd")
def _patch_embed_backward_weight(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None, stride: Stride = None
) -> tuple[Tensor, Tensor]:
    embed_dim, channels, height, width = weight.shape
    is_one_channel = reads_as_one_channel(images, weight, grad_output.shape[1])
    if is_one_channel:
        stride = stride_as_one_channel(stride, channels)
        images = as_one_channel(images)
        grad_weight = weight.new_empty(embed_dim, 1, height, width * channels)
    else:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = weight.new_empty(embed_dim)
    kernels = select(_spec(images, grad_weight, stride), backend)
    if grad_output.numel():
        kernels.patch_embed_backward_weight(rows_contiguous(grad_output), images, grad_weight, grad_bias, stride)
    else:
        grad_weight.zero_()
        grad_bias.zero_()
    if is_one_channel:
        grad_weight = weight_from_one_channel(grad_weight, channels)
    return grad_weight.contiguous(memory_format=_layout(weight)), grad_bias


def _layout(weight: Tensor) -> torch.memory_format:
    return torch.channels_last if in_channels_last(weight) else torch.contiguous_format


@torch.library.impl(_LIBRARY, "patch_embed_backward_images", "CompositeExplicitAutograd")
def _patch_embed_backward_images(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None, stride: Stride = None
) -> Tensor:
    grad_images = torch.empty_like(images)
    if stride is None:
        written = grad_images
        if reads_as_one_channel(grad_images, weight, grad_output.shape[1]):
            written, weight = as_one_channel(grad_images), weight_as_one_channel(weight)
        kernels = select(_spec(written, weight, stride), backend)
        if grad_output.numel():
            kernels.patch_embed_backward_images(rows_contiguous(grad_output), weight.contiguous(), written)
        return grad_images
    select(_spec(images, weight, stride), backend)
    if not grad_output.numel():
        return grad_images
    grid = grad_output.transpose(1, 2).unflatten(2, patch_grid(images.shape[2:], weight.shape[2:], stride))
    summed = _convolution_backward(grid, images, weight, stride)
    # A graph was told empty_like's strides, and every layout of the result has its own.
    return summed if summed.stride() == grad_images.stride() else grad_images.copy_(summed)


def _convolution_backward(grid: Tensor, images: Tensor, weight: Tensor, stride: Sequence[int]) -> Tensor:
    """Return PyTorch's gradient of the images, which sums the patches that overlap, from that of the grid of tokens."""
    no_padding, no_dilation, wants_images_only = [0, 0], [1, 1], [True, False, False]
    gradients = torch.ops.aten.convolution_backward(
        grid, images, weight, None, stride, no_padding, no_dilation, False, no_padding, 1, wants_images_only
    )
    return gradients[0]


@torch.library.register_fake("fastvit::patch_embed", lib=_LIBRARY)
def _patch_embed_fake(
    images: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None, stride: Stride = None
) -> Tensor:
    return _allocate_tokens(images, weight, stride)


@torch.library.register_fake("fastvit::patch_embed_backward_weight", lib=_LIBRARY)
def _patch_embed_backward_weight_fake(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None, stride: Stride = None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=_layout(weight)), weight.new_empty(weight.shape[0])


@torch.library.register_fake("fastvit::patch_embed_backward_images", lib=_LIBRARY)
def _patch_embed_backward_images_fake(
    grad_output: Tensor, images: Tensor, weight: Tensor, backend: str | None, stride: Stride = None
) -> Tensor:
    return torch.empty_like(images)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The dispatcher leaves out a stride of None, the default.
    images, weight, bias, backend, *ctx.stride = inputs
    # The backward may run in another thread, which does not see this `fastvit.backend` block, or inside of another one.
    ctx.backend = requested_backend(backend) or AUTOMATIC
    ctx.has_bias = bias is not None
    ctx.save_for_backward(images, weight)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    images, weight = ctx.saved_tensors
    wants_images, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_images = grad_weight = grad_bias = None
    if wants_images:
        op = torch.ops.fastvit.patch_embed_backward_images
        grad_images = op(grad_output, images, weight, ctx.backend, *ctx.stride)
    if wants_weight or wants_bias:
        op = torch.ops.fastvit.patch_embed_backward_weight
        grad_weight, grad_bias = op(grad_output, images, weight, ctx.backend, *ctx.stride)
    return grad_images, grad_weight, grad_bias if ctx.has_bias else None, None, *[None] * len(ctx.stride)


def _refuse_double_backward(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError("fastvit patch_embed: the second derivative is not supported; use torch's own conv2d")


_OPS = torch.ops.fastvit
register_autograd(_LIBRARY, _OPS.patch_embed.default, _differentiate, _save_for_backward)
for _name in ("patch_embed_backward_weight", "patch_embed_backward_images"):
    register_autograd(_LIBRARY, getattr(_OPS, _name).default, _refuse_double_backward)
register_autocast(_LIBRARY, _OPS.patch_embed, "patch_embed")
register_patch_embed_batching(_LIBRARY)
