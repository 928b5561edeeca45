"""timm's attentions with few queries, or without projections, around the fused op; importing this imports timm."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import AttentionPoolLatent
from timm.models.cait import ClassAttn
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.adapters.timm_vit import TimmAttentionForward
from fastvit.kernels.spec import AttentionSpec
from fastvit.modules.attention import FusedAttentionForward

LATENT_PARTS = frozenset({"latent", "pos_embed", "q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp"})
CLASS_PARTS = frozenset({"q", "k", "v", "attn_drop", "proj", "proj_drop"})


class FusedAttentionPoolLatent(FusedAttentionForward, AttentionPoolLatent):
    """timm.layers.AttentionPoolLatent after a swap: a few learned queries look at all tokens."""

    fastvit_parts = LATENT_PARTS
    fastvit_needs = ("latent", "q", "kv", "proj", "num_heads", "head_dim")
    # timm's methods and attributes that the forward uses.
    latent: Any
    pos_embed: Any
    q: Any
    kv: Any
    mlp: Any
    pool: str

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        """Return the latent's look at 14×14 patches."""
        heads, head_dim = cast(int, module.num_heads), cast(int, module.head_dim)
        latents = cast(Tensor, module.latent).shape[1]
        return AttentionSpec(1, heads, latents, 196, head_dim, head_dim, dtype, None, False, device)

    def _why_not_latent(self, attn_mask: Tensor | None) -> str | None:
        if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool and not self.fused_attn:
            return "fused_attn is off, where timm adds a bool mask to the scores as 0 and 1"
        return self._why_plain(attn_mask, False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the pooled tokens.

        Args:
            x: [B, N, in_features].
            attn_mask: None, or broadcasts to [B, H, latent_len, N].

        Returns:
            [B, out_features], or [B, latent_len, out_features] with a pool_type of neither token nor avg.
        """
        if reason := self._why_not_latent(attn_mask):
            self._warn_fallback(reason)
            return cast(Tensor, AttentionPoolLatent.forward(self, x, attn_mask))
        batch, seqlen, _ = x.shape
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        query = self.q(self.latent.expand(batch, -1, -1))
        query = query.reshape(batch, self.latent.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
        key, value = (
            self.kv(x).reshape(batch, seqlen, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        )
        query, key = self.q_norm(query), self.k_norm(key)
        heads = self._attend(query, key, value, attn_mask)
        # Here `norm` belongs to the mlp, unlike in the other attentions.
        x = self.proj_drop(self.proj(heads.flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        if self.pool == "token":
            return x[:, 0]
        return x.mean(1) if self.pool == "avg" else x


class FusedClassAttn(TimmAttentionForward, ClassAttn):
    """timm.models.cait.ClassAttn after a swap: the class token alone looks at all tokens."""

    fastvit_parts = CLASS_PARTS
    fastvit_needs = ("q", "k", "v", "proj", "num_heads")
    q: Any
    k: Any
    v: Any

    @classmethod
    def fastvit_head_dim(cls, module: nn.Module) -> int:
        """Return the width of one head."""
        return cast(nn.Linear, module.proj).in_features // cast(int, module.num_heads)

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        """Return the class token's look at itself and 14×14 patches."""
        heads, head_dim = cast(int, module.num_heads), cls.fastvit_head_dim(module)
        return AttentionSpec(1, heads, 1, 197, head_dim, head_dim, dtype, None, False, device)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the class token [B, 1, dim], attending to all tokens x [B, N, dim], itself the first of them."""
        if reason := self._why_plain(None, False):
            self._warn_fallback(reason)
            return cast(Tensor, ClassAttn.forward(self, x))
        batch, seqlen, dim = x.shape
        split = (self.num_heads, dim // self.num_heads)
        query = self.q(x[:, 0]).reshape(batch, 1, *split).transpose(1, 2)
        key, value = (part(x).reshape(batch, seqlen, *split).transpose(1, 2) for part in (self.k, self.v))
        heads = self._attend(query, key, value)
        return cast(Tensor, self.proj_drop(self.proj(heads.flatten(2))))


register_swap(AttentionPoolLatent, FusedAttentionPoolLatent)
register_swap(ClassAttn, FusedClassAttn)
