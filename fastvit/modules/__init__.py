"""Drop-in modules: timm's constructors, parameters and state_dict keys, with the fused ops inside."""

from __future__ import annotations

from fastvit.modules.attention import Attention, FusedAttentionForward
from fastvit.modules.fused import FusedForward
from fastvit.modules.patch_embed import FusedPatchEmbedForward, PatchEmbed

__all__ = ["Attention", "FusedAttentionForward", "FusedForward", "FusedPatchEmbedForward", "PatchEmbed"]
