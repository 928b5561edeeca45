"""The yardstick for models of nn.MultiheadAttention: PyTorch's own error is the largest of its own attention paths."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.testing import compare, livened
from tests.swapping import by_tensor, default_and_math, normal

Results = dict[str, Tensor]


def lively(model: nn.Module) -> nn.Module:
    """Give random weights as ``livened`` does, and attention that is not flat: its name for a projection is timm's."""
    livened(model)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * normal(*parameter.shape, seed=index))
            elif "proj_weight" in name:
                parameter.copy_(1.4 * parameter.shape[1] ** -0.5 * normal(*parameter.shape, seed=index))
    return model


@contextlib.contextmanager
def written_out() -> Iterator[None]:
    """Make every nn.MultiheadAttention compute its attention matrix, whatever the caller asks for."""
    plain = nn.MultiheadAttention.forward

    def forward(self: nn.MultiheadAttention, *args: Any, **options: Any) -> tuple[Tensor, None]:
        return plain(self, *args, **{**options, "need_weights": True})[0], None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.MultiheadAttention, "forward", forward)
        yield


def torchs_own(run: Callable[[], Results]) -> dict[str, list[Tensor]]:
    """Return for each tensor its results by torch's paths: default, math, written out."""
    runs = default_and_math(run)
    with written_out():
        runs.append(run())
    return by_tensor(runs)


def check(mine: Results, truth: Results, own: dict[str, list[Tensor]], label: str) -> float:
    """Hold every tensor to the rule; return and print the worst ratio."""
    assert mine.keys() == truth.keys() == own.keys()
    comparisons = [compare(mine[key], truth[key], own[key], f"{label}: {key}") for key in truth]
    worst = max(comparisons, key=lambda comparison: comparison.ratio)
    print(f"first {comparisons[0].ratio:.2f}, worst {worst}")
    assert all(comparison.passed for comparison in comparisons), worst
    return worst.ratio


def step(function: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> Results:
    """Return the output of ``function`` and the gradients of a fixed weighting of it: of inputs and parameters."""
    leaves = {id(tensor): tensor for tensor in inputs}
    fresh = {key: tensor.detach().clone().requires_grad_() for key, tensor in leaves.items()}
    output = function(*(fresh[id(tensor)] for tensor in inputs))
    named = {f"input {i}": leaf for i, leaf in enumerate(fresh.values())} | dict(model.named_parameters())
    weighting = normal(*output.shape, seed=3).to(output.dtype)
    grads = torch.autograd.grad((output * weighting).sum(), list(named.values()), allow_unused=True)
    return {"output": output.detach()} | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def double(value: Any) -> Any:
    """Return floating tensors in float64 and everything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
