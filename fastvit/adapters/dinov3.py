"""The layers of the dinov3 repository with the fused ops inside; importing this module imports dinov3."""

from __future__ import annotations

from typing import Any, cast

from dinov3.layers.attention import CausalSelfAttention, SelfAttention
from dinov3.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.adapters.dino import PARTS, DinoPatchEmbedForward, ScaledAttentionForward
from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.fused import has_hooks


class FusedSelfAttention(FusedAttentionForward, SelfAttention):
    """dinov3.layers.attention.SelfAttention after a swap.

    Only ``compute_attention`` is replaced, which the class's own ``forward`` and ``forward_list`` call: the
    projections, LinearKMaskedBias and its mask among them, and their hooks run as they are. The class has an
    ``attn_drop`` that it never applies.
    """

    fastvit_parts = PARTS | {"attn_drop"}
    # Its scale is the one of torch's function.
    fused_attn = True
    forward = SelfAttention.forward  # type: ignore[assignment]

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = super().fastvit_obstacles(module)
        if "compute_attention" in module.__dict__:
            obstacles.append("its compute_attention was replaced on the instance")
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return what the report should say of this module; the plain forward never runs in its place."""
        drop = cast(nn.Dropout, module.attn_drop)
        notes = ["dinov3 never applies attn_drop"] if drop.p > 0 else []
        return [*notes, "dinov3 never calls attn_drop, so that hook stays silent"] if has_hooks(drop) else notes

    def compute_attention(self, qkv: Tensor, attn_bias: Any = None, rope: Any = None) -> Tensor:
        """Return the heads [B, N, dim] of a packed projection [B, N, 3 dim], its query and key rotated by ``rope``.

        Raises:
            AssertionError: ``attn_bias`` is not None, as in the plain class.
        """
        if attn_bias is not None:
            return cast(Tensor, SelfAttention.compute_attention(self, qkv, attn_bias=attn_bias, rope=rope))
        packed = qkv.unflatten(-1, (3, self.num_heads, -1))  # [B, N, 3, H, D]
        if rope is None:
            return self._attend_packed(packed).flatten(2)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        query, key = SelfAttention.apply_rope(self, query, key, rope)
        return self._attend(query, key, value).flatten(2)


class FusedCausalSelfAttention(ScaledAttentionForward, CausalSelfAttention):
    """dinov3.layers.attention.CausalSelfAttention after a swap."""

    def forward(self, x: Tensor, is_causal: bool = True) -> Tensor:  # type: ignore[override]
        """Return the attended tokens [B, N, dim] of x [B, N, dim]."""
        if reason := self._why_plain(None, is_causal):
            self._warn_fallback(reason)
            return cast(Tensor, CausalSelfAttention.forward(self, x, is_causal))
        return self._attended(x, is_causal)


class FusedPatchEmbed(DinoPatchEmbedForward, PatchEmbed):
    """dinov3.layers.patch_embed.PatchEmbed after a swap; pixels beyond the last whole patch are dropped, as there."""


register_swap(SelfAttention, FusedSelfAttention)
register_swap(CausalSelfAttention, FusedCausalSelfAttention)
register_swap(PatchEmbed, FusedPatchEmbed)
