"""What a call is, in metadata alone: the input of every backend's ``why_not`` and of the choice between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

MAX_HEAD_DIM = 256


class AttentionSpec(NamedTuple):
    """Metadata of one attention call; sizes in elements."""

    batch: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    is_causal: bool
    device: torch.device


class PatchEmbedSpec(NamedTuple):
    """Metadata of one patch-embedding call; sizes in elements or pixels, ``stride`` None where the patches tile."""

    batch: int
    in_channels: int
    height: int
    width: int
    patch_height: int
    patch_width: int
    embed_dim: int
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, int] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches in one image."""
        return patch_grid((self.height, self.width), (self.patch_height, self.patch_width), self.stride)


def patch_grid(image: Sequence[int], patch: Sequence[int], stride: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the rows and columns of whole patches in an image, all given as (height, width).

    As a convolution counts them; a stride of None is the patch, and the image then a multiple of it.
    """
    if stride is None:
        return image[0] // patch[0], image[1] // patch[1]
    return (image[0] - patch[0]) // stride[0] + 1, (image[1] - patch[1]) // stride[1] + 1


Spec = AttentionSpec | PatchEmbedSpec
