"""timm's attention and patch embeddings with the fused ops inside; importing this module imports timm."""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import PatchEmbed, PatchEmbedWithSize
from timm.models.convit import MHSA
from timm.models.metaformer import Attention as MetaFormerAttention

# timm.layers.Attention, by the name that older timm (0.9, 1.0.9) has too.
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.fused import has_hooks
from fastvit.modules.patch_embed import FusedPatchEmbedForward, arrange


class TimmAttentionForward(FusedAttentionForward):
    """What timm's attentions share: with ``fused_attn`` on they never call attn_drop, so its hooks are silent there."""

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, timm's own forward would run."""
        fallbacks = super().fastvit_fallbacks(module)
        if has_hooks(cast(nn.Module, module.attn_drop)) and getattr(module, "fused_attn", False):
            fallbacks.append("timm calls attn_drop only with fused_attn off, so that hook stays silent")
        return fallbacks


class FusedAttention(TimmAttentionForward, Attention):
    """timm.layers.Attention after a swap."""


class FusedMetaFormerAttention(TimmAttentionForward, MetaFormerAttention):
    """timm.models.metaformer.Attention after a swap, of CAFormer."""


class FusedMHSA(TimmAttentionForward, MHSA):
    """timm.models.convit.MHSA after a swap; its convolution-like attention, GPSA, is left alone."""


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
register_swap(MetaFormerAttention, FusedMetaFormerAttention)
register_swap(MHSA, FusedMHSA)
register_swap(PatchEmbed, FusedPatchEmbed)
register_swap(PatchEmbedWithSize, FusedPatchEmbedWithSize)
