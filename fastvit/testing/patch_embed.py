"""Patch embedding under the tolerance rule: cases that are reproducible from their fields, and the check of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit.ops as ops
from fastvit.testing.precision import ieee_float32
from fastvit.testing.rule import Comparison, compare, runs_of


@dataclass(frozen=True)
class PatchEmbedCase:
    """One patch-embedding problem, reproducible from its fields; ``layout`` is "nchw" or "nhwc" (channels_last).

    ``grid`` counts patches down and along; ``stride`` (None is the patch) and ``padding`` then make the images' size.
    """

    batch: int = 2
    in_channels: int = 3
    grid: tuple[int, int] = (14, 14)
    patch: tuple[int, int] = (16, 16)
    embed_dim: int = 192
    dtype: torch.dtype = torch.float32
    has_bias: bool = True
    layout: str = "nchw"
    seed: int = 0
    stride: tuple[int, int] | None = None
    padding: tuple[int, int] = (0, 0)

    @property
    def image_size(self) -> tuple[int, int]:
        """The height and width of the images, without their padding."""
        sides = zip(self.grid, self.patch, self.stride or self.patch, self.padding, strict=True)
        height, width = ((count - 1) * step + size - 2 * margin for count, size, step, margin in sides)
        return height, width

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
        """Return images, weight, bias and grad_output of this case."""
        generator = torch.Generator().manual_seed(self.seed)
        fan_in = self.in_channels * self.patch[0] * self.patch[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        images = normal(self.batch, self.in_channels, *self.image_size)
        if self.layout == "nhwc":
            images = images.contiguous(memory_format=torch.channels_last)
        return {
            "images": images,
            "weight": normal(self.embed_dim, self.in_channels, *self.patch) * fan_in**-0.5,
            "bias": normal(self.embed_dim) if self.has_bias else None,
            "grad_output": normal(self.batch, self.grid[0] * self.grid[1], self.embed_dim),
        }


@ieee_float32()
def check_patch_embed(
    case: PatchEmbedCase,
    backend: str | None = None,
    device: str | torch.device = "cpu",
    backward: bool = True,
) -> list[Comparison]:
    """Run one case forward (and backward) on ``backend`` and apply the rule to the tokens and each gradient.

    PyTorch's own implementations are Conv2d, and unfold + linear.
    """
    tensors, stride = case.tensors(device), case.stride or case.patch

    def ours(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.patch_embed(images, weight, bias, stride=case.stride, padding=case.padding, backend=backend)

    def theirs(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(images, weight, bias, stride, case.padding).flatten(2).transpose(1, 2)

    def unfolded(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        patches = F.unfold(images, case.patch, 1, case.padding, stride).transpose(1, 2)  # [B, N, C * Ph * Pw]
        return F.linear(patches, weight.flatten(1), bias)

    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    actual, expected = _run_patch_embed(ours, tensors, backward), _run_patch_embed(theirs, exact, backward)
    own = zip(*runs_of((theirs, unfolded), lambda peer: _run_patch_embed(peer, tensors, backward)), strict=True)
    names = ("output", "grad_images", "grad_weight", "grad_bias")
    return [compare(a, e, o, name) for name, a, e, o in zip(names, actual, expected, own, strict=False)]


def _run_patch_embed(
    function: Callable[..., Tensor], tensors: dict[str, Tensor | None], backward: bool
) -> list[Tensor]:
    given = [tensors[name] for name in ("images", "weight", "bias")]
    leaves = [tensor.detach().requires_grad_(backward) for tensor in given if tensor is not None]
    output = function(*leaves)
    if not backward:
        return [output.detach()]
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])]


def vit_patch_embed_cases(dtypes: Sequence[torch.dtype]) -> list[PatchEmbedCase]:
    """Return the patch embeddings of real vision transformers for each dtype, MViTv2's overlapping one among them."""
    cases = [
        PatchEmbedCase(patch=(16, 16)),
        PatchEmbedCase(patch=(16, 16), layout="nhwc"),
        PatchEmbedCase(patch=(14, 14), grid=(16, 16)),
        PatchEmbedCase(patch=(32, 32), grid=(7, 7), embed_dim=768, batch=1),
        PatchEmbedCase(patch=(8, 8), grid=(28, 28)),
        PatchEmbedCase(patch=(4, 4), grid=(56, 56), embed_dim=96, batch=1),
        PatchEmbedCase(patch=(14, 16), grid=(5, 7)),
        PatchEmbedCase(patch=(7, 7), grid=(56, 56), embed_dim=96, batch=1, stride=(4, 4), padding=(3, 3)),
    ]
    return [replace(case, dtype=dtype) for dtype in dtypes for case in cases]
