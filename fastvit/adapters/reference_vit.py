"""The reference ViT's two layers with the fused ops inside."""

from __future__ import annotations

from torch import Tensor

from fastvit.adapters import register_swap
from fastvit.models import vit
from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.patch_embed import FusedPatchEmbedForward


class FusedAttention(FusedAttentionForward, vit.Attention):
    """fastvit.models.vit.Attention after a swap."""


class FusedPatchEmbed(FusedPatchEmbedForward, vit.PatchEmbed):
    """fastvit.models.vit.PatchEmbed after a swap."""

    def _fused_forward(self, images: Tensor) -> Tensor:
        self.check_images(images)
        return self._embed_grid(images).flatten(1, 2)


register_swap(vit.Attention, FusedAttention)
register_swap(vit.PatchEmbed, FusedPatchEmbed)
