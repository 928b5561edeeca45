"""The tolerance rule.

Against float64, the error of an implementation is at most 2 × the error of PyTorch's own implementation in
the same dtype (the largest over the tensor), plus one rounding of the output dtype. Where PyTorch itself has two
implementations (fused and written-out attention, convolution and unfold + linear), its error is the larger one: they
differ from each other by factors, in either direction, from one processor to the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Peer = TypeVar("Peer")
# Elements compared at a time: float64 and its temporaries of more than a cache cost the test more than the kernel.
BLOCK = 2**15


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


def runs_of(peers: Sequence[Peer], run: Callable[[Peer], list[Tensor]]) -> list[list[Tensor]]:
    """Return what PyTorch's own implementations give, with a warning for one that raises: the rule is stricter then.

    Raises:
        RuntimeError: what the first of them raised, if all do.
    """
    runs, errors = [], []
    for peer in peers:
        try:
            runs.append(run(peer))
        except RuntimeError as error:
            errors.append(error)
            warnings.warn(f"PyTorch's own implementation has no part in the rule here: {error}", stacklevel=3)
    if not runs:
        raise errors[0]
    return runs


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
    flat, truth = _flat(actual), _flat(expected)
    torch_error = max(_largest_error(_flat(result), truth, actual.dtype) for result in own)
    error, worst, where = 0.0, -1.0, 0
    for start, part, part_truth in _blocks(flat, truth):
        errors, finite, same = _errors(part, part_truth, actual.dtype)
        ratio = torch.where(finite, errors / (2 * torch_error + _rounding(part_truth, actual.dtype)), 0.0)
        ratio = torch.where(same, ratio.nan_to_num(torch.inf, torch.inf), torch.inf)
        error = max(error, errors.nan_to_num(torch.inf).max().item())
        highest = int(ratio.argmax())
        if ratio[highest] > worst:
            worst, where = ratio[highest].item(), start + highest
    return Comparison(
        name,
        tuple(actual.shape),
        actual.dtype,
        error,
        torch_error,
        worst,
        worst <= 1.0,
        tuple(int(i) for i in torch.unravel_index(torch.tensor(where), actual.shape)),
        flat[where].item(),
        truth[where].item(),
    )


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1)


def _blocks(result: Tensor, expected: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in range(0, expected.numel(), BLOCK):
        yield start, result[start : start + BLOCK].double(), expected[start : start + BLOCK]


def _errors(result: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return errors (0 where the truth is not finite in ``dtype``), where it is finite, and where both may stand."""
    rounded = expected.to(dtype).double()
    finite = rounded.isfinite()
    errors = (result - expected).abs_()
    if finite.all():
        return errors, finite, finite
    same = finite | (rounded == result) | (rounded.isnan() & result.isnan())
    return torch.where(finite, errors, 0.0), finite, same


def _rounding(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Half an ulp: relative for normal numbers, absolute in the subnormal range."""
    info = torch.finfo(dtype)
    return (expected.abs() * (info.eps / 2)).clamp_min_(info.smallest_normal * info.eps / 2)


def _largest_error(result: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error of PyTorch's own result; where that is not finite, it is no yardstick."""
    return max(
        torch.where(part.isfinite(), _errors(part, truth, dtype)[0], 0.0).max().item()
        for _, part, truth in _blocks(result, expected)
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


def assert_close(
    actual: Tensor, expected: Tensor, torch_result: Tensor | Sequence[Tensor], name: str = ""
) -> Comparison:
    """Apply the rule of :func:`compare` and raise AssertionError, with the worst coordinate, when it is missed."""
    comparison = compare(actual, expected, torch_result, name)
    if not comparison.passed:
        raise AssertionError(str(comparison))
    return comparison
