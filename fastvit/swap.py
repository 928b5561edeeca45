"""Put the fused layers into an existing model, in place, and take them out again.

A swap changes ``module.__class__`` to a subclass of the module's own class. Parameters, buffers, hooks, children, flags
and the module's identity stay the very same objects, so optimizers, tied weights, state_dict keys, deepcopy, pickle,
torch.compile and torch.export keep working, and ``isinstance`` stays true.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.torch_version import TorchVersion

from fastvit.adapters import SwapTable, called_by_name, original_classes, registered_for
from fastvit.adapters.reasons import LOOKS_LIKE_ONE, attends_by, why_not_fused
from fastvit.kernels.spec import Spec
from fastvit.modules.fused import ADDED_ATTRIBUTES, FusedForward, forget_warning
from fastvit.ops.backends import (
    AUTOMATIC_ORDER,
    BACKENDS,
    automatic_order,
    automatic_order_of,
    check_backend_name,
    requested_backend,
)

FUSED, ALREADY_FUSED, LEFT_ALONE, RESTORED = "fused", "already fused", "left alone", "restored"

# Modules whose names differ in such a number only share a line of the table.
NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
DERIVED = (
    "its class was made from the fused one after the swap (parametrize and fully_shard do so): take that back first"
)


@dataclass(frozen=True)
class SwapRow:
    """What happened to one module: ``action`` is "fused", "already fused", "left alone" or "restored"."""

    name: str
    original_type: str
    action: str
    reason: str = ""
    backend: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What a swap did, line by line; ``str(report)`` is a table with one line per group of equal rows."""

    rows: tuple[SwapRow, ...]
    remarks: tuple[str, ...] = field(default=())

    @property
    def swapped(self) -> tuple[SwapRow, ...]:
        """The rows of the modules that run fused now."""
        return tuple(row for row in self.rows if row.action in (FUSED, ALREADY_FUSED))

    @property
    def left_alone(self) -> tuple[SwapRow, ...]:
        """The rows of the modules that look like attention or a patch embedding and were not changed."""
        return tuple(row for row in self.rows if row.action == LEFT_ALONE)

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows per action."""
        return dict(Counter(row.action for row in self.rows))

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to swap: no attention layer and no patch embedding was found"
        lines = []
        for (pattern, kind, action, reason, backend), names in _groups(self.rows).items():
            times = f" ×{len(names)}" if len(names) > 1 else ""
            lines.append((f"{_ranges(pattern, names)}{times}", f"{kind} -> {action}", backend, reason))
        widths = [max(len(line[column]) for line in lines) for column in range(3)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0), strict=True)) for line in lines]
        counts = ", ".join(f"{number} {action}" for action, number in self.counts.items())
        return "\n".join([*(line.rstrip() for line in table), counts, *self.remarks])


def swap(model: nn.Module, *, backend: str | None = None, strict: bool = False) -> SwapReport:
    """Make the attention layers and patch embeddings of ``model`` run the fused ops, in place.

    Args:
        model: any module; only modules whose type is exactly a registered one are changed (see
            :func:`fastvit.adapters.register_swap`), everything else that looks like one is reported with the reason.
        backend: the swapped modules run on this backend or raise; None chooses from the measured order.
        strict: raise, and change nothing, if anything that looks like attention or a patch embedding is left alone.

    Hand over the whole model: torch's nn.TransformerEncoderLayer reads the weights of its ``self_attn`` in inference
    and does not call it, so ``swap(layer.self_attn)`` alone shows in training only, ``swap(layer)`` in both.

    Returns:
        A report. Swapping again changes at most the backend.

    What was compiled before the swap is compiled anew at its next call; before torch 2.14 the swap calls
    ``torch.compiler.reset()`` for that, which forgets everything that the process has compiled.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the backend is unknown, or ``strict`` and something would be left alone. Nothing has changed then.
    """
    _check_model(model)
    check_backend_name(backend)
    table, originals = registered_for(model), original_classes()
    plan = list(_plan(model, table, backend))
    report = SwapReport(tuple(row for _, row in plan), _remarks(backend, plan, table))
    if strict and report.left_alone:
        raise ValueError(f"strict: got True, and not everything can be swapped; nothing was changed\n{report}")
    for module, row in plan:
        if row.action == FUSED:
            module.__class__ = table[type(module)]
        if row.action in (FUSED, ALREADY_FUSED) and isinstance(module, FusedForward):
            _set_backend(module, backend, is_built=_is_built(module, originals))
    if any(row.action == FUSED for _, row in plan):
        _recompile()
    return report


def unswap(model: nn.Module) -> SwapReport:
    """Give every swapped module in ``model`` its own class back and remove what the swap added; return the report.

    A module whose class was derived from the fused one since is reported as left alone, and runs fused on.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_model(model)
    originals = original_classes()
    rows = []
    for name, module in model.named_modules():
        if _is_built(module, originals):
            _set_backend(module, None, is_built=True)
        if type(module) not in originals:
            if _derives_from_swapped(type(module), originals):
                rows.append(SwapRow(name or "(root)", type(module).__name__, LEFT_ALONE, DERIVED))
            continue
        module.__class__ = originals[type(module)]
        for attribute in ADDED_ATTRIBUTES:
            module.__dict__.pop(attribute, None)
        forget_warning(module)
        rows.append(SwapRow(name or "(root)", type(module).__name__, RESTORED))
    if any(row.action == RESTORED for row in rows):
        _recompile()
    return SwapReport(tuple(rows))


def _recompile() -> None:
    """Have compiled code look at the classes again, where torch does not: 2.14 guards on them, 2.11 does not."""
    if "torch._dynamo" in sys.modules and TorchVersion(torch.__version__) < "2.14":
        torch.compiler.reset()


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}; accepted is a torch.nn.Module")


def _plan(model: nn.Module, table: SwapTable, backend: str | None) -> Iterator[tuple[nn.Module, SwapRow]]:
    originals = original_classes()
    shown = backend or "automatic"
    handled: set[int] = set()
    around: dict[int, str] = {}
    for name, module in model.named_modules():
        kind, path = type(module), name or "(root)"
        if id(module) in handled or (kind in table and not table[kind].fastvit_recognises(module)):
            continue
        if isinstance(module, FusedForward):
            is_built = _is_built(module, originals)
            notes = ["built with fastvit.modules"] if is_built else []
            notes += kind.fastvit_fallbacks(module)
            runs_on = backend or _built_backend(module) or shown if is_built else shown
            row = SwapRow(path, originals.get(kind, kind).__name__, ALREADY_FUSED, "; ".join(notes), runs_on)
        elif (how := called_by_name(module)) and not _holds_a_layer(module, table):
            row = SwapRow(path, kind.__name__, ALREADY_FUSED, how, "automatic")
        elif kind in table and not (obstacles := table[kind].fastvit_obstacles(module)):
            notes = table[kind].fastvit_fallbacks(module)
            row = SwapRow(path, kind.__name__, FUSED, "; ".join(notes), shown)
        elif kind in table:
            row = SwapRow(path, kind.__name__, LEFT_ALONE, "; ".join(obstacles))
        elif reason := _why_left_alone(module, table):
            row = SwapRow(path, kind.__name__, LEFT_ALONE, reason)
        else:
            continue
        if row.action != LEFT_ALONE and (said := around.get(id(module))):
            row = replace(row, reason="; ".join(filter(None, (row.reason, said))))
        elif row.action == LEFT_ALONE and (said := _said_around(module, table)):
            around.update(dict.fromkeys(map(id, module.modules()), said))
        # Children of a layer are part of it: proj of a PatchEmbed is no second patch embedding.
        if not _is_container(module, table):
            handled.update(id(child) for child in module.modules())
        yield module, row


def _derives_from_swapped(kind: type[nn.Module], originals: dict[type[nn.Module], type[nn.Module]]) -> bool:
    return any(base in originals for base in kind.__mro__)


def _why_left_alone(module: nn.Module, table: SwapTable) -> str | None:
    kind = type(module)
    base = next((original for original in kind.__mro__ if original in table), None)
    if base and table[base].fastvit_recognises(module):
        return f"a subclass of {base.__name__} that may compute something else; only that exact class is swapped"
    if known := why_not_fused(module):
        return known
    # The innermost module of that name is the layer; one around it is a block, a wrapper or a whole model.
    if not hasattr(module, "fused_attn") and (not _looks_like_one(module) or _holds_a_layer(module, table)):
        return None
    function = attends_by(kind)
    return f"no fused version of {kind.__module__}.{kind.__qualname__}" + (
        f", which calls {function}" if function else ""
    )


def _looks_like_one(module: nn.Module) -> bool:
    kind = type(module)
    return hasattr(module, "fused_attn") or bool(LOOKS_LIKE_ONE.search(kind.__name__)) or attends_by(kind) is not None


def _holds_a_layer(module: nn.Module, table: SwapTable) -> bool:
    return any(_is_a_layer(child, table) for child in module.modules() if child is not module)


def _is_a_layer(module: nn.Module, table: SwapTable) -> bool:
    if isinstance(module, FusedForward) or _looks_like_one(module):
        return True
    return any(
        isinstance(module, original) and fused.fastvit_recognises(module) and not fused.fastvit_obstacles(module)
        for original, fused in table.items()
    )


def _is_container(module: nn.Module, table: SwapTable) -> bool:
    return any(isinstance(module, original) and fused.fastvit_container for original, fused in table.items())


def _said_around(module: nn.Module, table: SwapTable) -> str:
    notes = (fused.fastvit_around for original, fused in table.items() if isinstance(module, original))
    return next(filter(None, notes), "")


def _is_built(module: nn.Module, originals: dict[type[nn.Module], type[nn.Module]]) -> bool:
    """Return whether a module was built with ``fastvit.modules``: it has no class to go back to."""
    return isinstance(module, FusedForward) and not _derives_from_swapped(type(module), originals)


def _built_backend(module: nn.Module) -> str | None:
    """Return the backend that a built module's constructor was given."""
    own = module.__dict__
    return own.get("_fastvit_built_backend", own.get("_fastvit_backend"))


def _set_backend(module: nn.Module, backend: str | None, is_built: bool) -> None:
    """Set or take away the backend of a swap; a built module has its constructor's again without one."""
    own = module.__dict__
    before = _built_backend(module) if is_built else None
    own.pop("_fastvit_built_backend", None)
    own.pop("_fastvit_backend", None)
    if backend is not None:
        own["_fastvit_backend"] = backend
        if is_built:
            own["_fastvit_built_backend"] = before
    elif before is not None:
        own["_fastvit_backend"] = before


def _remarks(backend: str | None, plan: list[tuple[nn.Module, SwapRow]], table: SwapTable) -> tuple[str, ...]:
    # What transformers runs by name may be a class without an adapter, and says nothing about a typical call.
    fused = [module for module, row in plan if row.action == FUSED or isinstance(module, FusedForward)]
    if not fused:
        return ()
    if asked := requested_backend(backend):
        return (f"backend: {asked}: {BACKENDS[asked].description}",)
    picked: dict[str, set[str]] = {}
    for spec in {spec for module in fused if (spec := _typical_spec(_fused_kind(module, table), module))}:
        places = (place.backend for place in automatic_order_of(spec))
        pick = next((name for name in places if not BACKENDS[name].why_not(spec)), "none")
        picked.setdefault(spec.device.type, set()).add(pick)
    here = [f"{device}: the automatic order picks {' and '.join(sorted(names))}" for device, names in picked.items()]
    elsewhere = [
        f"{device}: automatic order {', then '.join(place.backend for place in automatic_order(device))}"
        for device in AUTOMATIC_ORDER
        if device not in picked
    ]
    return (*here, *elsewhere)


def _fused_kind(module: nn.Module, table: SwapTable) -> type[FusedForward]:
    return type(module) if isinstance(module, FusedForward) else table[type(module)]


def _typical_spec(kind: type[FusedForward], module: nn.Module) -> Spec | None:
    """Return a typical call of this module, in the dtype and on the device of its weights."""
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    return kind.fastvit_spec(module, weight.dtype, weight.device)


def _groups(rows: tuple[SwapRow, ...]) -> dict[tuple[str, str, str, str, str], list[str]]:
    groups: dict[tuple[str, str, str, str, str], list[str]] = {}
    for row in rows:
        key = (NUMBER.sub("*", row.name), row.original_type, row.action, row.reason, row.backend)
        groups.setdefault(key, []).append(row.name)
    return groups


def _ranges(pattern: str, names: list[str]) -> str:
    columns = zip(*(NUMBER.findall(name) for name in names), strict=True)
    for column in columns:
        numbers = sorted({int(number) for number in column})
        first, last = numbers[0], numbers[-1]
        if len(numbers) == last - first + 1:
            shown = str(first) if first == last else f"{first}-{last}"
        else:
            shown = ",".join(map(str, numbers))
        pattern = pattern.replace("*", shown, 1)
    return pattern
