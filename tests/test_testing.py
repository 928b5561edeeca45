"""The tolerance rule itself: it passes what is right, and misses what is wrong by a little, anywhere."""

from __future__ import annotations

import pytest
import torch

from fastvit.testing import AttentionCase, assert_close, check_attention, compare


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


def test_of_several_torch_results_the_worst_counts() -> None:
    expected, torch_result = sample()
    worse = torch_result * (1 + 2**-20)
    ours = torch_result * (1 + 2**-21)
    assert not compare(ours, expected, torch_result).passed
    assert compare(ours, expected, [torch_result, worse]).passed
    assert compare(ours, expected, [worse, torch_result]) == compare(ours, expected, worse)
    with pytest.raises(ValueError, match=r"^torch_result: got no tensor"):
        compare(ours, expected, [])


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
