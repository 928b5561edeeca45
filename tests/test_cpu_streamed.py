"""Large outputs of the ``cpu`` backend go past the caches (csrc/cpu/pack.h): the same bits as those of small ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvit
from tests.capabilities import run_in

# One image stays below 4 MiB, gradients included; all of them are above.
_BATCH = 14


def _qkv(dtype: torch.dtype, dim: int = 64) -> Tensor:
    return torch.randn(_BATCH, 197, 3, 12 if dtype is torch.float32 else 20, dim).to(dtype)


def _both(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    qkv = qkv.requires_grad_()
    output = fastvit.attention_qkvpacked(qkv, backend="cpu")
    return output.detach(), torch.autograd.grad(output, qkv, grad)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 80, 40])  # whole lines in all types; in float32 alone; in none
def test_large_outputs_have_the_bits_of_small_ones(dtype: torch.dtype, dim: int) -> None:
    qkv = _qkv(dtype, dim)
    grad = torch.randn_like(qkv[:, :, 0])
    output, grad_qkv = _both(qkv, grad)
    assert output.nbytes > 4 << 20
    for first in range(_BATCH):
        part = slice(first, first + 1)
        small, grad_small = _both(qkv.detach()[part].clone(), grad[part].clone())
        assert grad_small.nbytes < 4 << 20
        assert torch.equal(output[part], small)
        assert torch.equal(grad_qkv[part], grad_small)


def test_so_do_those_of_avx512() -> None:
    # Whose attention in float32 streams too, by other functions than that of AMX.
    run_in(
        "avx512",
        "from tests.test_cpu_streamed import test_large_outputs_have_the_bits_of_small_ones as test\n"
        "for dim in (64, 40): test(torch.float32, dim)\n",
    )


def test_outputs_that_begin_inside_of_a_line() -> None:
    qkv = _qkv(torch.float32)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = fastvit.attention_qkvpacked(qkv, backend="cpu")
    memory = torch.full((expected.numel() + 2,), torch.nan)
    output = memory[1:-1].view(expected.shape)
    lse = torch.empty(query.shape[:3])
    torch.ops.fastvit_native.attention_forward(
        query, key, value, None, output.transpose(1, 2), lse, False, qkv.shape[4] ** -0.5
    )
    assert torch.equal(output, expected)
    assert memory[[0, -1]].isnan().all()
