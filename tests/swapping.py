"""What the tests of swapped models share: lively weights, the ops that ran, and all numbers of one training step."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastvit.testing import livened

__all__ = [
    "PACKED",
    "PATCHES",
    "SEPARATE",
    "forward_backward",
    "images",
    "livened",
    "normal",
    "ops_run",
    "state",
]

PACKED, SEPARATE, PATCHES = "fastvit::attention_qkvpacked", "fastvit::attention", "fastvit::patch_embed"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int = 2, size: int = 64) -> Tensor:
    return normal(batch, 3, size, size, seed=7)


def ops_run(function: Callable[[], Any]) -> set[str]:
    """Return which of our forward ops the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()} & {PACKED, SEPARATE, PATCHES}


def forward_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the logits and the gradients, of every parameter that has one, of a fixed random weighting of them."""
    logits = model(x)
    weighting = normal(*logits.shape, seed=3).to(logits.dtype)
    used = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad((logits * weighting).sum(), list(used.values()), allow_unused=True)
    return {"logits": logits.detach(), **{name: g for name, g in zip(used, grads, strict=True) if g is not None}}


def state(model: nn.Module) -> tuple[Any, ...]:
    """Return what a swap must keep: keys, Parameter and module identity, and every attribute of every module."""
    attributes = [(name, sorted(module.__dict__), module.training) for name, module in model.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    return list(model.state_dict()), parameters, [id(module) for module in model.modules()], attributes


def run_python(program: str, *arguments: object) -> str:
    """Return what a fresh interpreter prints."""
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
