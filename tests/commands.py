"""What the tests of fastvit's commands share."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fastvit.cli import main

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what would colour or widen the output."""
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(variable, raising=False)


def assert_finite(value: object) -> None:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        assert_finite(item)
    if isinstance(value, float):
        assert math.isfinite(value)
    assert value not in ("inf", "-inf", "nan")


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with bad input; return its line, which must be the only one, and alone."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.endswith("\n")
    assert error.count("\n") == 1
    return error.strip()


def plant_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the reference's attention a hundredth too large."""
    from fastvit.kernels import reference

    right = reference.attention_forward

    def wrong(*tensors: Any, **options: Any) -> None:
        right(*tensors, **options)
        tensors[4].mul_(1.01)

    monkeypatch.setattr(reference, "attention_forward", wrong)
