"""What the layers of the dinov2 and dinov3 repositories have in common; nothing here imports either."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from fastvit.modules.attention import FusedAttentionForward
from fastvit.modules.patch_embed import FusedPatchEmbedForward

PARTS = frozenset({"qkv", "proj", "proj_drop"})


class ScaledAttentionForward(FusedAttentionForward):
    """A self-attention whose ``attn_drop`` is a probability and no module, as torch's function takes it."""

    fastvit_parts = PARTS
    # These classes have a `scale` and leave it to torch's function, which takes 1/sqrt(head_dim).
    fused_attn = True
    attn_drop: Any

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the repository's own forward would run."""
        probability = cast(float, module.attn_drop)
        return [f"attn_drop p={probability:g} runs the plain forward in training"] if probability > 0 else []

    def _why_plain(self, attn_mask: Tensor | None, is_causal: bool) -> str | None:
        if self.training and self.attn_drop > 0:
            return f"attention dropout (p={self.attn_drop:g}) has no kernel yet"
        return super()._why_plain(attn_mask, is_causal)

    def _attended(self, x: Tensor, is_causal: bool) -> Tensor:
        return self._finish(self._attend_projected(self._packed(x), None, is_causal))


class DinoPatchEmbedForward(FusedPatchEmbedForward):
    """A patch embedding that gives tokens, or their grid [B, rows, columns, D] without ``flatten_embedding``."""

    flatten_embedding: bool

    def _fused_forward(self, images: Tensor) -> Tensor:
        grid = self._embed_grid(images)  # [B, rows, columns, D]
        tokens = self.norm(grid.flatten(1, 2))
        return cast(Tensor, tokens if self.flatten_embedding else tokens.unflatten(1, grid.shape[1:3]))
