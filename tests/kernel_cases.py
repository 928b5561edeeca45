"""Cases that together launch every CUDA kernel there is: for the tests that run them, and the one that counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

import fastvit
from benchmarks.cuda_resources import demangle
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase

DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64, 72, 80, 88, 96, 104, 128)
# Kernels differ by whether a call is masked: each kind of mask, and none.
MASKS: tuple[dict, ...] = ({}, {"bias": "additive"}, {"bias": "bool", "is_causal": True})
# Of the lengths of vision transformers none is for 128 keys at a time at D = 64; 450 is.
SM90_SEQLENS = {
    64: (1, 7, 49, 50, 64, 196, 197, 256, 257, 450, 577, 1025),
    128: (1, 7, 49, 50, 64, 196, 197, 256, 257, 577, 1025),
}


@dataclass(frozen=True)
class KernelCase:
    """A case, the emulated device (arguments of ``configure``) that runs it, and the kernels that this launches."""

    case: AttentionCase | PatchEmbedCase
    families: frozenset[str]
    device: dict[str, int] = field(default_factory=dict)
    form: str = "automatic"
    backward: bool = True

    def run(self) -> None:
        """Make the calls, forward and backward, and drop what comes back."""
        tensors = self.case.tensors()
        grad_output = tensors.pop("grad_output")
        if isinstance(self.case, PatchEmbedCase):
            leaves = [t.requires_grad_() for t in tensors.values() if t is not None]
            output = fastvit.patch_embed(*leaves, backend="cuda")
        else:
            leaves = [t.detach().requires_grad_(self.backward) for t in list(tensors.values())[:3] if t is not None]
            output = fastvit.attention(
                *leaves, bias=tensors["bias"], is_causal=self.case.is_causal, scale=self.case.scale, backend="cuda"
            )
        if self.backward:
            torch.autograd.grad(output, leaves, grad_output)


FORWARD, BACKWARD = "attention_forward_", "attention_backward_"
RESIDENT, STREAMING = frozenset({FORWARD + "resident"}), frozenset({FORWARD + "streaming"})


def attention_cases(form: str, head_dim: int, dtype: torch.dtype) -> list[KernelCase]:
    """Return a form of attention's cases: with no mask and each kind of it, of one head dim."""

    def case(seqlen: int, mask: dict) -> AttentionCase:
        shape = (1, 2, seqlen, seqlen, head_dim, head_dim, dtype)
        return AttentionCase(*shape, layout="bnhd", sharpness=2.0, seed=head_dim, **mask)

    if form == "forward resident":
        # By three kernels, each with a mask and without: over keys, and in one pass at up to 200 and 264 of them.
        seqlens = (50, 197, 257) if head_dim == 64 else (50, 257)
        return [KernelCase(case(n, mask), RESIDENT, backward=False) for mask in MASKS for n in seqlens]
    if form == "forward streaming":
        # The memory that this form takes, which is too little for the keys and values of a head.
        device = {"shared_bytes": 768 * head_dim}
        return [KernelCase(case(200, mask), STREAMING, device, backward=False) for mask in MASKS]
    # With more multiprocessors than twice the heads, each head is dealt to several.
    device = {"multiprocessors": {"backward resident": 3, "backward streaming": 1000}[form]}
    families = RESIDENT | {form.replace("backward ", BACKWARD)}
    return [KernelCase(case(90, mask), families, device) for mask in MASKS]


ATTENTION_FORMS = ("forward resident", "forward streaming", "backward resident", "backward streaming")


def sm90_case(seqlen: int, head_dim: int, dtype: torch.dtype) -> KernelCase:
    """Return the case of a length for the form for sm_90a."""
    shape = (1 if seqlen > 300 else 2, 1 if seqlen > 1000 else 2, seqlen, seqlen, head_dim, head_dim, dtype)
    case = AttentionCase(*shape, sharpness=4.0 if seqlen == 197 else 1.0)
    return KernelCase(case, frozenset({FORWARD + "sm90"}), form="sm90", backward=False)


# One multiprocessor: large tiles; many: small ones.
MULTIPROCESSORS = (1, 64)
EMBED_DIMS = (1, 7, 32, 96, 192, 200)


def patch_embed_case(embed_dim: int, multiprocessors: int, dtype: torch.dtype) -> KernelCase:
    """Return the case of an embed_dim on a device of so many multiprocessors; two have no bias."""
    has_bias = embed_dim not in (32, 192)
    case = PatchEmbedCase(embed_dim=embed_dim, patch=(8, 8), grid=(9, 8), has_bias=has_bias, dtype=dtype)
    families = {"patch_embed_" + name for name in ("forward", "backward_weight", "reduce", "backward_images")}
    return KernelCase(case, frozenset(families), {"multiprocessors": multiprocessors, "shared_bytes": 99 * 1024})


def all_cases() -> Iterator[KernelCase]:
    """Yield every case that a test runs."""
    for dtype in DTYPES:
        for head_dim in HEAD_DIMS:
            for form in ATTENTION_FORMS:
                yield from attention_cases(form, head_dim, dtype)
        for head_dim, seqlens in SM90_SEQLENS.items():
            yield from (sm90_case(seqlen, head_dim, dtype) for seqlen in seqlens)
        for embed_dim in EMBED_DIMS:
            yield from (patch_embed_case(embed_dim, count, dtype) for count in MULTIPROCESSORS)


def families(launches: Iterable[tuple]) -> set[str]:
    """Return which kernels were launched, without their template arguments; ``launches`` are the emulator's."""
    return {demangle(name).split("<")[0] for name, *_ in launches}


@contextmanager
def on_device(emulator: ModuleType, case: KernelCase, only_notes: bool = False) -> Iterator[set[str]]:
    """Emulate the case's device in its form; the set that this gives holds the kernels launched at the end.

    Raises:
        AssertionError: they are not of the case's families.
    """
    launched: set[str] = set()
    emulator.configure(**case.device, only_notes=only_notes)
    emulator.reset_statistics()
    with cuda.form(case.form):
        yield launched
    launched |= {demangle(name) for name, *_ in emulator.launches()}
    assert families(emulator.launches()) == case.families, case


def built_kernels(emulator: ModuleType) -> set[str]:
    """Return the kernels that the emulator was built with."""
    return {demangle(name) for name in cuda.kernels_of(Path(str(emulator.__file__)))}
