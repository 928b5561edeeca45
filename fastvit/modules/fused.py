"""What every module with a fused forward shares: its backend, and saying when it steps back to the plain forward."""

from __future__ import annotations

import warnings
import weakref
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules import module as torchs_module

from fastvit.kernels.spec import Spec

ADDED_ATTRIBUTES = ("_fastvit_backend", "_fastvit_built_backend")
# Modules that have said that they run their plain forward. Not in the modules: a copy or a saved one has not said it.
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class FusedForward(nn.Module):
    """Mixin in front of a plain module class: its forward runs an op, or the plain class's forward where the op cannot.

    The mixin adds no parameter, buffer or child. ``ADDED_ATTRIBUTES`` are all that it may put into an instance.
    """

    fastvit_kind: ClassVar[str]
    # A layer around other layers, whose children have rows and classes of their own.
    fastvit_container: ClassVar[bool] = False
    # What the rows of the layers inside have to say where a container of this kind is left alone.
    fastvit_around: ClassVar[str] = ""
    _fastvit_backend: str | None = None

    @classmethod
    def fastvit_recognises(cls, module: nn.Module) -> bool:
        """Return whether an instance of the plain class is such a layer: not every convolution embeds patches."""
        return True

    @classmethod
    def fastvit_derives(cls, kind: type[nn.Module]) -> bool:
        """Return whether this subclass of the plain class is known to compute the same, and may be swapped too."""
        return False

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why an instance of the plain class cannot take this forward at all; empty means that it can."""
        raise NotImplementedError

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        raise NotImplementedError

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> Spec | None:
        """Return what the op would be asked for one image of 14×14 patches, for the report; None if nobody can say."""
        raise NotImplementedError

    def _warn_fallback(self, reason: str) -> None:
        # A warning is a graph break in some compilers, and a compiled module has been warned about when it ran eagerly.
        if torch.compiler.is_compiling() or self in _WARNED:
            return
        _WARNED.add(self)
        warnings.warn(f"{type(self).__name__}: {reason}, so this module runs its plain forward", stacklevel=3)

    def __prepare_scriptable__(self) -> nn.Module:
        """Say what to do when torch.jit.script asks (it would fail on the first thing it does not understand)."""
        raise NotImplementedError(
            f"fastvit {type(self).__name__}: torch.jit.script is not supported (torch itself deprecates it); use "
            "torch.jit.trace, torch.export or torch.compile, or fastvit.unswap the model first"
        )

    def extra_repr(self) -> str:
        """Return the plain class's text, the backend, and where the plain forward runs."""
        notes = [f"backend={self._fastvit_backend or 'automatic'}", *self.fastvit_fallbacks(self)]
        plain = super().extra_repr()
        return "; ".join([plain, *notes] if plain else notes)


def forget_warning(module: nn.Module) -> None:
    """Have a module say again that it runs its plain forward, should it be swapped another time."""
    _WARNED.discard(module)


def has_hooks(module: nn.Module) -> bool:
    """Return whether any forward or backward hook is registered on the module itself."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Return whether a hook is registered for every module there is, as tools that count by module do."""
    return bool(
        torchs_module._global_forward_hooks
        or torchs_module._global_forward_pre_hooks
        or torchs_module._global_backward_hooks
        or torchs_module._global_backward_pre_hooks
    )


def hook_on(module: nn.Module) -> str | None:
    """Return what a call of ``module`` would fire, "a hook" or "a global hook"; None if nobody listens."""
    if has_hooks(module):
        return "a hook"
    return "a global hook" if has_global_hooks() else None


def has_own_forward(module: nn.Module) -> bool:
    """Return whether ``forward`` was replaced on the instance, where a class's forward no longer counts."""
    return "forward" in module.__dict__


def own_obstacles(module: nn.Module, known: frozenset[str] | None = None) -> list[str]:
    """Return why this instance cannot take any fused forward: its own forward, or parts that are not ``known``."""
    obstacles = ["its forward was replaced on the instance"] if has_own_forward(module) else []
    parts = [*module._modules, *module._parameters, *module._buffers]
    if unknown := [name for name in parts if known is not None and name not in known]:
        obstacles.append(f"it has parts that fastvit does not know: {', '.join(unknown)}")
    return obstacles
