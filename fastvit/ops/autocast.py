"""Autocast for the ops: under ``torch.autocast`` they run in its dtype, as torch's own attention and convolution do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which ``tensor`` enters an op: autocast's, where autocast is on and would cast it."""
    if _eligible(tensor) and torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def _eligible(tensor: Tensor) -> bool:
    # torch's rule for its lower-precision list: floating, and never float64.
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type in DEVICE_TYPES


def register_autocast(library: torch.library.Library, op: Callable[..., Any], name: str) -> None:
    """Register the cast for ``op``: torch.library.register_autocast knows one fixed dtype only, autocast's varies."""
    for device_type in DEVICE_TYPES:
        library.impl(name, _casting(op, device_type), f"Autocast{device_type.upper()}")


def _casting(op: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        cast = [arg.to(dtype) if isinstance(arg, Tensor) and _eligible(arg) else arg for arg in args]
        with torch.autocast(device_type, enabled=False):
            return op(*cast)

    return cast_and_call
