"""A whole model under the tolerance rule: what it computes after a swap, and every parameter's gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fastvit.adapters import TRANSFORMERS_NAME
from fastvit.modules.fused import FusedForward
from fastvit.swap import swap, unswap
from fastvit.testing.precision import ieee_float32
from fastvit.testing.rule import Comparison, compare

FEWEST_ELEMENTS = 8
# Of float64: what is below this part of its neighbour is the rest of a sum that cancels.
CANCELLED = 1e-12


@ieee_float32()
def check_model(
    model: nn.Module, *inputs: Any, backend: str | None = None, backward: bool = True, **keywords: Any
) -> list[Comparison]:
    """Swap a copy of ``model`` and apply the rule to its outputs and to the gradient of every parameter.

    Args:
        model: any module in float32, float16 or bfloat16 without randomness (``eval()``, or no dropout). It stays as it
            is; a few copies of it live at once. In the copies that stand for PyTorch, layers that are swapped already
            are restored, those built with ``fastvit.modules`` run their plain forward, and transformers' layers that
            call fastvit by name call SDPA.
        inputs, keywords: of its forward; floating tensors are widened for the float64 run.
        backend: as in :func:`fastvit.swap`.
        backward: also differentiate a fixed random weighting of the outputs.

    Returns:
        A comparison for each floating output ("output 0", …) and, under its name, for each parameter's gradient.
        PyTorch's own result is, for each tensor, the one that errs most of its default attention, its math path,
        attention written out where the model offers that (timm's ``fused_attn``, transformers' "eager"), and the
        convolutions that cut patches as unfold and a product: in a chain of layers the largest error of a single run
        is a draw of luck.

    Raises:
        ValueError: the model returns no floating tensor.
    """
    plain, swapped = _plain_copy(model), copy.deepcopy(model)
    swap(swapped, backend=backend)
    expected = _run(copy.deepcopy(plain).double(), _widened(inputs), _widened(keywords), backward)
    own = []
    for variant, context in _own_paths(plain):
        with context:
            own.append(_run(variant, inputs, keywords, backward))
    return compare_runs(_run(swapped, inputs, keywords, backward), expected, own)


def compare_runs(
    actual: dict[str, Tensor], expected: dict[str, Tensor], own: Sequence[dict[str, Tensor]]
) -> list[Comparison]:
    """Apply the rule to all named tensors of a run of a model; PyTorch's own error is the largest of several runs.

    Two kinds of gradients need more than the tensor itself, because the rule compares largest errors:

    - of fewer than ``FEWEST_ELEMENTS``: one error each is a draw of luck, so they are compared together;
    - of a bias that the model is blind to (a softmax to a bias of its keys): the truth is 0, what is left are roundings
      of a sum that cancels, and how well it cancels is luck. The weight beside it is a sum over the same tokens that
      does not cancel; its error counts to the bias's own.
    """
    small = {name for name, tensor in expected.items() if tensor.numel() < FEWEST_ELEMENTS}
    comparisons = []
    for name in (name for name in expected if name not in small):
        comparison = compare(actual[name], expected[name], [run[name] for run in own], name)
        weight = f"{name.removesuffix('bias')}weight"
        if not comparison.passed and name.endswith("bias") and weight in expected:
            cancels = expected[name].abs().max() <= CANCELLED * expected[weight].abs().max()
            if cancels:
                beside = compare(actual[weight], expected[weight], [run[weight] for run in own])
                torch_error = comparison.torch_error + beside.torch_error
                ratio = comparison.error / (2 * torch_error) if torch_error else torch.inf
                comparison = replace(comparison, torch_error=torch_error, ratio=ratio, passed=ratio <= 1.0)
        comparisons.append(comparison)
    if small:
        together = [torch.cat([run[name].flatten() for name in sorted(small)]) for run in (actual, expected, *own)]
        comparisons.append(compare(together[0], together[1], together[2:], f"{len(small)} small tensors together"))
    return comparisons


def livened(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values and set eval mode: attention that is not flat, layer scales that count.

    The dense layers shrink what they are given, so that a dozen of them do not amplify one rounding until it is all
    that the tolerance rule sees.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1
            if parameter.dim() > 1 and name.endswith("weight"):
                spread = (1.0 if ".qkv." in name else 0.5) * parameter[0].numel() ** -0.5
            one = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            parameter.copy_(float(one) + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy in which no layer calls an op of ours."""
    plain = copy.deepcopy(model)
    unswap(plain)
    for module in plain.modules():
        if isinstance(module, FusedForward):
            kinds = (kind for kind in type(module).__mro__ if not issubclass(kind, FusedForward))
            forward = next(kind.__dict__["forward"] for kind in kinds if "forward" in kind.__dict__)
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        by_name = getattr(getattr(module, "config", None), "_attn_implementation", None) == TRANSFORMERS_NAME
        if by_name and hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")  # type: ignore[operator]
    return plain


def _own_paths(model: nn.Module) -> Iterator[tuple[nn.Module, AbstractContextManager[Any]]]:
    yield model, nullcontext()
    yield model, sdpa_kernel(SDPBackend.MATH)
    written_out = copy.deepcopy(model)
    switches = [module for module in written_out.modules() if getattr(module, "fused_attn", None) is True]
    for module in switches:
        module.fused_attn = False  # type: ignore[assignment]
    is_transformers = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
    if is_transformers:
        written_out.set_attn_implementation("eager")  # type: ignore[operator]
    if switches or is_transformers:
        yield written_out, nullcontext()
    unfolded = copy.deepcopy(model)
    convolutions = [module for module in unfolded.modules() if type(module) is nn.Conv2d and _cuts_patches(module)]
    for convolution in convolutions:
        convolution.__class__ = _UnfoldedConv2d
    if convolutions:
        yield unfolded, nullcontext()


def _cuts_patches(convolution: nn.Conv2d) -> bool:
    is_plain = convolution.groups == 1 and convolution.padding_mode == "zeros" and max(convolution.dilation) == 1
    return is_plain and not isinstance(convolution.padding, str) and min(convolution.stride) > 1


class _UnfoldedConv2d(nn.Conv2d):
    """A Conv2d as unfold and a product, PyTorch's other implementation of it."""

    def forward(self, input: Tensor) -> Tensor:
        padding = cast(tuple[int, int], self.padding)  # no str: see _cuts_patches
        sizes = zip(input.shape[2:], self.kernel_size, self.stride, padding, strict=True)
        grid = [(size + 2 * around - kernel) // stride + 1 for size, kernel, stride, around in sizes]
        patches = F.unfold(input, self.kernel_size, 1, padding, self.stride).transpose(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, grid)


def _widened(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def _run(model: nn.Module, inputs: Any, keywords: Any, backward: bool) -> dict[str, Tensor]:
    leaves = pytree.tree_leaves(model(*inputs, **keywords))
    outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not outputs:
        raise ValueError(f"model: got {type(model).__name__}, which returns no floating tensor; nothing to compare")
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if backward and parameters:
        generator = torch.Generator().manual_seed(3)
        reached = [output for output in outputs if output.requires_grad]
        weights = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype) for o in reached
        ]
        total = torch.stack([(o * w).sum() for o, w in zip(reached, weights, strict=True)]).sum()
        grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        results |= {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    return results
