"""Autograd for the ops that ``torch.func`` and forward mode understand too.

``torch.library.register_autograd`` (torch 2.11 to 2.14) makes a function that refuses every ``torch.func`` transform,
and passes forward-mode tangents by: the result would have none, which reads as a derivative of zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

SetupContext = Callable[[Any, Any, Any], None]
Backward = Callable[..., Any]


def register_autograd(
    library: torch.library.Library, op: Any, backward: Backward, setup_context: SetupContext | None = None
) -> None:
    """Register the derivative of ``op``, an OpOverload.

    Args:
        library: the fragment that owns ``op``.
        backward: ``backward(ctx, *grads)`` returns one gradient or None per argument.
        setup_context: ``setup_context(ctx, inputs, output)`` saves what backward needs.

    A call with forward-mode tangents raises NotImplementedError.
    """
    # At one level of torch.func the function belongs to that level, as the C++ derivatives of torch's own ops do: its
    # forward passes the call on to the next level, which differentiates or batches it in its turn.
    plain: Any = _function(torch.autograd.Function, op, backward, setup_context)
    one_level: Any = _function(_SingleLevelFunction, op, backward, setup_context)

    def differentiable(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(arg) for arg in args):
            raise NotImplementedError(
                f"fastvit {op._opname.split('_backward')[0]}: forward-mode differentiation (torch.func.jvp, jacfwd, "
                "hessian, torch.autograd.forward_ad) is not supported; use reverse mode (torch.func.vjp, jacrev), or "
                "fastvit.unswap the model"
            )
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(op, keyset, args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return one_level.apply(*args, keyset)
        return plain.apply(*args, keyset)

    library.impl(op._opname, differentiable, "Autograd", with_keyset=True)


def _function(base: type, op: Any, backward: Backward, setup_context: SetupContext | None) -> type:
    """Return a Function whose arguments are the op's and, last, the keys with which the op was called."""
    is_one_level = base is _SingleLevelFunction

    # Saving in forward, because with a setup_context of its own a Function inspects its signature in every call.
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        if is_one_level:
            # A forward runs with both kinds of gradients off; the next level has to see them on, or a derivative of a
            # derivative would silently be zero.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                output = _below_autograd(op, keyset, inputs)
        else:
            output = _below_autograd(op, keyset, inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *backward(ctx, *grads), None

    name = "".join(part.capitalize() for part in (op.namespace, *op._opname.split("_")))
    return type(name, (base,), {"forward": staticmethod(forward), "backward": staticmethod(differentiate)})


def _below_autograd(op: Any, keyset: Any, args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _has_tangent(value: object) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
