"""Images in channels_last as images of one channel, whose rows have C times the pixels.

A row of a patch is then one run of memory, where C interleaved runs had to be picked apart. The weight must follow in
the same order, (row, column, channel): one in channels_last is read in place, as a whole model in channels_last has it;
any other is copied, which pays where an image has at least as many patches as the weight has rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Stride = Sequence[int] | None


def in_channels_last(weight: Tensor) -> bool:
    """Return whether the weight [D, C, Ph, Pw] lies as (D, row, column, channel) and not as its shape says."""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def as_one_channel(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] in channels_last as a view [B, 1, H, W·C]."""
    return images.permute(0, 2, 3, 1).flatten(2).unsqueeze(1)


def weight_as_one_channel(weight: Tensor) -> Tensor:
    """Return the weight [D, C, Ph, Pw] as [D, 1, Ph, Pw·C]: a view if it is in channels_last, else a copy."""
    return weight.permute(0, 2, 3, 1).contiguous().flatten(2).unsqueeze(1)


def weight_from_one_channel(weight: Tensor, channels: int) -> Tensor:
    """Return [D, 1, Ph, Pw·C] as a view [D, C, Ph, Pw]."""
    return weight.squeeze(1).unflatten(2, (-1, channels)).permute(0, 3, 1, 2)


def reads_as_one_channel(images: Tensor, weight: Tensor, patches: int) -> bool:
    """Return whether these images, of so many patches each, and this weight are better read like that."""
    channels, width = images.shape[1], images.shape[3]
    lies_so = channels > 1 and width > 1 and images.stride(1) == 1 and images.stride(3) == channels
    return lies_so and (in_channels_last(weight) or patches >= weight.shape[0])


def stride_as_one_channel(stride: Stride, channels: int) -> Stride:
    """Return the distance of patches, (down, right), in the pixels of one channel."""
    return None if stride is None else (stride[0], stride[1] * channels)
