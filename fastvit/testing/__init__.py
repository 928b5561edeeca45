"""The tolerance rule and its cases: for our tests, for ``fastvit check``, and for other people's kernels and models."""

from fastvit.testing.attention import VIT_SEQLENS, AttentionCase, check_attention, vit_attention_cases
from fastvit.testing.model import check_model, compare_runs, livened
from fastvit.testing.patch_embed import PatchEmbedCase, check_patch_embed, vit_patch_embed_cases
from fastvit.testing.precision import ieee_float32
from fastvit.testing.rule import Comparison, assert_close, compare

__all__ = [
    "VIT_SEQLENS",
    "AttentionCase",
    "Comparison",
    "PatchEmbedCase",
    "assert_close",
    "check_attention",
    "check_model",
    "check_patch_embed",
    "compare",
    "compare_runs",
    "ieee_float32",
    "livened",
    "vit_attention_cases",
    "vit_patch_embed_cases",
]
