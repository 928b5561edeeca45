"""torch.nn's own layers with the fused ops inside: attention, the encoder layer around it, and bare patch convolutions.

nn.TransformerDecoderLayer, nn.TransformerEncoder and nn.Transformer call their attentions in every mode, so these need
no class of their own: the nn.MultiheadAttention modules inside are swapped.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.adapters import register_swap, runs_fused
from fastvit.kernels.spec import PatchEmbedSpec
from fastvit.modules.fused import FusedForward, own_obstacles
from fastvit.modules.multihead_attention import FusedMultiheadAttention
from fastvit.modules.patch_embed import embed_grid
from fastvit.ops.checks import FLOATING

# A patch embedding without a module of its own is a convolution that steps by its kernel; 2×2 ones shrink feature maps.
SMALLEST_PATCH = 4
# Images have a few channels (3, multispectral ones a dozen); what has more is a feature map, and its convolution is one
# that reduces keys and values or downsamples, for which the kernels were neither made nor measured.
MOST_CHANNELS = 16


class FusedTransformerEncoderLayer(FusedForward, nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer after a swap: it calls ``self_attn`` in inference too.

    torch's forward hands the whole layer to one native op in eval without gradients, reading the weights of
    ``self_attn`` and never calling it. This one is the computation that torch runs in every other mode, so whatever
    replaces or adapts a child (peft's LoRA) counts in inference too, where torch's path passes it by.
    """

    fastvit_kind = "encoder layer"
    fastvit_container = True
    fastvit_around: ClassVar[str] = "the encoder layer around it is left alone and may bypass it in inference"

    @classmethod
    def fastvit_derives(cls, kind: type[nn.Module]) -> bool:
        """Return whether a subclass computes what torch's class does: it changes none of these three methods."""
        methods = ("forward", "_sa_block", "_ff_block")
        return all(getattr(kind, name) is getattr(nn.TransformerEncoderLayer, name) for name in methods)

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` would gain nothing or cannot take this forward; empty means that it can.

        Whatever ``self_attn`` is, it is called; but where nothing in it runs fused there is nothing to gain.
        """
        if obstacles := own_obstacles(module):
            return obstacles
        if obstacles := [f"its {name} was replaced" for name in ("_sa_block", "_ff_block") if name in vars(module)]:
            return obstacles
        attention = module._modules.get("self_attn")
        if attention is None or not any(runs_fused(child) for child in attention.modules()):
            kind = type(attention)
            return [f"nothing in its self_attn, a {kind.__module__}.{kind.__qualname__}, can run fused"]
        return []

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return what a reader of the report should know: which path of torch's is off."""
        return ["calls self_attn in inference too, where torch's own path would bypass it"]

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: the ops belong to ``self_attn``, which has a row of its own."""
        return

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Return the tokens after attention and feed-forward, each with its residual; arguments are torch's.

        Source: Xiong et al. 2020, figure 1: norms behind the residuals, or before the blocks with ``norm_first``.
        """
        # As torch's own forward does first: what self_attn is given, or a hook on it, is additive.
        src_key_padding_mask = _additive_mask("src_key_padding_mask", src_key_padding_mask, src, src_mask)
        src_mask = _additive_mask("src_mask", src_mask, src)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
        return cast(Tensor, self.norm2(src + self._ff_block(src)))


@torch.fx.wrap
def _additive_mask(name: str, mask: Tensor | None, src: Tensor, other: Tensor | None = None) -> Tensor | None:
    """Return a mask with -inf where it was True, else as it is; torch warns if ``other`` has another dtype."""
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=None if other is None else other.dtype,
        other_name="src_mask",
        target_type=src.dtype,
    )


@torch.fx.wrap
def _convolve(images: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None) -> Tensor:
    """Return what conv2d does, [B, D, rows, columns] (or [D, rows, columns]), as a view of the tokens."""
    if images.dim() == 3:
        return embed_grid(images[None], weight, bias, backend)[0].permute(2, 0, 1)
    return embed_grid(images, weight, bias, backend).permute(0, 3, 1, 2)


class FusedPatchConv2d(FusedForward, nn.Conv2d):
    """A torch.nn.Conv2d that cuts images into patches, after a swap.

    The result has conv2d's shape and values and the memory of tokens (channels_last), so that the
    ``flatten(2).transpose(1, 2)`` that follows is a view.
    """

    fastvit_kind = "patch embedding"

    @classmethod
    def fastvit_recognises(cls, module: nn.Module) -> bool:
        """Return whether this convolution steps by its kernel over whole patches; no other has a row in the report."""
        conv = cast(nn.Conv2d, module)
        is_patching = conv.stride == conv.kernel_size and min(conv.kernel_size) >= SMALLEST_PATCH
        return is_patching and conv.padding in ((0, 0), "valid") and conv.groups == 1

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        conv = cast(nn.Conv2d, module)
        obstacles = own_obstacles(conv, frozenset({"weight", "bias"}))
        if conv.in_channels > MOST_CHANNELS:
            obstacles.append(f"{conv.in_channels} channels are a feature map, no image: at most {MOST_CHANNELS}")
        if getattr(conv, "weight", None) is not None and conv.weight.dtype not in FLOATING:
            obstacles.append(f"weights of {conv.weight.dtype}")
        if reason := _why_no_patches(conv):
            obstacles.append(reason)
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        reason = _why_no_patches(cast(nn.Conv2d, module))
        return [f"{reason}: runs the plain forward"] if reason else []

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> PatchEmbedSpec:
        """Return an image of 14×14 patches."""
        conv = cast(nn.Conv2d, module)
        rows, columns = conv.kernel_size
        size = (14 * rows, 14 * columns, rows, columns)
        return PatchEmbedSpec(1, conv.in_channels, *size, conv.out_channels, dtype, device)

    def forward(self, input: Tensor) -> Tensor:
        """Return the grid of tokens.

        Args:
            input: [B, C, H, W] or [C, H, W]; like conv2d, pixels beyond the last whole patch are dropped.

        Returns:
            [B, D, H / Ph, W / Pw], or without B.

        Raises:
            TypeError, ValueError: as :func:`fastvit.patch_embed`, where conv2d raises RuntimeError.
        """
        if reason := _why_no_patches(self):
            self._warn_fallback(reason)
            return super().forward(input)
        return _convolve(input, self.weight, self.bias, self._fastvit_backend)


def _why_no_patches(conv: nn.Conv2d) -> str | None:
    if conv.stride != conv.kernel_size or conv.padding not in ((0, 0), "valid"):
        return f"stride {conv.stride} and padding {conv.padding} with kernel {conv.kernel_size}"
    if conv.dilation != (1, 1) or conv.groups != 1 or conv.padding_mode != "zeros":
        return f"dilation {conv.dilation}, groups {conv.groups} and padding_mode {conv.padding_mode!r}"
    return None


register_swap(nn.MultiheadAttention, FusedMultiheadAttention)
register_swap(nn.TransformerEncoderLayer, FusedTransformerEncoderLayer)
register_swap(nn.Conv2d, FusedPatchConv2d)
