"""Running the ``cuda`` backend in the emulator: what the tests of csrc/cuda share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import pytest
import torch

from fastvit.ops.backends import reset_selection
from fastvit.testing import AttentionCase

REASON = "fastvit._emulator is not built: FASTVIT_BUILD_EMULATOR=1 python setup.py build_ext --inplace"
needs_emulator = pytest.mark.skipif(importlib.util.find_spec("fastvit._emulator") is None, reason=REASON)

# Shared memory of a block on devices that differ in nothing else that matters here.
H100, A100, RTX = 227 * 1024, 163 * 1024, 99 * 1024
# Just enough for the streaming form at head_dim 64: what is not tiny has to take it.
STREAMING = 60 * 1024


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Let ``backend="cuda"`` take CPU tensors, on a small device with an H100's shared memory."""
    monkeypatch.setenv("FASTVIT_EMULATE_CUDA", "1")
    reset_selection()
    module = import_module("fastvit._emulator")
    module.configure()
    module.reset_statistics()
    yield module
    module.configure()
    reset_selection()


def in_range(case: AttentionCase) -> AttentionCase:
    """Give a drawn case a dtype and head dims that the kernels take."""
    dtype = (torch.float16, torch.bfloat16)[case.seed % 2] if case.dtype == torch.float32 else case.dtype
    head_dim, head_dim_v = (1 + (dim - 1) % 128 for dim in (case.head_dim, case.head_dim_v))
    return replace(case, dtype=dtype, head_dim=head_dim, head_dim_v=head_dim_v)
