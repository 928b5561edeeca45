"""timm's attention and patch embeddings with the fused ops inside; importing this module imports timm."""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import PatchEmbed, PatchEmbedWithSize

# timm.layers.Attention, by the name that older timm (0.9, 1.0.9) has too.
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.fused import has_hooks
from fastvit.modules.patch_embed import FusedPatchEmbedForward, arrange


class FusedAttention(FusedAttentionForward, Attention):
    """timm.layers.Attention after a swap."""

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, timm's own forward would run."""
        fallbacks = super().fastvit_fallbacks(module)
        if has_hooks(cast(nn.Module, module.attn_drop)) and module.fused_attn:
            fallbacks.append("timm calls attn_drop only with fused_attn off, so that hook stays silent")
        return fallbacks


class FusedPatchEmbed(FusedPatchEmbedForward, PatchEmbed):
    """timm.layers.PatchEmbed after a swap."""


class FusedPatchEmbedWithSize(FusedPatchEmbedForward, PatchEmbedWithSize):
    """timm.layers.PatchEmbedWithSize after a swap: tokens and the size of their grid."""

    def _fused_forward(self, images: Tensor) -> tuple[Tensor, torch.Size]:
        _, _, height, width = images.shape
        if self.img_size is not None:
            self._check_multiple(height, width)
        grid = self._embed_grid(images)
        return self.norm(arrange(grid, self._output_format(), images)), grid.shape[1:3]


register_swap(Attention, FusedAttention)
register_swap(PatchEmbed, FusedPatchEmbed)
register_swap(PatchEmbedWithSize, FusedPatchEmbedWithSize)
