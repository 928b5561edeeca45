"""Attention where something is masked, infinite or no number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastvit
from tests.capabilities import CAPABILITIES, run_in
from tests.test_attention import BACKENDS, qkv


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_masked_rows_are_zero_with_zero_gradients(backend: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv(seqlen=20))
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    mask[:, 7] = False
    output, lse = fastvit.attention(query, key, value, bias=mask, return_lse=True, backend=backend)
    assert (output[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -torch.inf).all()
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][:, :, 3] == 0).all()
    assert (grads[1][:, :, 7] == 0).all()
    assert (grads[2][:, :, 7] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_arrive_where_torch_has_them(backend: str, where: int, value: float) -> None:
    tensors = qkv(seqlen=40)
    tensors[where][1, 2, 5, 3] = value
    result = fastvit.attention(*tensors, backend=backend)
    expected = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(result.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(result.isfinite(), finite)
    torch.testing.assert_close(result[finite], expected[finite], rtol=1e-5, atol=1e-5)


# Of a GPU, of memory filled with ones, and one whose payload an exponential made of bits would take for a number.
NANS = [0x7FFFFFFF, -1, 0x7FC00001]
EVERY_NAN = (
    "import fastvit, torch.nn.functional as F\n"
    # Its flash path loses a query that is NaN.
    "torch.backends.cuda.enable_flash_sdp(False)\n"
    "for keys in (8, 96, 300):\n"
    f"    for bits in {NANS}:\n"
    "        for where in (0, 1, 2):\n"
    "            tensors = [torch.randn(1, 2, keys, 64) for _ in range(3)]\n"
    "            tensors[where].view(torch.int32)[0, 1, 5, 3] = bits\n"
    "            leaves = [t.requires_grad_() for t in tensors]\n"
    "            results = []\n"
    "            for function in (fastvit.attention, F.scaled_dot_product_attention):\n"
    "                output = function(*leaves)\n"
    "                grads = torch.autograd.grad(output.sum(), leaves)\n"
    "                results.append([t.isnan() for t in (output, *grads)])\n"
    "            assert all(map(torch.equal, *results)), (keys, bits, where)\n"
    "        for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
    "            bias = torch.zeros(1, 1, 1, keys)\n"
    "            bias.view(torch.int32)[..., 3] = bits\n"
    "            q, k, v = (torch.randn(1, 1, keys, 64).to(dtype) for _ in range(3))\n"
    "            output, lse = fastvit.attention(q, k, v, bias=bias, return_lse=True, backend='cpu')\n"
    "            assert output.isnan().all() and lse.isnan().all(), (keys, bits, dtype)\n"
)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_nan_is_taken_for_a_number(capability: str) -> None:
    run_in(capability, EVERY_NAN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_too_small_for_float32_is_zero(backend: str) -> None:
    for seqlen in (8, 80):
        query, key, value = qkv(seqlen=seqlen, dim=64)
        result = fastvit.attention(query, key, value, scale=1e-46, backend=backend)
        torch.testing.assert_close(result, value.mean(2, keepdim=True).expand_as(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seqlen", [48, 96, 288])
@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_causal_gradients_beside_a_nan_do_not_depend_on_the_threads(where: int, seqlen: int) -> None:
    tensors = [torch.randn(1, 1, seqlen, 64) for _ in range(4)]
    tensors[where][0, 0, 40] = torch.nan
    *leaves, grad_output = tensors
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            inputs = [leaf.clone().requires_grad_() for leaf in leaves]
            output = fastvit.attention(*inputs, is_causal=True, backend="cpu")
            results.append(torch.cat(torch.autograd.grad(output, inputs, grad_output)))
    finally:
        torch.set_num_threads(threads)
    # As bits: a NaN is not equal to itself.
    assert all(torch.equal(result.isnan(), results[0].isnan()) for result in results)
    assert all(torch.equal(result.nan_to_num(), results[0].nan_to_num()) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_scores_is_nan_not_zero(backend: str) -> None:
    query, key, value = qkv()
    query[0, 0, 2] = torch.nan
    assert fastvit.attention(query, key, value, backend=backend)[0, 0, 2].isnan().all()
