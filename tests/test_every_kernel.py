"""Every CUDA kernel that is built is executed: the cases of kernel_cases.py for attention, and the count of all."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from benchmarks import cuda_resources
from fastvit.testing import AttentionCase, check_attention
from tests.emulated import emulator, needs_emulator
from tests.kernel_cases import (
    ATTENTION_FORMS,
    DTYPES,
    HEAD_DIMS,
    all_cases,
    attention_cases,
    built_kernels,
    on_device,
)

__all__ = ["emulator"]
pytestmark = needs_emulator


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("form", ATTENTION_FORMS)
def test_attention(form: str, head_dim: int, dtype: torch.dtype, hold: Callable, emulator: ModuleType) -> None:
    for case in attention_cases(form, head_dim, dtype):
        assert isinstance(case.case, AttentionCase)
        with on_device(emulator, case):
            compared = check_attention(case.case, "cuda", backward=case.backward, written_out=True)
        hold(f"cuda in the emulator, {form}", compared, case)
        assert emulator.statistics()["bank_conflicts"] == 0


def test_every_kernel_is_launched_by_a_case(emulator: ModuleType) -> None:
    seen: set[str] = set()
    for case in all_cases():
        with on_device(emulator, case, only_notes=True) as launched:
            case.run()
        seen |= launched
    built = built_kernels(emulator)
    assert seen == built, "add a case to kernel_cases.py"
    # What nvcc compiles is the same, as far as the committed table fits its build (test_cuda_resources.py).
    assert built == {row.kernel for row in cuda_resources.read()}
