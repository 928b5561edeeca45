"""float32 that is float32: PyTorch's convolutions on a GPU are in TF32 unless they are told otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Form float32 products in full, ours and PyTorch's, and afterwards as the user had them.

    ``torch.backends.cudnn.allow_tf32`` is True by default: a Conv2d that rounds its inputs to 10 bits of mantissa would
    be a yardstick a thousand times too long, and as a rival it would do other work than ours.
    """
    backends: Any = torch.backends
    cudnn, matmul = backends.cudnn, backends.cuda.matmul
    # Two sets of switches for one thing: reading the older ones raises where the user has mixed them.
    switches = (cudnn.conv, cudnn.rnn, matmul, backends.mkldnn.conv, backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    convolutions = _unless_mixed(lambda: cudnn.allow_tf32)
    products = _unless_mixed(torch.get_float32_matmul_precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if convolutions is not None:
                cudnn.allow_tf32 = convolutions
            if products is not None:
                torch.set_float32_matmul_precision(products)
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def _unless_mixed(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except RuntimeError:
        return None
