"""The public functions, each one torch op with many backends behind it."""

from __future__ import annotations

from fastvit.ops.attention import attention, attention_qkvpacked, scaled_dot_product_attention
from fastvit.ops.backends import backend
from fastvit.ops.patch_embed import patch_embed

__all__ = ["attention", "attention_qkvpacked", "backend", "patch_embed", "scaled_dot_product_attention"]
