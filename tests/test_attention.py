"""The attention op through its public functions: values, layouts and features."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from fastvit.testing import VIT_SEQLENS, AttentionCase, check_attention, vit_attention_cases
from tests.capabilities import CAPABILITIES, run_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")


def qkv(batch: int = 2, heads: int = 3, seqlen: int = 17, dim: int = 8, **options: object) -> list[Tensor]:
    return [torch.randn(batch, heads, seqlen, dim, **options) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vit_shapes_hold_the_rule(hold: Callable, backend: str, dtype: torch.dtype) -> None:
    for case in vit_attention_cases([dtype]):
        hold(f"attention, {backend}, ViT shapes", check_attention(case, backend), case)


@pytest.mark.parametrize(
    "head_dim", [1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 72, 80, 88, 96, 104, 127, 129, 200, 255, 256]
)
def test_every_kind_of_head_dim(hold: Callable, head_dim: int) -> None:
    for other in (head_dim, 64):
        case = AttentionCase(4, 3, 37, 41, head_dim, other, layout="bhnd", seed=head_dim)
        hold("attention, cpu, head dims", check_attention(case, "cpu"), case)


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 257), (257, 1), (7, 1025), (2, 3000), (1100, 5)])
def test_cross_lengths(hold: Callable, seqlen_q: int, seqlen_k: int) -> None:
    # 1025 and 3000 keys take the online softmax over several blocks of keys.
    case = AttentionCase(8, 12, seqlen_q, seqlen_k, 32, 32, layout="bnhd", sharpness=4.0)
    hold("attention, cpu, cross lengths", check_attention(case, "cpu"), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_scale_is_seen(backend: str) -> None:
    case = AttentionCase(sharpness=4.0)
    tensors = case.tensors()
    exact = F.scaled_dot_product_attention(*(tensors[name].double() for name in ("query", "key", "value")))
    torch_result = F.scaled_dot_product_attention(*(tensors[name] for name in ("query", "key", "value")))
    wrong = fastvit.attention(tensors["query"], tensors["key"], tensors["value"], scale=0.125 * 1.0001, backend=backend)
    assert not fastvit.testing.compare(wrong, exact, torch_result).passed


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_memory_is_bnhd_and_packed_agrees(backend: str) -> None:
    packed = torch.randn(2, 50, 3, 4, 16)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    output, lse = fastvit.attention(query, key, value, return_lse=True, backend=backend)
    assert output.transpose(1, 2).is_contiguous()
    assert lse.dtype == torch.float32
    packed_output, packed_lse = fastvit.attention_qkvpacked(packed, return_lse=True, backend=backend)
    assert packed_output.is_contiguous()
    assert torch.equal(packed_output, output.transpose(1, 2))
    assert torch.equal(packed_lse, lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_give_the_same_bits(backend: str) -> None:
    query, key, value = qkv(seqlen=33, dim=24)
    expected = fastvit.attention(query, key, value, backend=backend)

    def spread(tensor: Tensor) -> Tensor:
        wide = torch.full([2 * size for size in tensor.shape], torch.nan)
        view = wide[::2, 1::2, ::2, : tensor.shape[3]]
        return view.copy_(tensor)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)

    for layout in (spread, transposed):
        views = [layout(tensor) for tensor in (query, key, value)]
        assert torch.equal(fastvit.attention(*views, backend=backend), expected)
    one_key = key[:1, :1].expand(2, 3, -1, -1)
    shared = fastvit.attention(query, one_key, value, backend=backend)
    assert torch.equal(shared, fastvit.attention(query, one_key.contiguous(), value, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_any_strides_have_the_same_bits(backend: str) -> None:
    tensors, grad = qkv(seqlen=33, dim=24), torch.randn(2, 3, 33, 24)
    orders = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0))
    results = []
    for order in orders:
        back = [order.index(dim) for dim in range(4)]
        leaves = [tensor.permute(order).contiguous().permute(back).requires_grad_() for tensor in tensors]
        fastvit.attention(*leaves, backend=backend).backward(grad)
        results.append([leaf.grad for leaf in leaves])
    for order, grads in zip(orders, results, strict=True):
        assert all(torch.equal(*pair) for pair in zip(grads, results[0], strict=True)), order
    # Two dimensions of stride 1: empty_like may order them either way.
    steps = [torch.randn(2, 3, 9 + 24).unfold(2, 24, 1).requires_grad_() for _ in range(3)]
    assert steps[0].stride()[2:] == (1, 1)
    plain = [step.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for step in steps]
    for leaves in (steps, plain):
        fastvit.attention(*leaves, backend=backend).backward(grad[:, :, :10])
    assert all(torch.equal(step.grad, leaf.grad) for step, leaf in zip(steps, plain, strict=True))


@pytest.mark.parametrize(
    "shape", [(2, 3, 33, 33), (1, 1, 33, 33), (2, 1, 1, 33), (1, 3, 33, 1), (1, 1, 1, 1), (33, 33)]
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_bias_broadcasts_without_a_copy(kind: str, shape: tuple[int, ...]) -> None:
    query, key, value = qkv(seqlen=33, dim=24)
    bias = torch.randn(shape)
    bias = bias > -0.5 if kind == "bool" else bias
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), _double(bias))
    result = fastvit.attention(query, key, value, bias=bias, backend="cpu")
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    odd = torch.randn(2, 3, 33, 40)[..., 3:36]
    result = fastvit.attention(query, key, value, bias=odd, backend="cpu")
    torch.testing.assert_close(
        result.double(),
        F.scaled_dot_product_attention(query.double(), key.double(), value.double(), odd.double()),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["bool", "query's", "float32"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (16, 16), (35, 19), (20, 49)])
def test_a_bias_of_any_dtype_is_read_within_its_rows(
    dtype: torch.dtype, within: float, kind: str, seqlen_q: int, seqlen_k: int
) -> None:
    query, key, value = (tensor.to(dtype) for tensor in qkv(seqlen=max(seqlen_q, seqlen_k), dim=24))
    query, key, value = query[:, :, :seqlen_q], key[:, :, :seqlen_k], value[:, :, :seqlen_k]
    of = {"bool": torch.bool, "query's": dtype, "float32": torch.float32}[kind]
    # What lies beside the rows and beyond the last one would show: NaN, or True where the row says False.
    wide = torch.full((3, seqlen_q + 1, seqlen_k + 5), 1 if kind == "bool" else torch.nan).to(of)
    bias = wide[:, :seqlen_q, 3 : 3 + seqlen_k]
    bias.copy_(torch.randn(bias.shape) > 0 if kind == "bool" else torch.randn(bias.shape))
    bias[0, :, 1:2] = False if kind == "bool" else -torch.inf
    bias[..., 0] = 1
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double(), _double(bias))
    result = fastvit.attention(query, key, value, bias=bias, backend="cpu")
    torch.testing.assert_close(result.double(), expected, rtol=within, atol=within)


def _double(bias: Tensor) -> Tensor:
    return bias if bias.dtype == torch.bool else bias.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8)])
def test_empty_sizes_give_what_sdpa_gives(backend: str, shape: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    result = fastvit.attention(query, key, value, backend=backend)
    # Its math path, because the flash one of torch 2.11 ends the process on no heads: it divides by their number.
    with sdpa_kernel(SDPBackend.MATH):
        assert result.shape == F.scaled_dot_product_attention(query, key, value).shape
    assert [grad.shape for grad in torch.autograd.grad(result.sum(), (query, key, value))] == [query.shape] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys_give_what_sdpa_gives(backend: str) -> None:
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    key, value = (torch.randn(2, 3, 0, 8, requires_grad=True) for _ in range(2))
    result, lse = fastvit.attention(query, key, value, return_lse=True, backend=backend)
    assert torch.equal(result, F.scaled_dot_product_attention(query, key, value))
    assert (lse == -torch.inf).all()
    assert (torch.autograd.grad(result.sum(), query)[0] == 0).all()


def test_more_heads_than_a_grid_dimension_holds() -> None:
    query, key, value = qkv(batch=70_000, heads=1, seqlen=2, dim=4)
    torch.testing.assert_close(
        fastvit.attention(query, key, value, backend="cpu"), F.scaled_dot_product_attention(query, key, value)
    )


def test_addresses_past_two_to_the_31_elements(tmp_path: Path) -> None:
    # A sparse file: of the 9.6 GB only the pages that the two batches touch exist.
    stride = 2_400_000_000
    size = 2 * (2 * stride + 4096)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", size)
    buffer = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), True, size)
    tensors = []
    for offset in (0, 1024, 2048):
        view = torch.empty(0, dtype=torch.float16).set_(buffer, offset, (2, 2, 5, 16), (stride, 80, 16, 1))
        tensors.append(view.copy_(torch.randn(2, 2, 5, 16)))
    result = fastvit.attention(*tensors, backend="cpu")
    dense = fastvit.attention(*(tensor.contiguous() for tensor in tensors), backend="cpu")
    assert torch.equal(result, dense)
    assert not torch.equal(dense[0], dense[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_and_its_gradient(backend: str) -> None:
    tensors = [tensor.double().requires_grad_() for tensor in qkv(seqlen=9, dim=4)]

    def both(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return fastvit.attention(*tensors, return_lse=True, backend=backend)

    scores = tensors[0] @ tensors[1].mT * 4**-0.5
    torch.testing.assert_close(both(*tensors)[1], scores.logsumexp(-1))
    assert torch.autograd.gradcheck(both, tensors)
    only_lse = torch.autograd.grad(both(*tensors)[1].sum(), tensors[:2])
    torch.testing.assert_close(only_lse, torch.autograd.grad(scores.logsumexp(-1).sum(), tensors[:2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "causal", "bool", "additive", "packed"])
def test_gradcheck_in_float64(backend: str, option: str) -> None:
    tensors = [torch.randn(2, 2, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((5, 3), (7, 3), (7, 4))]
    bias = {"bool": torch.rand(2, 1, 5, 7) > 0.3, "additive": torch.randn(1, 2, 5, 7).double()}.get(option)
    if option == "packed":
        packed = torch.randn(2, 6, 3, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda t: fastvit.attention_qkvpacked(t, return_lse=True, backend=backend), (packed,)
        )
        return
    assert torch.autograd.gradcheck(
        lambda *t: fastvit.attention(*t, bias=bias, is_causal=option == "causal", backend=backend), tensors
    )


def test_float64_is_computed_in_float64() -> None:
    tensors = qkv(seqlen=197, dim=64, dtype=torch.float64)
    torch.testing.assert_close(
        fastvit.attention(*tensors, backend="cpu"), F.scaled_dot_product_attention(*tensors), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_runs_and_thread_counts_give_the_same_bits(backend: str) -> None:
    packed = torch.randn(2, 197, 3, 5, 64, requires_grad=True)
    grad = torch.randn(2, 197, 5, 64)

    def run() -> tuple[Tensor, Tensor]:
        output = fastvit.attention_qkvpacked(packed, backend=backend)
        return output.detach(), torch.autograd.grad(output, packed, grad)[0]

    threads = torch.get_num_threads()
    first = run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            # The reference is torch's own matrix product, whose order of summation torch may change with the threads.
            if backend == "cpu" or count == threads:
                assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_two_threads_at_once() -> None:
    inputs = [torch.randn(2, 50 + i, 3, 4, 32) for i in range(4)]
    expected = [fastvit.attention_qkvpacked(packed, backend="cpu") for packed in inputs]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(fastvit.attention_qkvpacked(inputs[index], backend="cpu"), expected[index]):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_each_instruction_set_holds_the_rule(capability: str) -> None:
    from fastvit import _C

    if capability == _C.cpu_capability():
        pytest.skip(f"{capability} is what all other tests run in: test_vit_shapes_hold_the_rule has these cases")
    run_in(
        capability,
        "dtypes = [torch.float32, torch.bfloat16, torch.float16]\n"
        "for case in vit_attention_cases(dtypes):\n"
        "    if case.seqlen_q <= 257:\n"
        "        for result in check_attention(case, 'cpu'): assert result.passed, (case, str(result))\n"
        "for case in vit_patch_embed_cases(dtypes):\n"
        "    for result in check_patch_embed(case, 'cpu'): assert result.passed, (case, str(result))\n",
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_queries_beside_whole_vectors_hold_the_rule(capability: str) -> None:
    # A few of them are computed one by one. 1030 keys come in two blocks, and a causal mask ends in the first.
    run_in(
        capability,
        "import fastvit\n"
        "masks = ({}, {'bias': 'additive'}, {'bias': 'bool', 'is_causal': True})\n"
        "of = {1: torch.float32, 45: torch.bfloat16, 46: torch.float16, 1030: torch.float32}\n"
        "for queries in range(1, 20):\n"
        "    for keys, dtype in of.items():\n"
        "        for mask in masks:\n"
        "            shape = (2, 3, queries, keys, 24, 40, dtype)\n"
        "            case = AttentionCase(*shape, layout='bnhd', seed=queries, **mask)\n"
        "            for result in check_attention(case, 'cpu', backward=False): assert result.passed, str(result)\n"
        "    query, key, value = torch.randn(3, 1, 2, 1030, 24, dtype=torch.float64)\n"
        "    query = query[:, :, :queries]\n"
        "    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)\n"
        "    torch.testing.assert_close(fastvit.attention(query, key, value), expected, rtol=1e-12, atol=1e-12)\n",
    )


def test_inputs_are_left_as_they_were() -> None:
    tensors = qkv()
    before = copy.deepcopy(tensors)
    fastvit.attention(*tensors, bias=torch.zeros(17, 17), is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_grad_output(hold: Callable, dtype: torch.dtype) -> None:
    # output.sum().backward() sends a gradient whose every stride is 0.
    case = replace(AttentionCase(seqlen_q=50, seqlen_k=50), dtype=dtype)
    tensors = case.tensors()
    names = ("query", "key", "value")

    def grads(function: Callable, cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [cast(tensors[name]).detach().requires_grad_() for name in names]
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    ours = grads(lambda *t: fastvit.attention(*t, backend="cpu"), lambda t: t)
    exact = grads(F.scaled_dot_product_attention, lambda t: t.double())
    theirs = grads(F.scaled_dot_product_attention, lambda t: t)
    # The gradients of query and key are zero but for rounding, so only value's can be compared by the rule.
    hold("attention, cpu, expanded grad_output", [fastvit.testing.compare(ours[2], exact[2], theirs[2], "grad_value")])
    assert all((a - b).abs().max() < 0.02 for a, b in zip(ours[:2], theirs[:2], strict=True))


def test_every_vit_length_is_in_the_cases() -> None:
    lengths = {case.seqlen_q for case in vit_attention_cases([torch.float32])}
    assert set(VIT_SEQLENS) <= lengths
