"""The specification: both ops as the papers write them, in plain torch, any floating dtype, any device."""

from __future__ import annotations

from fastvit.kernels.reference.attention import attention_backward, attention_forward
from fastvit.kernels.reference.patch_embed import (
    patch_embed_backward_images,
    patch_embed_backward_weight,
    patch_embed_forward,
)
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec

__all__ = [
    "attention_backward",
    "attention_forward",
    "attention_why_not",
    "patch_embed_backward_images",
    "patch_embed_backward_weight",
    "patch_embed_forward",
    "patch_embed_why_not",
]


def attention_why_not(spec: AttentionSpec) -> list[str]:
    """Return no reasons: the specification runs everything that the op accepts."""
    return []


def patch_embed_why_not(spec: PatchEmbedSpec) -> list[str]:
    """Return no reasons: the specification runs everything that the op accepts."""
    return []
