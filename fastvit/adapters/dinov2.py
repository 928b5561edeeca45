"""The layers of the dinov2 repository with the fused ops inside; importing this module imports dinov2."""

from __future__ import annotations

from typing import Any, cast

from dinov2.layers import attention as dinov2_attention
from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.patch_embed import PatchEmbed
from torch import Tensor

from fastvit.adapters import register_swap
from fastvit.adapters.dino import DinoPatchEmbedForward, ScaledAttentionForward


class FusedAttention(ScaledAttentionForward, Attention):
    """dinov2.layers.attention.Attention after a swap."""

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:  # type: ignore[override]
        """Return the attended tokens [B, N, dim] of x [B, N, dim]."""
        if reason := self._why_plain(None, is_causal):
            self._warn_fallback(reason)
            return cast(Tensor, Attention.forward(self, x, is_causal))
        return self._attended(x, is_causal)


class FusedMemEffAttention(ScaledAttentionForward, MemEffAttention):
    """dinov2.layers.attention.MemEffAttention after a swap; nested lists of images run the repository's own forward."""

    def forward(self, x: Tensor, attn_bias: Any = None) -> Tensor:  # type: ignore[override]
        """Return the attended tokens.

        Args:
            x: [B, N, dim].
            attn_bias: None, or a mask of xformers, as nested lists of images come with: not fused.

        Returns:
            [B, N, dim].
        """
        if attn_bias is not None:
            reason: str | None = "nested lists come with a mask of xformers, which has no kernel yet"
        elif dinov2_attention.XFORMERS_AVAILABLE:
            # That path of the repository has no dropout of attention weights, whatever attn_drop says.
            reason = None
        else:
            reason = self._why_plain(None, False)
        if reason:
            self._warn_fallback(reason)
            return cast(Tensor, MemEffAttention.forward(self, x, attn_bias))
        return self._attended(x, False)


class FusedPatchEmbed(DinoPatchEmbedForward, PatchEmbed):
    """dinov2.layers.patch_embed.PatchEmbed after a swap."""

    def _fused_forward(self, images: Tensor) -> Tensor:
        self._check_multiple(*images.shape[2:])
        return super()._fused_forward(images)


register_swap(Attention, FusedAttention)
register_swap(MemEffAttention, FusedMemEffAttention)
register_swap(PatchEmbed, FusedPatchEmbed)
