"""Patch embedding as the paper writes it: cut the image into patches, flatten each, multiply by E and add the bias.

Source: Dosovitskiy et al. 2021, equation 1. With X [B·N, C·Ph·Pw] the flattened patches and W [D, C·Ph·Pw] the weight:
Y = X Wᵀ + b; dW = dYᵀ X; db = column sums of dY; dX = dY W. Computed one type wider than the
inputs, as a specification should be.
"""

from __future__ import annotations

from torch import Tensor

from fastvit.kernels.reference.precision import wider


def _patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    grid = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    return wider(patches)  # [B, N, C·Ph·Pw]


def patch_embed_forward(images: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Write the tokens [B, N, D] of ``images`` [B, C, H, W] under ``weight`` [D, C, Ph, Pw] to ``output``."""
    patches = _patches(images, (weight.shape[2], weight.shape[3]))
    tokens = patches @ wider(weight).flatten(1).T
    output.copy_(tokens if bias is None else tokens + wider(bias))


def patch_embed_backward_weight(
    grad_output: Tensor, images: Tensor, grad_weight: Tensor, grad_bias: Tensor | None
) -> None:
    """Write the gradients of the weight [D, C, Ph, Pw] and, unless it is None, of the bias [D]."""
    patches = _patches(images, (grad_weight.shape[2], grad_weight.shape[3])).flatten(0, 1)
    grad_tokens = wider(grad_output).flatten(0, 1)
    grad_weight.copy_((grad_tokens.T @ patches).view(grad_weight.shape))
    if grad_bias is not None:
        grad_bias.copy_(grad_tokens.sum(dim=0))


def patch_embed_backward_images(grad_output: Tensor, weight: Tensor, grad_images: Tensor) -> None:
    """Write the gradient of the images [B, C, H, W]; patches do not overlap, so every pixel is written once."""
    batch, channels, height, width = grad_images.shape
    patch_height, patch_width = weight.shape[2:]
    rows, columns = height // patch_height, width // patch_width
    patches = wider(grad_output) @ wider(weight).flatten(1)
    grid = patches.view(batch, rows, columns, channels, patch_height, patch_width)
    grad_images.copy_(grid.permute(0, 3, 1, 4, 2, 5).reshape(grad_images.shape))
