"""Patch embedding as the paper writes it: cut the image into patches, flatten each, multiply by E and add the bias.

Source: Dosovitskiy et al. 2021, equation 1. With X [B·N, C·Ph·Pw] the flattened patches and W [D, C·Ph·Pw] the weight:
Y = X Wᵀ + b; dW = dYᵀ X; db = column sums of dY; dX = dY W. A stride is the distance between patches, (down, right);
None is the patch itself. Computed one type wider than the inputs, as a specification should be.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvit.kernels.reference.precision import wider


def _patches(images: Tensor, patch: Sequence[int], stride: Sequence[int] | None) -> Tensor:
    down, right = patch if stride is None else stride
    windows = images.unfold(2, patch[0], down).unfold(3, patch[1], right)  # [B, C, rows, columns, Ph, Pw]
    return wider(windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))  # [B, N, C·Ph·Pw]


def patch_embed_forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, stride: Sequence[int] | None = None
) -> None:
    """Write the tokens [B, N, D] of ``images`` [B, C, H, W] under ``weight`` [D, C, Ph, Pw] to ``output``."""
    patches = _patches(images, weight.shape[2:], stride)
    tokens = patches @ wider(weight).flatten(1).T
    output.copy_(tokens if bias is None else tokens + wider(bias))


def patch_embed_backward_weight(
    grad_output: Tensor,
    images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: Sequence[int] | None = None,
) -> None:
    """Write the gradients of the weight [D, C, Ph, Pw] and, unless it is None, of the bias [D]."""
    patches = _patches(images, grad_weight.shape[2:], stride).flatten(0, 1)
    grad_tokens = wider(grad_output).flatten(0, 1)
    grad_weight.copy_((grad_tokens.T @ patches).view(grad_weight.shape))
    if grad_bias is not None:
        grad_bias.copy_(grad_tokens.sum(dim=0))


def patch_embed_backward_images(grad_output: Tensor, weight: Tensor, grad_images: Tensor) -> None:
    """Write the gradient of the images [B, C, H, W], which the patches tile: every pixel is written once."""
    batch, channels, height, width = grad_images.shape
    patch_height, patch_width = weight.shape[2:]
    rows, columns = height // patch_height, width // patch_width
    patches = wider(grad_output) @ wider(weight).flatten(1)
    grid = patches.view(batch, rows, columns, channels, patch_height, patch_width)
    grad_images.copy_(grid.permute(0, 3, 1, 4, 2, 5).reshape(grad_images.shape))
