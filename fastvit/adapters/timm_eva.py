"""timm's EVA, rotary and BEiT attentions with the fused ops inside; importing this module imports timm."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from fastvit.adapters import register_swap
from fastvit.adapters.timm_vit import TimmAttentionForward
from fastvit.modules.attention import CHILDREN, FusedAttentionForward
from fastvit.modules.fused import has_hooks

SPLIT_BIAS = frozenset({"q_bias", "k_bias", "v_bias"})


class SplitBiasForward(TimmAttentionForward):
    """A packed projection whose bias is put together from q_bias, k_bias (a buffer of zeros) and v_bias."""

    fastvit_parts = CHILDREN | SPLIT_BIAS
    q_bias: Any
    k_bias: Any
    v_bias: Any
    qkv_bias_separate: bool

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, timm's own forward would run."""
        fallbacks = super().fastvit_fallbacks(module)
        qkv = module._modules.get("qkv")
        separate = getattr(module, "qkv_bias_separate", False)
        if qkv is not None and has_hooks(qkv) and module.q_bias is not None and not separate:
            fallbacks.append("timm reads qkv.weight here without calling qkv, so that hook stays silent")
        return fallbacks

    def _packed(self, x: Tensor) -> Tensor:
        """Return [B, N, 3, H, D]; like timm, call ``qkv`` only where its bias is none or added on its own."""
        if self.q_bias is None:
            qkv = self.qkv(x)
        else:
            bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
            if getattr(self, "qkv_bias_separate", False):
                qkv = self.qkv(x)
                # In place, because under autocast a sum would be wider than the projection.
                qkv += bias
            else:
                qkv = F.linear(x, self.qkv.weight, bias)
        batch, seqlen, _ = x.shape
        return cast(Tensor, qkv.reshape(batch, seqlen, 3, self.num_heads, self.fastvit_head_dim(self)))


class RotaryForward(TimmAttentionForward):
    """A self-attention that rotates the query and key of all but the prefix tokens before it attends."""

    fastvit_parts = CHILDREN | {"q_proj", "k_proj", "v_proj"}
    fastvit_needs = ("proj", "num_heads", "head_dim", "num_prefix_tokens")
    num_prefix_tokens: int
    q_proj: Any
    k_proj: Any
    v_proj: Any

    def _packed(self, x: Tensor) -> Tensor:
        batch, seqlen, _ = x.shape
        return cast(Tensor, self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, self.head_dim))

    def _separate(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, seqlen, _ = x.shape
        # Fewer heads in key and value: grouped queries.
        groups: int = getattr(self, "num_kv_groups", 1)
        heads = (self.num_heads, self.num_heads // groups, self.num_heads // groups)
        query, key, value = (
            proj(x).reshape(batch, seqlen, count, self.head_dim).transpose(1, 2)
            for proj, count in zip((self.q_proj, self.k_proj, self.v_proj), heads, strict=True)
        )
        return query, key, value

    def _rotate(self, tokens: Tensor, rope: Tensor, dtype: torch.dtype) -> Tensor:
        prefix = self.num_prefix_tokens
        half = {"half": True} if getattr(self, "rotate_half", False) else {}
        rotated = apply_rot_embed_cat(tokens[:, :, prefix:], rope, **half)
        # A float32 rope makes 16-bit queries wider than the value; the prefix tokens are left as they are.
        return torch.cat((tokens[:, :, :prefix], rotated), dim=2).to(dtype)

    def _heads(self, x: Tensor, rope: Tensor | None, bias: Tensor | None, is_causal: bool) -> Tensor:
        """Return the attended heads [B, N, H, D]."""
        if self.qkv is not None:
            qkv = self._packed(x)
            if rope is None:
                return self._attend_projected(qkv, bias, is_causal)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        else:
            query, key, value = self._separate(x)
        query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = self._rotate(query, rope, value.dtype), self._rotate(key, rope, value.dtype)
        if (groups := getattr(self, "num_kv_groups", 1)) > 1:
            # The op has one key for each query head, so grouped keys and values are repeated, as in timm.
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return self._attend(query, key, value, bias, is_causal)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the attended tokens.

        Args:
            x: [B, N, dim].
            rope: None, or sines and cosines [..., N - num_prefix_tokens, 2 head_dim], applied outside the kernel.
            attn_mask, is_causal: as in :class:`FusedAttentionForward`.

        Returns:
            [B, N, dim_out].
        """
        if reason := self._why_plain(attn_mask, is_causal):
            self._warn_fallback(reason)
            causal = {} if is_causal is False else {"is_causal": is_causal}
            # Past FusedAttentionForward, whose forward has no rope, to timm's own.
            plain: Any = super(FusedAttentionForward, self)
            return cast(Tensor, plain.forward(x, rope=rope, attn_mask=attn_mask, **causal))
        gate = self._gate(x)
        return self._finish(self._heads(x, rope, attn_mask, is_causal), gate)


class FusedEvaAttention(SplitBiasForward, RotaryForward, EvaAttention):
    """timm.models.eva.EvaAttention after a swap."""

    fastvit_parts = SplitBiasForward.fastvit_parts | RotaryForward.fastvit_parts


class FusedAttentionRope(RotaryForward, AttentionRope):
    """timm.layers.AttentionRope after a swap."""


class FusedBeitAttention(SplitBiasForward, BeitAttention):
    """timm.models.beit.Attention after a swap: its relative position bias is handed to the op as [1, H, N, N].

    The op has no gradient of the bias yet, so while gradients are recorded and the table (or the shared bias) wants
    one, timm's own forward runs.
    """

    fastvit_parts = SplitBiasForward.fastvit_parts | {"relative_position_bias_table", "relative_position_index"}

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, timm's own forward would run."""
        fallbacks = super().fastvit_fallbacks(module)
        table = cast(Tensor | None, module.relative_position_bias_table)
        if table is not None and table.requires_grad:
            fallbacks.append("relative_position_bias_table requires grad: runs the plain forward with gradients on")
        return fallbacks

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return the attended tokens.

        Args:
            x: [B, N, dim].
            shared_rel_pos_bias: None, or broadcasts to [B, H, N, N] and is added to the module's own bias.

        Returns:
            [B, N, dim].
        """
        biases = (self.relative_position_bias_table, shared_rel_pos_bias)
        # In a symbolic trace they are proxies, which cannot say; there the op itself raises if a gradient is wanted.
        if torch.is_grad_enabled() and any(isinstance(bias, Tensor) and bias.requires_grad for bias in biases):
            reason: str | None = "the relative position bias requires grad, which has no kernel yet"
        else:
            reason = self._why_plain(None, False)
        if reason:
            self._warn_fallback(reason)
            return BeitAttention.forward(self, x, shared_rel_pos_bias)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias()
            bias = bias if shared_rel_pos_bias is None else bias + shared_rel_pos_bias
        return self._finish(self._attend_projected(self._packed(x), bias, False))


register_swap(EvaAttention, FusedEvaAttention)
register_swap(AttentionRope, FusedAttentionRope)
register_swap(BeitAttention, FusedBeitAttention)
