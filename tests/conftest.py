"""What every test stands on: Triton's interpreter, poisoned memory, and the worst ratio of the tolerance rule."""

from __future__ import annotations

import os

# Before anything imports triton: its interpreter runs the kernels on CPU tensors. Ahead-of-time compilation, which
# needs it off, happens in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"
# The tests' own processes, several at a time: with more threads than processors each spins where another should run,
# and takes five times as long. Tests of threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch.compile starts a process per processor for its compilations, which takes longer than a test has to compile.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Nor does a package of one call need a wrapper that the compiler has optimised.
os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
# Benchmarks wait for others to leave the processor alone; tests are such others.
os.environ["FASTVIT_PATIENCE"] = "0"

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch

from fastvit.kernels import native
from fastvit.ops import backends
from fastvit.testing import Comparison

# The yardstick is PyTorch's own error, which depends on how PyTorch splits its sums over threads.
torch.set_num_threads(1)

# For each label: the number of cases, and the worst ratio with the tensor it was met in.
_summary: dict[str, tuple[int, float, str]] = {}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every torch.empty with NaN (the largest value for integers): a kernel that leaves a gap is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native.poison(True)
    yield
    native.poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no call pass by the functions of ``fastvit.kernels.native`` that the test replaces."""
    monkeypatch.setattr(backends, "direct_calls", False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hold() -> Callable[[str, Iterable[Comparison], object], None]:
    """Assert that comparisons hold the rule, naming the case, and remember the worst ratio for the summary."""

    def check(label: str, comparisons: Iterable[Comparison], case: object = None) -> None:
        for comparison in comparisons:
            _add(label, 0, comparison.ratio, comparison.name)
            assert comparison.passed, f"{label}: {comparison}\n{case}"
        _add(label, 1, 0.0, "")

    return check


def _add(label: str, cases: int, ratio: float, name: str) -> None:
    counted, worst, where = _summary.get(label, (0, -1.0, ""))
    _summary[label] = (counted + cases, *max((worst, where), (ratio, name)))


# With pytest-xdist each worker has a summary of its own, which the controller adds up.
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tolerance"] = [(label, *values) for label, values in _summary.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for label, cases, ratio, name in getattr(node, "workeroutput", {}).get("tolerance", []):
        _add(label, cases, ratio, name)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _summary:
        terminalreporter.section("tolerance rule: worst error as a part of what is allowed")
        for label, (cases, ratio, name) in sorted(_summary.items()):
            terminalreporter.write_line(f"{label}: {cases} cases, worst {ratio:.2f} ({name})")
