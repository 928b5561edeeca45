"""fastvit: make any PyTorch vision transformer faster by swapping two layers, and prove it computes the same thing."""

from __future__ import annotations

from fastvit.adapters import register_swap, register_transformers
from fastvit.ops import attention, attention_qkvpacked, backend, patch_embed, scaled_dot_product_attention
from fastvit.swap import SwapReport, swap, unswap
from fastvit.version import __version__

__all__ = [
    "SwapReport",
    "__version__",
    "attention",
    "attention_qkvpacked",
    "backend",
    "patch_embed",
    "register_swap",
    "register_transformers",
    "scaled_dot_product_attention",
    "swap",
    "unswap",
]
