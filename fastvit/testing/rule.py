"""The tolerance rule.

Against float64, the error of an implementation is at most 2 × the error of PyTorch's own implementation in
the same dtype (the largest over the tensor), plus one rounding of the output dtype. Where PyTorch itself has two
implementations (fused and written-out attention, convolution and unfold + linear), its error is the larger one: they
differ from each other by factors, in either direction, from one processor to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """The outcome of the rule for one tensor.

    ``error`` and ``torch_error`` are the largest absolute errors against float64; ``ratio`` is the worst quotient of
    error and allowed error (1.0 is the limit), met at ``worst_index`` by ``actual`` where ``expected`` was right.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    error: float
    torch_error: float
    ratio: float
    passed: bool
    worst_index: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "MISS"
        return (
            f"{self.name or 'tensor'} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}: {verdict}, error "
            f"{self.error:.3e}, PyTorch's {self.torch_error:.3e}, {self.ratio:.2f} of what is allowed, worst at "
            f"{list(self.worst_index)}: got {self.actual!r}, expected {self.expected!r}"
        )


def compare(actual: Tensor, expected: Tensor, torch_result: Tensor | Sequence[Tensor], name: str = "") -> Comparison:
    """Apply the rule.

    Args:
        actual: the result under test, any shape, float32, float16 or bfloat16 (float64 has no wider truth here).
        expected: the float64 result of the same shape.
        torch_result: PyTorch's own result in ``actual``'s dtype; of several, the one that errs most counts.
        name: what the tensor is, for the message.

    NaN must meet NaN and an infinity the same infinity (also one that appears when ``expected`` is rounded to the
    dtype); such a mismatch has an infinite ratio. An empty tensor passes.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    own = [torch_result] if isinstance(torch_result, Tensor) else list(torch_result)
    if not own:
        raise ValueError("torch_result: got no tensor; accepted is one or more")
    for result in own:
        _check_comparable(actual, expected, result)
    if actual.numel() == 0:
        return Comparison(name, tuple(actual.shape), actual.dtype, 0.0, 0.0, 0.0, True, (), 0.0, 0.0)
    expected, actual64 = expected.detach().cpu(), actual.detach().cpu().double()
    rounded = expected.to(actual.dtype).double()
    finite = rounded.isfinite()
    error = torch.where(finite, (actual64 - expected).abs(), 0.0)
    torch_error = torch.stack([_largest_error(result, expected, finite) for result in own]).max()
    info = torch.finfo(actual.dtype)
    # Half an ulp: relative for normal numbers, absolute in the subnormal range.
    rounding = (expected.abs() * (info.eps / 2)).clamp_min(info.smallest_normal * info.eps / 2)
    ratio = torch.where(finite, error / (2 * torch_error + rounding), 0.0).nan_to_num(torch.inf, torch.inf)
    same = finite | (rounded == actual64) | (rounded.isnan() & actual64.isnan())
    ratio = torch.where(same, ratio, torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    worst = ratio[index].item()
    return Comparison(
        name,
        tuple(actual.shape),
        actual.dtype,
        error.nan_to_num(torch.inf).max().item(),
        torch_error.item(),
        worst,
        worst <= 1.0,
        index,
        actual64[index].item(),
        expected[index].item(),
    )


def _check_comparable(actual: Tensor, expected: Tensor, torch_result: Tensor) -> None:
    if not actual.shape == expected.shape == torch_result.shape:
        raise ValueError(
            f"actual: got shape {tuple(actual.shape)}; expected has {tuple(expected.shape)} and torch_result "
            f"{tuple(torch_result.shape)}, and all three must be equal"
        )
    if expected.dtype != torch.float64 or actual.dtype != torch_result.dtype or actual.dtype == torch.float64:
        raise ValueError(
            f"expected: got {expected.dtype}; accepted is float64, with actual ({actual.dtype}) and torch_result "
            f"({torch_result.dtype}) of one narrower dtype"
        )


def _largest_error(result: Tensor, expected: Tensor, finite: Tensor) -> Tensor:
    result = result.detach().cpu().double()
    return torch.where(finite & result.isfinite(), (result - expected).abs(), 0.0).max()


def assert_close(
    actual: Tensor, expected: Tensor, torch_result: Tensor | Sequence[Tensor], name: str = ""
) -> Comparison:
    """Apply the rule of :func:`compare` and raise AssertionError, with the worst coordinate, when it is missed."""
    comparison = compare(actual, expected, torch_result, name)
    if not comparison.passed:
        raise AssertionError(str(comparison))
    return comparison
