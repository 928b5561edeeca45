"""The Triton backend of both ops: NVIDIA sm_80 to sm_100 and AMD gfx942. Triton itself is imported at first use.

The functions are those of every backend; see ``fastvit.kernels.reference`` for what they compute.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec

__all__ = [
    "attention_backward",
    "attention_forward",
    "attention_why_not",
    "import_error",
    "patch_embed_backward_images",
    "patch_embed_backward_weight",
    "patch_embed_forward",
    "patch_embed_why_not",
]


@functools.cache
def import_error() -> str | None:
    """Return why Triton cannot be imported, or None if it can; the first call imports it."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # Triton fails in many ways: missing, no compiler, a driver that does not fit.
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def _kernels(name: str) -> ModuleType:
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        importlib.import_module("fastvit.kernels.triton.interpreter").repair()
    return importlib.import_module(f"fastvit.kernels.triton.{name}")


def attention_why_not(spec: AttentionSpec) -> list[str]:
    """Return the reasons why this backend cannot run ``spec``; empty means that it can."""
    error = import_error()
    return [error] if error else _kernels("attention_fwd").why_not(spec)


def patch_embed_why_not(spec: PatchEmbedSpec) -> list[str]:
    """Return the reasons why this backend cannot run ``spec``; empty means that it can."""
    error = import_error()
    return [error] if error else _kernels("patch_embed").why_not(spec)


def attention_forward(*arguments: Any, **options: Any) -> None:
    """See :func:`fastvit.kernels.triton.attention_fwd.attention_forward`."""
    _kernels("attention_fwd").attention_forward(*arguments, **options)


def attention_backward(*arguments: Any, **options: Any) -> None:
    """See :func:`fastvit.kernels.triton.attention_bwd.attention_backward`."""
    _kernels("attention_bwd").attention_backward(*arguments, **options)


def patch_embed_forward(*arguments: Any, **options: Any) -> None:
    """See :func:`fastvit.kernels.triton.patch_embed.patch_embed_forward`."""
    _kernels("patch_embed").patch_embed_forward(*arguments, **options)


def patch_embed_backward_weight(*arguments: Any, **options: Any) -> None:
    """See :func:`fastvit.kernels.triton.patch_embed.patch_embed_backward_weight`."""
    _kernels("patch_embed").patch_embed_backward_weight(*arguments, **options)


def patch_embed_backward_images(*arguments: Any, **options: Any) -> None:
    """See :func:`fastvit.kernels.triton.patch_embed.patch_embed_backward_images`."""
    _kernels("patch_embed").patch_embed_backward_images(*arguments, **options)
