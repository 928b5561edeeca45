"""timm's patch embeddings whose patches overlap, with the fused op inside; importing this module imports timm."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from timm.models.hieradet_sam2 import HieraPatchEmbed
from timm.models.mvitv2 import PatchEmbed as MViTv2PatchEmbed
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.kernels.spec import PatchEmbedSpec
from fastvit.modules.fused import FusedForward, own_obstacles
from fastvit.modules.patch_embed import embed_grid, why_call


class FusedOverlappingForward(FusedForward):
    """The fused forward of a class with ``proj``, a Conv2d of any stride and padding, and little else.

    ``proj``'s own Parameters are read at each call and ``proj`` itself is not called. Where that would lose something
    (a hook on ``proj``, another module in its place) the plain class's own forward runs.
    """

    fastvit_kind = "patch embedding"
    fastvit_children: ClassVar[frozenset[str]] = frozenset({"proj"})
    proj: Any

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = own_obstacles(module, cls.fastvit_children)
        obstacles += [f"it lacks {name}" for name in sorted(cls.fastvit_children) if name not in module._modules]
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        reason = why_call(cast(nn.Module, module.proj), overlaps=True)
        return [f"{reason}: runs the plain forward"] if reason else []

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> PatchEmbedSpec | None:
        """Return an image of 14×14 patches."""
        if not isinstance(proj := module.proj, nn.Conv2d):
            return None
        kernel, stride = proj.kernel_size, (proj.stride[0], proj.stride[1])
        height, width = (13 * step + size for step, size in zip(stride, kernel, strict=True))
        sizes = (1, proj.in_channels, height, width, kernel[0], kernel[1], proj.out_channels)
        return PatchEmbedSpec(*sizes, dtype, device, None if stride == kernel else stride)

    def _embed_grid(self, images: Tensor) -> Tensor:
        proj = self.proj
        padding = (0, 0) if proj.padding == "valid" else proj.padding
        return embed_grid(images, proj.weight, proj.bias, self._fastvit_backend, proj.stride, padding)


class FusedMViTv2PatchEmbed(FusedOverlappingForward, MViTv2PatchEmbed):
    """timm.models.mvitv2.PatchEmbed after a swap: a 7×7 convolution of stride 4, tokens and the size of their grid."""

    def forward(self, x: Tensor) -> tuple[Tensor, torch.Size]:  # type: ignore[override]  # timm says a list, and returns this
        """Return the tokens of the images and their grid.

        Args:
            x: [B, C, H, W], NCHW or channels_last, the weights' dtype or, under autocast, any floating dtype.

        Returns:
            [B, N, D] and (rows, columns).
        """
        if reason := why_call(self.proj, overlaps=True):
            self._warn_fallback(reason)
            return super().forward(x)  # type: ignore[return-value]  # as above
        grid = self._embed_grid(x)
        return grid.flatten(1, 2), grid.shape[1:3]


class FusedHieraPatchEmbed(FusedOverlappingForward, HieraPatchEmbed):
    """timm.models.hieradet_sam2.HieraPatchEmbed after a swap: a 7×7 convolution of stride 4, the grid of its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the grid of tokens.

        Args:
            x: [B, C, H, W], NCHW or channels_last, the weights' dtype or, under autocast, any floating dtype.

        Returns:
            [B, rows, columns, D].
        """
        if reason := why_call(self.proj, overlaps=True):
            self._warn_fallback(reason)
            return super().forward(x)
        return self._embed_grid(x)


register_swap(MViTv2PatchEmbed, FusedMViTv2PatchEmbed)
register_swap(HieraPatchEmbed, FusedHieraPatchEmbed)
