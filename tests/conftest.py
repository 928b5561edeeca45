"""What every test stands on: Triton's interpreter, poisoned memory, and the worst ratio of the tolerance rule."""

from __future__ import annotations

import os

# Before anything imports triton: its interpreter runs the kernels on CPU tensors. Ahead-of-time compilation, which
# needs it off, happens in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable, Iterable, Iterator

import pytest
import torch

from fastvit.testing import Comparison

# The yardstick is PyTorch's own error, which depends on how PyTorch splits its sums over threads; tests of threads set
# their number themselves.
torch.set_num_threads(1)

_worst: dict[str, Comparison] = {}
_counts: dict[str, int] = {}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN (the largest value for integers): a kernel that leaves a gap is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hold() -> Callable[[str, Iterable[Comparison], object], None]:
    """Assert that comparisons hold the rule, naming the case, and remember the worst ratio for the summary."""

    def check(label: str, comparisons: Iterable[Comparison], case: object = None) -> None:
        for comparison in comparisons:
            if label not in _worst or comparison.ratio > _worst[label].ratio:
                _worst[label] = comparison
            assert comparison.passed, f"{label}: {comparison}\n{case}"
        _counts[label] = _counts.get(label, 0) + 1

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _worst:
        terminalreporter.section("tolerance rule: worst error as a part of what is allowed")
        for label, worst in sorted(_worst.items()):
            terminalreporter.write_line(
                f"{label}: {_counts.get(label, 0)} cases, worst {worst.ratio:.2f} ({worst.name})"
            )
