"""What a call is, in metadata alone: the input of every backend's ``why_not`` and of the choice between them."""

from __future__ import annotations

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
    """Metadata of one patch-embedding call; sizes in elements or pixels."""

    batch: int
    in_channels: int
    height: int
    width: int
    patch_height: int
    patch_width: int
    embed_dim: int
    dtype: torch.dtype
    device: torch.device


Spec = AttentionSpec | PatchEmbedSpec
