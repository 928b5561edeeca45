"""Attention in AMX tiles of float and half, whose elements are sums of bfloat16 parts (csrc/cpu/split.h), and of
bfloat16 backward: edges of tiles, and what the parts cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.testing import AttentionCase, check_attention, compare

from .test_cpu_tiles import needs_tiles

pytestmark = needs_tiles
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Whole tiles and one more or less; at 513 queries a leaf of backward has two groups; 1100 keys are two blocks of
# forward. More than 640 keys are parts in backward, 700 three of them: causal groups then end in each.
@DTYPES
@pytest.mark.parametrize(
    "lengths", [(64, 64), (65, 79), (80, 97), (33, 128), (129, 129), (513, 70), (40, 1100), (70, 641), (700, 700)]
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_at_the_edges_of_tiles(
    hold: Callable, dtype: torch.dtype, lengths: tuple[int, int], is_causal: bool
) -> None:
    dims = ((64, 64), (31, 70), (256, 17)) if max(lengths) < 100 else ((64, 64), (72, 40))
    for head_dim, head_dim_v in dims:
        case = AttentionCase(2, 3, *lengths, head_dim, head_dim_v, dtype, is_causal=is_causal, sharpness=3.0)
        hold("attention, parts, edges", check_attention(case, "cpu"), case)


# Up to seven of them, fewer with 16 bits, are multiplied without tiles; 1024 keys are one block of float.
@DTYPES
@pytest.mark.parametrize("rest", range(1, 9))
@pytest.mark.parametrize("shape", [(70, 96, 64, 40), (33, 32, 128, 17), (40, 1024, 31, 70)], ids=str)
def test_keys_beside_whole_panels(
    hold: Callable, dtype: torch.dtype, rest: int, shape: tuple[int, int, int, int]
) -> None:
    seqlen_q, panels, *dims = shape
    for scale, bias in ((None, None), (0.3, None), (0.0, None), (None, "bool"), (0.3, "additive")):
        lengths, options = (seqlen_q, panels + rest), {"sharpness": 3.0, "scale": scale, "bias": bias}
        case = AttentionCase(2, 3, *lengths, *dims, dtype, layout="bnhd", **options)
        hold("attention, keys beside panels", check_attention(case, "cpu", backward=False), case)


@DTYPES
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("element", [torch.nan, torch.inf, -torch.inf, 3e4])
def test_what_such_a_key_meets(dtype: torch.dtype, name: str, element: float) -> None:
    operands = dict(zip(("query", "key", "value"), torch.randn(3, 1, 2, 129, 64).to(dtype), strict=True))
    operands[name][0, 0, 128, 5] = element
    expected = torch.nn.functional.scaled_dot_product_attention(*(tensor.double() for tensor in operands.values()))
    actual = fastvit.scaled_dot_product_attention(*operands.values())
    accuracy = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=accuracy, atol=accuracy, equal_nan=True)


@DTYPES
@pytest.mark.parametrize("bias", ["bool", "additive", "float32"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 3, 0, 1), (2, 3, 0, 1)], ids=str)
def test_attention_with_a_bias(hold: Callable, dtype: torch.dtype, bias: str, shape: tuple[int, int, int, int]) -> None:
    # 0 stands for the queries of the case.
    for seqlen_q, seqlen_k in ((70, 131), (33, 1100)):
        broadcast = (*shape[:2], seqlen_q if shape[2] == 0 else 1, seqlen_k)
        case = AttentionCase(2, 3, seqlen_q, seqlen_k, 64, 40, dtype, bias=bias, bias_shape=broadcast, scale=0.3)
        hold("attention, parts, bias", check_attention(case, "cpu"), case)


def run(attention: Callable[..., Tensor], operands: list[Tensor], dtype: torch.dtype, scale: float) -> list[Tensor]:
    query, key, value, grad = (operand.to(dtype) for operand in operands)
    leaves = [tensor.requires_grad_() for tensor in (query.clone(), key.clone(), value.clone())]
    output = attention(*leaves, scale=scale)
    return [output, *torch.autograd.grad(output, leaves, grad)]


# What the parts cannot hold goes to the FMA kernel, head by head: one head of two is like this.
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("factor", [2.0**40, 2.0**-40, 2.0**-100, torch.inf, torch.nan])
def test_what_the_parts_cannot_hold(hold: Callable, name: str, factor: float) -> None:
    operands = [torch.randn(2, 2, 130, 64) for _ in range(4)]
    place = ["query", "key", "value", "grad_output"].index(name)
    if abs(factor) < torch.inf:
        operands[place][1, 0] *= factor
        # A scale that keeps the logits of that head moderate, and those of the others near 0.
        scale = 0.125 / max(factor, 1.0) if place < 2 else 0.125
    else:
        operands[place][1, 0, 77, 5] = factor
        scale = 0.125
    actual = run(fastvit.scaled_dot_product_attention, operands, torch.float32, scale)
    theirs = run(torch.nn.functional.scaled_dot_product_attention, operands, torch.float32, scale)
    exact = run(torch.nn.functional.scaled_dot_product_attention, operands, torch.float64, scale)
    for label, ours, truth, own in zip(("output", "dq", "dk", "dv"), actual, exact, theirs, strict=True):
        if name == "grad_output" and factor == torch.inf:
            # inf - inf somewhere in a sum, or not, with the order of its terms.
            assert torch.equal(ours.isfinite(), truth.isfinite()), label
            continue
        # Each head by itself: beside one that is 2^40 times as large, another's errors would not count.
        for batch in range(2):
            for head in range(2):
                parts = (tensor[batch, head] for tensor in (ours, truth, own))
                hold("attention, parts, out of range", [compare(*parts, name=label)], (name, factor, batch, head))


def test_small_elements_beside_large_ones_keep_their_digits(hold: Callable) -> None:
    operands = [torch.randn(1, 2, 130, 64) for _ in range(4)]
    # Columns of value, and so of the output and of the gradient of value, over sixty powers of two.
    fall = torch.logspace(0, -60, 64, base=2)
    operands[2] *= fall
    operands[3] *= fall.flip(0)
    ours = run(fastvit.scaled_dot_product_attention, operands, torch.float32, 0.125)
    own = run(torch.nn.functional.scaled_dot_product_attention, operands, torch.float32, 0.125)
    exact = run(torch.nn.functional.scaled_dot_product_attention, operands, torch.float64, 0.125)
    for label, place in (("output", 0), ("grad_value", 3)):
        for column in range(64):
            parts = (tensors[place][..., column] for tensors in (ours, exact, own))
            hold("attention, parts, small columns", [compare(*parts, name=label)], column)


@DTYPES
def test_repeated_runs_and_thread_counts_give_the_same_bits(dtype: torch.dtype, threads: Callable) -> None:
    packed = torch.randn(1, 577, 3, 3, 64, dtype=dtype)
    packed[0, :, 1, 1] *= 2.0**-35 if dtype is not torch.float16 else 1.0  # a head that does not fit
    packed.requires_grad_()
    grad = torch.randn(1, 577, 3, 64, dtype=dtype)

    def once() -> list[Tensor]:
        output, lse = fastvit.attention_qkvpacked(packed, return_lse=True)
        return [output, lse, *torch.autograd.grad(output, packed, grad)]

    threads(1)
    first = once()
    for count in (1, 2, 3, 5):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
