"""open_clip's own attention with the fused op inside; importing this module imports open_clip.

Its other blocks hold torch.nn.MultiheadAttention, which has an adapter of its own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import Attention
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.modules.attention import FusedAttentionForward, is_no_op

PROJECTIONS = frozenset({"in_proj_weight", "in_proj_bias", "out_proj", "out_drop", "attn_drop"})
PARTS = PROJECTIONS | {"ln_q", "ln_k", "ln_inner", "logit_scale", "head_scale"}


class FusedAttention(FusedAttentionForward, Attention):
    """open_clip.transformer.Attention after a swap."""

    fastvit_parts = PARTS
    # Its scale and its dropout are those of torch's function, which takes both from the module around it.
    fused_attn = True
    fastvit_needs = ("in_proj_weight", "out_proj", "num_heads", "head_dim")
    in_proj_weight: Any
    in_proj_bias: Any
    ln_q: Any
    ln_k: Any
    head_scale: Any
    ln_inner: Any
    out_proj: Any
    out_drop: Any

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = super().fastvit_obstacles(module)
        if getattr(module, "logit_scale", None) is not None:
            obstacles.append("scaled cosine attention: open_clip's own forward raises (torch.bmm of four dimensions)")
        elif not getattr(module, "use_fsdpa", True):
            obstacles.append("use_fsdpa is off: open_clip's own forward raises (torch.bmm of four dimensions)")
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, open_clip's own forward would run."""
        fallbacks = super().fastvit_fallbacks(module)
        if any("hook on attn_drop" in reason for reason in fallbacks):
            fallbacks.append("open_clip never calls attn_drop, so that hook stays silent")
        return fallbacks

    def _why_here(self, attn_mask: Tensor | None) -> str | None:
        if self.logit_scale is not None or not self.use_fsdpa:
            return "scaled cosine attention and use_fsdpa=False are not fused"
        return self._why_plain(attn_mask, False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the attended tokens.

        Args:
            x: [B, N, dim].
            attn_mask: None, [N, N], [B, H, N, N] or [B·H, N, N]: bool (True = blocked, unlike torch's) or additive.

        Returns:
            [B, N, dim].
        """
        if reason := self._why_here(attn_mask):
            self._warn_fallback(reason)
            return cast(Tensor, Attention.forward(self, x, attn_mask))
        batch, seqlen, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.reshape(batch, seqlen, 3, self.num_heads, self.head_dim)
        bias = None if attn_mask is None else self._as_bias(attn_mask, qkv)
        if is_no_op(self.ln_q) and is_no_op(self.ln_k):
            heads = self._attend_packed(qkv, bias)
        else:
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
            heads = self._attend(self.ln_q(query), self.ln_k(key), value, bias)
        if self.head_scale is not None:
            heads = heads * self.head_scale.transpose(0, 1)  # [1, H, 1]: the heads here are [B, N, H, D]
        return cast(Tensor, self.out_drop(self.out_proj(self.ln_inner(heads.flatten(2)))))

    def _as_bias(self, attn_mask: Tensor, qkv: Tensor) -> Tensor:
        batch, seqlen = qkv.shape[:2]
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, self.num_heads, seqlen, seqlen)
        return ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(qkv.dtype)


register_swap(Attention, FusedAttention)
