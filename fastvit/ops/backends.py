"""Which backend runs a call: specs, the table of backends, the automatic order, and why each one can or cannot.

A spec is the metadata of one call (sizes, dtype, device, features) and nothing else decides, so a compiled graph is the
same whichever backend runs. The automatic order is earned by committed measurements (``Place.evidence``); a backend
without one is available by name and never chosen by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch

from fastvit.kernels import native
from fastvit.kernels.spec import AttentionSpec, Spec


@dataclass(frozen=True)
class Backend:
    """One implementation of both ops: a kernel module, loaded at first use, behind ``why_not``."""

    name: str
    module: str | None
    description: str
    absent: str = ""

    def load(self) -> ModuleType:
        """Import the kernel module; it offers ``attention_forward``, ``patch_embed_forward``, … (see kernels/)."""
        if self.module is None:
            raise RuntimeError(f"backend '{self.name}': {self.absent}")
        return importlib.import_module(self.module)

    def why_not(self, spec: Spec) -> list[str]:
        """Return the reasons why this backend cannot run ``spec``; empty means that it can."""
        if self.module is None:
            return [self.absent]
        kernels = self.load()
        check = kernels.attention_why_not if isinstance(spec, AttentionSpec) else kernels.patch_embed_why_not
        return list(check(spec))


@dataclass(frozen=True)
class Place:
    """A backend's place in an automatic order, and the committed file that earned it."""

    backend: str
    evidence: str


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpu", "fastvit.kernels.native", "C++ for the CPU, one source compiled per instruction set"),
        Backend("triton", "fastvit.kernels.triton", "Triton for NVIDIA sm_80 to sm_100 and AMD gfx942"),
        Backend("cuda", "fastvit.kernels.cuda", "CUDA C++ for NVIDIA sm_80 and up"),
        Backend("reference", "fastvit.kernels.reference", "plain torch with the N×N matrix: the specification"),
    )
}

# The reference needs no measurement: it is the definition, and the only one left when nothing else has earned a place.
SPECIFICATION = Place("reference", "none needed: the specification")
AUTOMATIC_ORDER: dict[str, tuple[Place, ...]] = {
    "cpu": (Place("cpu", "benchmarks/results/cpu-intel-xeon-processor-2026-12-01.csv"), SPECIFICATION),
}


class Measured(NamedTuple):
    """Where a measurement holds: a device family ("sm_90", "gfx942"), an op, and a class of its shapes."""

    family: str
    op: str
    shapes: str


# What was measured more closely: these places come before those of the device type. A backward pass has the place of
# its forward pass. `python -m benchmarks.places FILE…` prints what the rows of committed files earn, and a test fails
# where this table says otherwise. Empty: no GPU has been measured.
MEASURED_ORDER: dict[Measured, tuple[Place, ...]] = {}
_NATIVE_IS_FIRST = AUTOMATIC_ORDER["cpu"][0].backend == "cpu"
# False where every call must pass through the functions of kernels/native.py, because a test has replaced one.
direct_calls = True

_requested: ContextVar[str | None] = ContextVar("fastvit_backend", default=None)
# What a backward pass asks for whose forward pass asked for nothing: the automatic choice, whatever block is around it.
AUTOMATIC = "automatic"


def automatic_order(device_type: str) -> tuple[Place, ...]:
    """Return the places that have earned automatic choice on ``device_type``, best first."""
    return AUTOMATIC_ORDER.get(device_type, (SPECIFICATION,))


def automatic_order_of(spec: Spec) -> tuple[Place, ...]:
    """Return the places for one call: those measured for its device family and shapes, then the device type's."""
    op = "attention" if isinstance(spec, AttentionSpec) else "patch_embed"
    measured = MEASURED_ORDER.get(Measured(device_family(spec.device), op, shape_class(spec)), ())
    names = {place.backend for place in measured}
    return measured + tuple(place for place in automatic_order(spec.device.type) if place.backend not in names)


@functools.lru_cache(maxsize=64)
def device_family(device: torch.device) -> str:
    """Return "sm_90" for an NVIDIA GPU, "gfx942" for one of AMD, and the device's type for anything else."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# The longest sequence of a class: windows and small images; what a block of the CUDA kernels can hold whole.
SHORT, MEDIUM = 64, 600
# Tokens of all images, where a GPU begins to have a tile for each multiprocessor.
FEW_TOKENS = 2048


def shape_class(spec: Spec) -> str:
    """Return which shapes a call is measured with: by N "short", "medium" or "long", by patches "few" or "many"."""
    if isinstance(spec, AttentionSpec):
        seqlen = max(spec.seqlen_q, spec.seqlen_k)
        return "short" if seqlen <= SHORT else "medium" if seqlen <= MEDIUM else "long"
    rows, columns = spec.grid
    return "few" if spec.batch * rows * columns <= FEW_TOKENS else "many"


def check_backend_name(name: str | None) -> None:
    """Raise ValueError unless ``name`` is None or a known backend."""
    if name is not None and name not in BACKENDS and name != AUTOMATIC:
        raise ValueError(f"backend: got {name!r}; accepted are {', '.join(map(repr, BACKENDS))} and None (automatic)")


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Run every fastvit op inside the block on this backend, or raise: never a silent fallback.

    Args:
        name: one of ``fastvit.ops.backends.BACKENDS``; None restores the automatic choice.

    The choice belongs to the current thread or task (a context variable), nests, and yields to an explicit
    ``backend=`` argument. A backward pass runs on the backend that its forward pass was asked to use; of compiled
    code, on the one that was asked for when it was compiled. What torch.utils.checkpoint runs again in backward is
    outside the block if backward is. ``backend=`` of an op and of :func:`fastvit.swap` hold in both cases.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: from an op that the backend cannot run, with every backend's reasons.
    """
    check_backend_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend(explicit: str | None) -> str | None:
    """Return the explicit backend, else the one of the enclosing ``fastvit.backend`` block, else None."""
    name = explicit if explicit is not None else _requested.get()
    return None if name == AUTOMATIC else name


def runs_natively(explicit: str | None) -> bool:
    """Return whether a call on CPU tensors, of a spec that the ``cpu`` backend can run, runs on that backend.

    It is what :func:`select` would find, without a spec.
    """
    name = requested_backend(explicit)
    chosen = _NATIVE_IS_FIRST if name is None else name == "cpu"
    return chosen and direct_calls and native.load_error() is None


def select(spec: Spec, explicit: str | None = None) -> ModuleType:
    """Return the kernel module that runs ``spec``: the requested one, else the first that can, in the earned order.

    Raises:
        RuntimeError: the requested backend cannot run this call; the message has every backend's reasons.
    """
    return _select(spec, requested_backend(explicit))


@functools.lru_cache(maxsize=4096)
def _select(spec: Spec, name: str | None) -> ModuleType:
    if name is not None:
        check_backend_name(name)
        if BACKENDS[name].why_not(spec):
            raise RuntimeError(f"backend '{name}' cannot run this call.\n{_reasons(spec)}")
        return BACKENDS[name].load()
    for place in automatic_order_of(spec):
        chosen = BACKENDS[place.backend]
        if not chosen.why_not(spec):
            if chosen.name == "reference":
                _warn_reference(spec.device.type)
            return chosen.load()
    raise RuntimeError(f"no backend can run this call.\n{_reasons(spec)}")


@functools.cache
def _warn_reference(device_type: str) -> None:
    others = [name for name in BACKENDS if name != "reference"]
    warnings.warn(
        f"fastvit runs its plain-torch reference on {device_type!r}: no faster backend has both a committed "
        f"measurement on this kind of device and a way to run here. Ask for one by name ({', '.join(others)}): "
        'with fastvit.backend("triton"): …; `fastvit env` says what each can do.',
        stacklevel=2,
    )


@dataclass(frozen=True)
class Explanation:
    """What one backend says about one spec."""

    backend: str
    reasons: tuple[str, ...]
    automatic: bool
    evidence: str

    def __str__(self) -> str:
        if self.reasons:
            return f"{self.backend}: cannot: {'; '.join(self.reasons)}"
        return f"{self.backend}: can; " + ("chosen automatically" if self.automatic else f"by name ({self.evidence})")


def explain(spec: Spec) -> list[Explanation]:
    """Return, for every backend, whether it can run ``spec``, why not, and whether it would be chosen by itself."""
    places = {place.backend: place for place in automatic_order_of(spec)}
    can = {name: tuple(candidate.why_not(spec)) for name, candidate in BACKENDS.items()}
    winner = next((name for name in places if not can[name]), None)
    return [
        Explanation(
            name,
            reasons,
            name == winner,
            places[name].evidence if name in places else f"no committed measurement on {spec.device.type}",
        )
        for name, reasons in can.items()
    ]


def _reasons(spec: Spec) -> str:
    return "\n".join(f"  {line}" for line in explain(spec))


def reset_selection() -> None:
    """Forget cached choices; needed only after the environment that ``why_not`` reads has changed (tests)."""
    _select.cache_clear()
