"""The tolerance rule itself: it passes what is right, and misses what is wrong by a little, anywhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit.kernels import native
from fastvit.swap import swap
from fastvit.testing import (
    AttentionCase,
    PatchEmbedCase,
    assert_close,
    check_attention,
    check_model,
    check_patch_embed,
    compare,
    compare_runs,
    ieee_float32,
    livened,
)
from fastvit.testing.model import _own_paths
from fastvit.testing.rule import BLOCK, runs_of


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    expected = torch.randn(50, 40, dtype=torch.float64)
    return expected, expected.float() * (1 + 2**-22)


def test_twice_torchs_error_and_one_rounding_pass_and_more_does_not() -> None:
    expected, torch_result = sample()
    torch_error = (torch_result.double() - expected).abs().max()
    assert compare(expected.float(), expected, torch_result).passed
    for factor, passed in ((1.9, True), (2.6, False)):
        off = expected.clone()
        off[7, 9] = torch.sign(off[7, 9]) * (off[7, 9].abs() + factor * torch_error)
        result = compare(off.float(), expected, torch_result)
        assert result.passed == passed
        assert result.worst_index == (7, 9)


@pytest.mark.parametrize("place", [(0, 0), (1, 5), (299, 299)])
def test_a_large_tensor_is_compared_in_all_its_blocks(place: tuple[int, int]) -> None:
    expected = torch.randn(300, 300, dtype=torch.float64)
    expected[150, 7] = torch.nan
    assert expected.numel() > 2 * BLOCK
    torch_result = (expected * (1 + 2**-22)).float()
    torch_error = (torch_result.double() - expected).abs().nan_to_num().max().item()
    assert compare(expected.float(), expected, torch_result).passed
    off = expected.float().t().contiguous().t()  # of another layout than the truth
    off[place] += 1
    result = compare(off, expected, torch_result)
    assert (result.worst_index, result.passed) == (place, False)
    assert result.torch_error == torch_error
    # PyTorch's own largest error may lie in another block than ours.
    far = torch_result.clone()
    far[200, 200] += 0.6
    assert compare(off, expected, [torch_result, far]).passed


def test_of_several_torch_results_the_worst_counts() -> None:
    expected, torch_result = sample()
    worse = torch_result * (1 + 2**-20)
    ours = torch_result * (1 + 2**-21)
    assert not compare(ours, expected, torch_result).passed
    assert compare(ours, expected, [torch_result, worse]).passed
    assert compare(ours, expected, [worse, torch_result]) == compare(ours, expected, worse)
    with pytest.raises(ValueError, match=r"^torch_result: got no tensor"):
        compare(ours, expected, [])


def test_a_path_of_torchs_that_cannot_run_leaves_the_rule_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    case = PatchEmbedCase(patch=(4, 4), grid=(3, 3), embed_dim=16)

    def fail(*_: object) -> Tensor:
        raise RuntimeError("no such plan")

    monkeypatch.setattr(torch.nn.functional, "unfold", fail)
    with pytest.warns(UserWarning, match="PyTorch's own implementation has no part in the rule here: no such plan"):
        assert all(comparison.passed for comparison in check_patch_embed(case, "reference"))
    with pytest.warns(UserWarning, match="no part"), pytest.raises(RuntimeError, match="no such plan"):
        runs_of([fail, fail], lambda peer: [peer()])


def test_one_rounding_is_of_the_output_dtype() -> None:
    expected = torch.tensor([1.0, 100.0, 0.0], dtype=torch.float64)
    exact = expected.bfloat16()
    assert compare(exact, expected, exact).passed
    wrong = exact.clone()
    wrong[1] += 0.5
    assert not compare(wrong, expected, exact).passed
    assert not compare(exact + torch.tensor([0, 0, 1e-6]).bfloat16(), expected, exact).passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_must_meet_their_like(value: float) -> None:
    expected, torch_result = sample()
    expected[3, 3] = torch_result[3, 3] = value
    assert compare(torch_result.clone(), expected, torch_result).passed
    finite = torch_result.clone()
    finite[3, 3] = 0.0
    assert compare(finite, expected, torch_result).ratio == torch.inf
    spread = torch_result.clone()
    spread[4, 4] = value
    assert not compare(spread, expected, torch_result).passed


def test_an_overflow_that_rounding_explains_is_right() -> None:
    expected = torch.tensor([70000.0, 1.0], dtype=torch.float64)
    assert compare(expected.half(), expected, expected.half()).passed
    assert not compare(torch.tensor([60000.0, 1.0]).half(), expected, expected.half()).passed


def test_message_has_the_worst_coordinate() -> None:
    expected, torch_result = sample()
    wrong = torch_result.clone()
    wrong[11, 13] += 1
    with pytest.raises(AssertionError, match=r"grad_key \[50, 40\] float32: MISS.*worst at \[11, 13\]"):
        assert_close(wrong, expected, torch_result, "grad_key")


def test_arguments_that_do_not_fit_are_refused() -> None:
    expected, torch_result = sample()
    with pytest.raises(ValueError, match="actual: got shape"):
        compare(torch_result[:5], expected, torch_result)
    with pytest.raises(ValueError, match=r"expected: got torch\.float32"):
        compare(torch_result, expected.float(), torch_result)


@pytest.mark.usefixtures("python_calls")
def test_a_wrong_kernel_is_seen_in_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastvit.kernels.native as native

    case = AttentionCase(seqlen_q=50, seqlen_k=50)
    forward, backward = native.attention_forward, native.attention_backward

    def wrong_forward(*args: torch.Tensor, is_causal: bool, scale: float) -> None:
        forward(*args, is_causal=is_causal, scale=scale * 1.001)

    def wrong_backward(*args: torch.Tensor, is_causal: bool, scale: float) -> None:
        backward(*args, is_causal=is_causal, scale=scale * 1.001)

    monkeypatch.setattr(native, "attention_forward", wrong_forward)
    assert {r.name for r in check_attention(case, "cpu") if not r.passed} == {"output", "lse"}
    monkeypatch.setattr(native, "attention_forward", forward)
    monkeypatch.setattr(native, "attention_backward", wrong_backward)
    missed = {r.name for r in check_attention(case, "cpu") if not r.passed}
    assert missed == {"grad_query", "grad_key", "grad_value"}


def test_tensors_of_a_few_elements_are_compared_together() -> None:
    expected, _ = sample()
    scalars = {f"gate {index}": expected[0, index : index + 1] for index in range(4)}
    own = {name: value.float() + 1e-5 * index for index, (name, value) in enumerate(scalars.items())}
    actual = {name: value.float() + 1e-5 for name, value in scalars.items()}
    assert not compare(actual["gate 0"], scalars["gate 0"], own["gate 0"]).passed
    (together,) = compare_runs(actual, scalars, [own])
    assert together.passed
    assert together.shape == (4,)
    actual["gate 2"] = actual["gate 2"] + 1e-4
    assert not compare_runs(actual, scalars, [own])[0].passed


def test_a_bias_without_a_true_gradient_is_held_to_the_weight_beside_it() -> None:
    weight = torch.randn(32, dtype=torch.float64)
    expected = {"norm.weight": weight, "norm.bias": torch.full((32,), 1e-17, dtype=torch.float64)}
    own = {"norm.weight": weight.float() + 1e-6, "norm.bias": torch.full((32,), 1e-8)}
    for error, passed in ((1.5e-6, True), (3e-6, False)):
        actual = {"norm.weight": weight.float(), "norm.bias": torch.full((32,), error)}
        assert [comparison.passed for comparison in compare_runs(actual, expected, [own])] == [True, passed]
    expected["norm.bias"] = torch.full((32,), 1e-3, dtype=torch.float64)
    own["norm.bias"] = expected["norm.bias"].float() + 1e-8
    actual = {"norm.weight": weight.float(), "norm.bias": own["norm.bias"] + 1.5e-6}
    assert not compare_runs(actual, expected, [own])[1].passed


class Wrapped(torch.nn.Module):
    """A model that returns a tree of things."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor | int]:
        return {"tokens": self.attention(x, x, x, need_weights=False)[0], "count": x.shape[1]}


def test_check_model_holds_outputs_and_every_gradient_and_leaves_the_model_alone() -> None:
    model, x = livened(Wrapped()), torch.randn(4, 9, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    comparisons = check_model(model, x)
    assert {comparison.name for comparison in comparisons} == {"output 0", *before}
    assert all(comparison.passed for comparison in comparisons)
    assert type(model.attention) is torch.nn.MultiheadAttention
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    swap(model)
    assert [str(each) for each in check_model(model, x)] == [str(each) for each in comparisons]
    assert len(check_model(model, x, backward=False)) == 1


def test_check_model_sees_a_swap_that_computes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastvit.adapters.torch_nn as adapter

    model, x = livened(Wrapped()), torch.randn(4, 9, 32)
    wrong = adapter.FusedMultiheadAttention.forward

    def off(self: torch.nn.Module, *args: object, **options: object) -> object:
        output, weights = wrong(self, *args, **options)
        return output * (1 + 2e-6), weights

    monkeypatch.setattr(adapter.FusedMultiheadAttention, "forward", off)
    assert not all(comparison.passed for comparison in check_model(model, x))


@pytest.mark.usefixtures("python_calls")
@pytest.mark.parametrize("build", [fastvit.modules.Attention, fastvit.modules.PatchEmbed])
def test_check_model_compares_built_modules_with_torch(
    build: type[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_attention = build is fastvit.modules.Attention
    model = livened(build(32, 2) if is_attention else build(img_size=16, patch_size=4, embed_dim=32))
    x = torch.randn(2, 17, 32) if is_attention else torch.randn(2, 3, 16, 16)
    assert all(comparison.passed for comparison in check_model(model, x))
    name = "attention_forward" if is_attention else "patch_embed_forward"
    right = getattr(native, name)

    def wrong(*tensors: Any, **options: Any) -> None:
        right(*tensors, **options)
        (tensors[4] if is_attention else tensors[3]).zero_()

    monkeypatch.setattr(native, name, wrong)
    assert not all(comparison.passed for comparison in check_model(model, x, backward=False))


def test_patches_are_cut_in_both_of_torchs_ways() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, (7, 5), (4, 3), padding=(3, 1)), torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8)
    )
    x = torch.randn(2, 3, 30, 31)
    *others, (unfolded, _) = _own_paths(model)
    assert all(variant is model for variant, _ in others)
    assert [type(layer) is torch.nn.Conv2d for layer in unfolded] == [False, True]
    assert {type(layer) for layer in model} == {torch.nn.Conv2d}
    torch.testing.assert_close(unfolded(x), model(x))
    ours, theirs = (torch.autograd.grad(each(x).square().sum(), list(each.parameters())) for each in (unfolded, model))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert all(variant is model[1] for variant, _ in _own_paths(model[1]))


def test_check_model_needs_something_to_compare() -> None:
    with pytest.raises(ValueError, match=r"^model: got Flatten, which returns no floating tensor"):
        check_model(torch.nn.Flatten(), torch.arange(6).reshape(2, 3))


def precisions() -> tuple[object, ...]:
    backends = torch.backends
    return (
        backends.cudnn.allow_tf32, backends.cudnn.conv.fp32_precision, backends.cuda.matmul.allow_tf32,
        backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision(),
        backends.mkldnn.matmul.fp32_precision,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", ["highest", "high", "medium"])
def test_float32_is_float32_and_then_as_the_user_had_it(wanted: str) -> None:
    assert torch.backends.cudnn.allow_tf32, "torch's default has changed: is ieee_float32 still needed?"
    default = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        before = precisions()
        with ieee_float32():
            assert precisions() == (False, "ieee", False, "ieee", "highest", "ieee")
        assert precisions() == before
        with contextlib.suppress(KeyError), ieee_float32():
            raise KeyError
        assert precisions() == before
    finally:
        torch.set_float32_matmul_precision(default)


def test_a_user_who_mixes_both_sets_of_switches_is_not_refused() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        with pytest.raises(RuntimeError, match="mix"):
            _ = torch.backends.cudnn.allow_tf32
        with ieee_float32():
            assert torch.backends.cudnn.rnn.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("what", ["attention", "patch_embed", "model"])
def test_every_yardstick_is_full_float32(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watch(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **options: Any) -> Tensor:
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return function(*args, **options)

        return watched

    for name in ("scaled_dot_product_attention", "conv2d", "unfold"):
        monkeypatch.setattr(torch.nn.functional, name, watch(getattr(torch.nn.functional, name)))
    if what == "attention":
        check_attention(AttentionCase(1, 1, 9, 9, 8, 8))
    elif what == "patch_embed":
        check_patch_embed(PatchEmbedCase(1, 3, (2, 2), (4, 4), 8))
    else:
        check_model(nn.Sequential(nn.Conv2d(3, 8, 4, 4)), torch.randn(2, 3, 8, 8))
    assert seen
    assert set(seen) == {(False, False)}
