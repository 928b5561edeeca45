"""The precision of the specification: one floating type wider than its input."""

from __future__ import annotations

import torch
from torch import Tensor


def wider(tensor: Tensor) -> Tensor:
    """Return 16-bit tensors in float32 and all others in float64."""
    return tensor.to(torch.float32 if tensor.dtype.itemsize == 2 else torch.float64)
