"""What the tests of swapped models share: lively weights, the ops that ran, and all numbers of one training step."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvit.swap import swap, unswap
from fastvit.testing import compare_runs

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
    """Return what a swap must keep: keys, the identity of Parameters, buffers, modules and hooks, every attribute."""
    attributes = [(name, sorted(module.__dict__), module.training) for name, module in model.named_modules()]
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    buffers = [(name, id(buffer)) for name, buffer in model.named_buffers(remove_duplicate=False)]
    hooks = [
        (name, key, id(hooks), [(number, id(hook)) for number, hook in hooks.items()])
        for name, module in model.named_modules()
        for key, hooks in module.__dict__.items()
        if "hooks" in key and isinstance(hooks, dict)
    ]
    modules = [id(module) for module in model.modules()]
    return list(model.state_dict()), parameters, buffers, modules, hooks, attributes


def listened_to(model: nn.Module) -> list[str]:
    """Register hooks of each kind on ``model`` and on what a swap changes; return the list of what they are told."""
    told: list[str] = []
    changed = [row.name for row in swap(copy.deepcopy(model)).swapped]
    # A backward hook hands query, key and value over as three tensors, even where they were one: only on the root.
    model.register_full_backward_pre_hook(lambda *_: told.append("backward pre"))
    model.register_full_backward_hook(lambda *_: told.append("backward"))
    for name in dict.fromkeys(["", *(name for name in changed if name != "(root)")]):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: told.append(f"pre {name}"), with_kwargs=True)
        module.register_forward_hook(lambda *_, name=name: told.append(f"forward {name}"), always_call=True)
        module.register_state_dict_pre_hook(lambda *_, name=name: told.append(f"state_dict pre {name}"))
        module.register_state_dict_post_hook(lambda *_, name=name: told.append(f"state_dict {name}"))
        module.register_load_state_dict_pre_hook(lambda *_, name=name: told.append(f"load pre {name}"))
        module.register_load_state_dict_post_hook(lambda *_, name=name: told.append(f"load {name}"))
    return told


def run_python(program: str, *arguments: object) -> str:
    """Return what a fresh interpreter prints."""
    finished = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def default_and_math(run: Callable[[], Any]) -> list[Any]:
    """Return what ``run`` gives by SDPA's default path and by its math path."""
    default = run()
    with sdpa_kernel(SDPBackend.MATH):
        return [default, run()]


def torchs_paths(model: nn.Module, run: Callable[[], Any]) -> list[Any]:
    """Return what ``run`` gives by each of torch's own attention paths: default, math, and timm's written out."""
    runs = default_and_math(run)
    switched = [module for module in model.modules() if getattr(module, "fused_attn", None) is True]
    for module in switched:
        module.fused_attn = False
    if switched:
        runs.append(run())
    for module in switched:
        module.fused_attn = True
    return runs


def by_tensor(runs: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Return for each tensor its results in all runs, of which ``compare`` takes the one that errs most."""
    return {key: [run[key] for run in runs] for key in runs[0]}


def hold_the_rule(model: nn.Module, x: Tensor, fused: int, ops: set[str]) -> float:
    """Swap ``model``, compare a training step with float64 under the rule, swap back, and return the worst ratio.

    It also asserts that ``fused`` modules were swapped, that exactly these ops ran, that hooks of each kind fire as
    before, that a state_dict loads strictly in both directions, and that unswapping gives the same objects and hooks
    and, bit for bit, the same numbers.
    """
    twin = copy.deepcopy(model)
    truth = forward_backward(copy.deepcopy(model).double(), x.double())
    runs = torchs_paths(model, lambda: forward_backward(model, x))
    told = listened_to(model)
    before, kinds = state(model), [type(module) for module in model.modules()]
    forward_backward(model, x)
    model.load_state_dict(model.state_dict(), strict=True)
    heard, told[:] = [*told], []
    assert swap(model).counts.get("fused", 0) == fused
    assert state(model) == before
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, x))) == ops
    assert mine.keys() == truth.keys()
    comparisons = compare_runs(mine, truth, runs)
    assert all(comparison.passed for comparison in comparisons), max(comparisons, key=lambda each: each.ratio)
    model.load_state_dict(model.state_dict(), strict=True)
    assert told == heard
    twin.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert len(unswap(model).rows) == fused
    assert [type(module) for module in model.modules()] == kinds
    assert state(model) == before
    restored = forward_backward(model, x)
    assert all(torch.equal(restored[key], runs[0][key]) for key in restored)
    return max(comparison.ratio for comparison in comparisons)
