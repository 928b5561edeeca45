"""The reference Vision Transformer in plain torch, and the loader of its checkpoints."""

from __future__ import annotations

from fastvit.models.checkpoints import load_checkpoint
from fastvit.models.vit import (
    VARIANTS,
    Variant,
    VisionTransformer,
    create,
    vit_b8,
    vit_b16,
    vit_b32,
    vit_h14,
    vit_l16,
    vit_l32,
    vit_s16,
    vit_s32,
    vit_ti16,
)

__all__ = [
    "VARIANTS",
    "Variant",
    "VisionTransformer",
    "create",
    "load_checkpoint",
    "vit_b8",
    "vit_b16",
    "vit_b32",
    "vit_h14",
    "vit_l16",
    "vit_l32",
    "vit_s16",
    "vit_s32",
    "vit_ti16",
]
