"""Which module classes can be swapped, and for what: one small table that other libraries can add to."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from typing import Any, cast

from torch import nn

from fastvit.modules.fused import FusedForward

# Libraries are never imported for their own sake: a model that holds their modules has imported them already.
ADAPTERS = {
    "torch.nn": "fastvit.adapters.torch_nn",
    "timm.layers": "fastvit.adapters.timm_vit",
    # timm.layers comes first: its adapter imports timm.models, where the others' classes are.
    "timm.models.eva": "fastvit.adapters.timm_eva",
    "timm.models.cait": "fastvit.adapters.timm_pool",
    "timm.models.mvitv2": "fastvit.adapters.timm_overlapping",
    "open_clip.transformer": "fastvit.adapters.open_clip_vit",
    "dinov2.layers.attention": "fastvit.adapters.dinov2",
    "dinov3.layers.attention": "fastvit.adapters.dinov3",
    "fastvit.models.vit": "fastvit.adapters.reference_vit",
    "transformers.modeling_utils": "fastvit.adapters.transformers_models",
}

# The name by which transformers' models can run our attention without a swap (fastvit.register_transformers).
TRANSFORMERS_NAME = "fastvit"

SwapTable = dict[type[nn.Module], type[FusedForward]]

_FUSED: SwapTable = {}

# Adapters of libraries in a version that they cannot import; each is tried and warned about once.
_UNSUPPORTED: set[str] = set()

# The fused classes of subclasses that nobody registered, made when the first model with one is swapped.
_DERIVED: SwapTable = {}

# Every fused class there ever was, so that a module swapped before a replacement can still be taken back.
_ORIGINALS: dict[type[nn.Module], type[nn.Module]] = {}


def register_swap(original: type[nn.Module], fused: type[nn.Module], *, replace: bool = False) -> None:
    """Let ``fastvit.swap`` turn instances whose type is exactly ``original`` into ``fused``.

    An attention with ``qkv``, ``proj`` and ``num_heads`` needs a class of one line, as here; for another shape write
    the forward, as the files of fastvit/adapters do::

        import fastvit
        from torch import nn

        class MyAttention(nn.Module):
            def __init__(self, dim, num_heads):
                super().__init__()
                self.num_heads = num_heads
                self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
            def forward(self, x):
                query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
                heads = nn.functional.scaled_dot_product_attention(query, key, value)
                return self.proj(heads.transpose(1, 2).flatten(2))

        class FusedMyAttention(fastvit.modules.FusedAttentionForward, MyAttention): pass
        fastvit.register_swap(MyAttention, FusedMyAttention)
        print(fastvit.swap(nn.Sequential(MyAttention(64, 4))))

    Subclasses of ``original`` are left alone, because they may compute something else; register each that may be
    swapped. Registering the same pair again does nothing. Modules that were swapped before a replacement keep the class
    that they have until ``unswap``.

    Args:
        original: a module class.
        fused: a subclass of ``original`` with a :class:`fastvit.modules.FusedForward` in front, at the top level of a
            module that can be imported, so that pickle finds it. It may not need attributes that ``original`` does not
            set, and its ``forward`` takes what that of ``original`` takes.
        replace: take ``fused`` instead of another class that is registered for ``original``.

    Raises:
        TypeError: one of the two is no such class, or ``fused`` does not describe itself.
        ValueError: ``fused`` stands in the wrong order or place, its forward lacks arguments, or ``original`` has
            another fused class and ``replace`` is False. The message says which.
    """
    if not (isinstance(original, type) and issubclass(original, nn.Module)):
        raise TypeError(f"original: got {original!r}; accepted is a subclass of torch.nn.Module")
    if issubclass(original, FusedForward):
        raise TypeError(f"original: got {original!r}; accepted is a plain class, and this one is fused")
    if not (isinstance(fused, type) and issubclass(fused, original) and issubclass(fused, FusedForward)):
        raise TypeError(f"fused: got {fused!r}; accepted is a subclass of FusedForward and of {original.__name__}")
    _check_order(original, fused)
    _check_forward(original, fused)
    if getattr(sys.modules.get(fused.__module__), fused.__qualname__, None) not in (fused, None):
        raise ValueError(f"fused: got {fused!r}; another {fused.__qualname__} stands in {fused.__module__}")
    if "." in fused.__qualname__:
        raise ValueError(f"fused: got {fused!r}; accepted is a class at the top level of a module, for pickle")
    if (present := _FUSED.get(original, fused)) is not fused and not replace:
        raise ValueError(
            f"original: got {original!r}, for which {present!r} is registered; replace=True takes its place"
        )
    _FUSED[original] = fused
    _ORIGINALS[fused] = original


def _check_order(original: type[nn.Module], fused: type[FusedForward]) -> None:
    order = fused.__mro__
    plain = next(kind for kind in order if issubclass(kind, nn.Module) and not issubclass(kind, FusedForward))
    if order.index(FusedForward) > order.index(original):
        raise ValueError(f"fused: got {fused!r}; the FusedForward must stand in front of {original.__name__}")
    if plain is not original:
        raise ValueError(
            f"fused: got {fused!r}, whose plain class is {plain.__name__}; accepted is {original.__name__}"
        )
    described = ("fastvit_obstacles", "fastvit_fallbacks", "fastvit_spec")
    if missing := [name for name in described if getattr(fused, name).__func__ is vars(FusedForward)[name].__func__]:
        raise TypeError(f"fused: got {fused!r}; it must define {', '.join(missing)}")


def _check_forward(original: type[nn.Module], fused: type[FusedForward]) -> None:
    """Raise if ``fused``'s forward lacks an argument: the first goes by place, all others may be given by name."""
    theirs, ours = (list(inspect.signature(kind.forward).parameters.values())[1:] for kind in (original, fused))
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in (*theirs, *ours)):
        return
    accepted = {parameter.name for parameter in ours[1:]}
    if lacking := [parameter.name for parameter in theirs[1:] if parameter.name not in accepted]:
        raise ValueError(
            f"fused: got {fused!r}, whose forward lacks {', '.join(lacking)} of {original.__name__}'s; accepted is a "
            "forward with the same arguments"
        )


def registered() -> SwapTable:
    """Return the table, with the adapters of the libraries that are imported by now."""
    for library, adapter in ADAPTERS.items():
        if library in sys.modules and adapter not in _UNSUPPORTED:
            try:
                loaded = importlib.import_module(adapter)
            except ImportError as error:
                # Another version of one library is no reason to refuse the models of the others.
                _UNSUPPORTED.add(adapter)
                name = library.partition(".")[0]
                warnings.warn(
                    f"fastvit: the layers of this {name} are left alone, because it lacks what their adapter needs: "
                    f"{error}",
                    stacklevel=2,
                )
                continue
            # A library with one file for each model is imported piece by piece, and so is its adapter.
            getattr(loaded, "register_loaded", lambda: None)()
    return {**_DERIVED, **_FUSED}


def registered_for(model: nn.Module) -> SwapTable:
    """Return the table, with a class for each subclass in ``model`` that is known to compute what its base does."""
    table = registered()
    for kind in {type(module) for module in model.modules()} - table.keys():
        base = next((original for original in kind.__mro__ if original in _FUSED), None)
        if base and not issubclass(kind, FusedForward) and _FUSED[base].fastvit_derives(kind):
            table[kind] = derived_class(_FUSED[base], kind)
    return table


def derived_class(fused: type[FusedForward], kind: type[nn.Module]) -> type[FusedForward]:
    """Return the one class that puts ``fused`` in front of a subclass of its plain class."""
    if kind not in _DERIVED:
        contents = {"__module__": fused.__module__, "__doc__": fused.__doc__, "__reduce_ex__": _reduce_derived}
        made = type(f"Fused{kind.__name__}", (fused, kind), contents)
        _DERIVED[kind], _ORIGINALS[made] = made, kind
    return _DERIVED[kind]


# pickle finds a class by its name, and one that was made has none.
def _reduce_derived(module: Any, protocol: Any) -> tuple[Any, ...]:
    fused, kind = type(module).__bases__
    return _new_derived, (fused, kind), module.__getstate__()


def _new_derived(fused: type[FusedForward], kind: type[nn.Module]) -> nn.Module:
    made = derived_class(fused, kind)
    return made.__new__(made)


def runs_fused(module: nn.Module) -> bool:
    """Return whether a swap makes this module run an op, or has done so."""
    if isinstance(module, FusedForward):
        return True
    fused = _FUSED.get(type(module))
    return fused is not None and fused.fastvit_recognises(module) and not fused.fastvit_obstacles(module)


def original_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Return the plain class of every fused class, those included that were replaced in the table since."""
    registered()
    return dict(_ORIGINALS)


def called_by_name(module: nn.Module) -> str | None:
    """Return how a library calls our ops for this layer without a swap; None if it does not."""
    for adapter in ADAPTERS.values():
        loaded = sys.modules.get(adapter)
        if loaded is not None and (how := getattr(loaded, "called_by_name", lambda _: None)(module)):
            return cast(str, how)
    return None


def register_transformers() -> None:
    """Make ``attn_implementation="fastvit"`` known to transformers, for models that are to run fused without a swap.

    ``AutoModel.from_config(config, attn_implementation="fastvit")``, ``from_pretrained(…, attn_implementation=…)`` and
    ``model.set_attn_implementation("fastvit")`` work from then on, with the masks that transformers makes for SDPA.
    It imports transformers; ``fastvit.swap`` on a transformers model registers the name too.

    Raises:
        ImportError: transformers is missing.
    """
    importlib.import_module("fastvit.adapters.transformers_attention").register()
