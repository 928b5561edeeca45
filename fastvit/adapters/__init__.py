"""Which module classes can be swapped, and for what: one small table that other libraries can add to."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from fastvit.modules.fused import FusedForward

# Libraries are never imported for their own sake: a model that holds their modules has imported them already.
ADAPTERS = {
    "torch.nn": "fastvit.adapters.torch_nn",
    "timm.layers": "fastvit.adapters.timm_vit",
    "fastvit.models.vit": "fastvit.adapters.reference_vit",
    "transformers.modeling_utils": "fastvit.adapters.transformers_models",
}

SwapTable = dict[type[nn.Module], type[FusedForward]]

_FUSED: SwapTable = {}


def register_swap(original: type[nn.Module], fused: type[nn.Module]) -> None:
    """Let ``fastvit.swap`` turn instances whose type is exactly ``original`` into ``fused``.

    Args:
        original: a module class.
        fused: a subclass of ``original`` with a :class:`fastvit.modules.fused.FusedForward` in front, at the top level
            of an importable module, so that pickle finds it. It may not need attributes that ``original`` does not set.

    Raises:
        TypeError, ValueError: ``fused`` is no such class; the message says why.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise TypeError(f"original: got {original!r}; accepted is a subclass of torch.nn.Module")
    if not (isinstance(fused, type) and issubclass(fused, original) and issubclass(fused, FusedForward)):
        raise TypeError(f"fused: got {fused!r}; accepted is a subclass of FusedForward and of {original.__name__}")
    if getattr(sys.modules.get(fused.__module__), fused.__qualname__, None) not in (fused, None):
        raise ValueError(f"fused: got {fused!r}; another {fused.__qualname__} stands in {fused.__module__}")
    if "." in fused.__qualname__:
        raise ValueError(f"fused: got {fused!r}; accepted is a class at the top level of a module, for pickle")
    _FUSED[original] = fused


def registered() -> SwapTable:
    """Return the table, with the adapters of the libraries that are imported by now."""
    for library, adapter in ADAPTERS.items():
        if library in sys.modules:
            loaded = importlib.import_module(adapter)
            # A library with one file for each model is imported piece by piece, and so is its adapter.
            getattr(loaded, "register_loaded", lambda: None)()
    return dict(_FUSED)


def register_transformers() -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers, for models that are to run fused without a swap.

    ``AutoModel.from_config(config, attn_implementation="fastvit")``, ``from_pretrained(…, attn_implementation=…)`` and
    ``model.set_attn_implementation("fastvit")`` work from then on, with the masks that transformers makes for SDPA.
    It imports transformers; ``fastvit.swap`` on a transformers model registers the name too.

    Raises:
        ImportError: transformers is missing.
    """
    importlib.import_module("fastvit.adapters.transformers_attention").register()
