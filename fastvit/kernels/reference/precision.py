"""The precision of the specification: one floating type wider than its input, where the device has one."""

from __future__ import annotations

import torch
from torch import Tensor

# Devices without float64: there float32 is computed in float32.
WITHOUT_FLOAT64 = ("mps",)


def wider(tensor: Tensor) -> Tensor:
    """Return 16-bit tensors in float32 and all others in float64, or as they are where the device has no float64."""
    if tensor.dtype.itemsize > 2 and tensor.device.type in WITHOUT_FLOAT64:
        return tensor
    return tensor.to(torch.float32 if tensor.dtype.itemsize == 2 else torch.float64)
