"""The layers of the dinov2 repository with the fused ops inside; importing this module imports dinov2."""

from __future__ import annotations

from typing import Any, cast

from dinov2.layers import attention as dinov2_attention
from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.patch_embed import FusedPatchEmbedForward

PARTS = frozenset({"qkv", "proj", "proj_drop"})


class ScaledAttentionForward(FusedAttentionForward):
    """A self-attention whose ``attn_drop`` is a probability and no module, as torch's function takes it."""

    fastvit_parts = PARTS
    # These classes have a `scale` and leave it to torch's function, which takes 1/sqrt(head_dim).
    fused_attn = True
    attn_drop: Any

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the repository's own forward would run."""
        probability = cast(float, module.attn_drop)
        return [f"attn_drop p={probability:g} runs the plain forward in training"] if probability > 0 else []

    def _why_plain(self, attn_mask: Tensor | None, is_causal: bool) -> str | None:
        if self.training and self.attn_drop > 0:
            return f"attention dropout (p={self.attn_drop:g}) has no kernel yet"
        return super()._why_plain(attn_mask, is_causal)

    def _attended(self, x: Tensor, is_causal: bool) -> Tensor:
        batch, seqlen, _ = x.shape
        qkv = self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, self.fastvit_head_dim(self))
        return self._finish(self._attend_projected(qkv, None, is_causal))


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


class FusedPatchEmbed(FusedPatchEmbedForward, PatchEmbed):
    """dinov2.layers.patch_embed.PatchEmbed after a swap."""

    flatten_embedding: bool

    def _fused_forward(self, images: Tensor) -> Tensor:
        self._check_multiple(*images.shape[2:])
        grid = self._embed_grid(images)  # [B, rows, columns, D]
        tokens = self.norm(grid.flatten(1, 2))
        return cast(Tensor, tokens if self.flatten_embedding else tokens.unflatten(1, grid.shape[1:3]))


register_swap(Attention, FusedAttention)
register_swap(MemEffAttention, FusedMemEffAttention)
register_swap(PatchEmbed, FusedPatchEmbed)
