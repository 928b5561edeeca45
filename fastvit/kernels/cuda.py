"""The ``cuda`` backend: the door to the CUDA C++ kernels of csrc/cuda, inside fastvit._C.

For tests they also run on the CPU: with FASTVIT_EMULATE_CUDA=1 and a build with FASTVIT_BUILD_EMULATOR=1 this backend
takes CPU tensors and runs the same sources in fastvit._emulator, thousands of times slower than a GPU.

A bias is taken to base 2 before it is added, so that one below −2.3e38 means −inf: a row of nothing but
``torch.finfo(torch.float32).min`` attends to nothing and is zero, where the other backends return the mean of V.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvit.kernels import native
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 128
# Work items and positions are counted in 32 bits.
MAX_ITEMS = 2**30
MAX_BLOCKS = 2**31 - 1

_form: ContextVar[str] = ContextVar("fastvit_cuda_form", default="automatic")


@contextlib.contextmanager
def form(name: str) -> Iterator[None]:
    """Run the attention forward of this backend in one form inside the block, to test and to measure it.

    Args:
        name: "automatic", or "sm90": wgmma and TMA, for compute capability 9.0, head dims 64 and 128, no bias, not
            causal, rows that begin at multiples of 16 bytes. It was never run on a GPU, so that it is not automatic.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: from an op whose call that form cannot run.
    """
    if name not in ("automatic", "sm90"):
        raise ValueError(f"form: got {name!r}; accepted are 'automatic' and 'sm90'")
    token = _form.set(name)
    try:
        yield
    finally:
        _form.reset(token)


def emulates() -> bool:
    """Return whether CPU tensors are to run in the emulator."""
    return os.environ.get("FASTVIT_EMULATE_CUDA") == "1"


@functools.cache
def _emulator_error() -> str | None:
    try:
        importlib.import_module("fastvit._emulator")
    except ImportError as error:
        return f"FASTVIT_EMULATE_CUDA=1, but fastvit._emulator cannot be imported ({error}): FASTVIT_BUILD_EMULATOR=1"
    return None


def _device_why_not(device: torch.device) -> list[str]:
    if device.type == "cpu" and emulates():
        error = _emulator_error()
        return [] if error is None else [error]
    if device.type != "cuda":
        return [f"device {device}: only CUDA tensors"]
    if error := native.load_error():
        return [error]
    if torch.version.hip:
        return ["this torch is built for AMD; the CUDA C++ kernels are for NVIDIA"]
    built = importlib.import_module("fastvit._C").cuda_architectures().split()
    if not built:
        return ["fastvit._C was built without CUDA: nvcc was not found, or FASTVIT_BUILD_CUDA=0"]
    major, minor = torch.cuda.get_device_capability(device)
    if not any(_runs_on(name, major, minor) for name in built):
        return [f"compute capability {major}.{minor}: this build has kernels for {', '.join(built)}"]
    return []


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    number = int(architecture.rstrip("abcdefghijklmnopqrstuvwxyz"))
    if architecture[-1] == "a":
        return (major, minor) == divmod(number, 10)
    return major == number // 10 and minor >= number % 10


@functools.cache
def built_kernels() -> tuple[str, ...]:
    """Return the mangled names of the kernels in fastvit._C, sorted; empty if it has none or cannot be loaded."""
    if native.load_error():
        return ()
    return kernels_of(Path(str(importlib.import_module("fastvit._C").__file__)))


def kernels_of(library: Path) -> tuple[str, ...]:
    """Return the mangled names of the kernels in a library, sorted."""
    # The host registers each kernel by its name, a plain string; a kernel takes its arguments as one struct by value.
    names = re.findall(rb"\0(_ZN7fastvit4cuda\d+\w+vNS0_\d+\w*Arguments\w*E)(?=\0)", library.read_bytes())
    return tuple(sorted({name.decode() for name in names}))


def attention_why_not(spec: AttentionSpec) -> list[str]:
    """Return why the CUDA kernels cannot run this attention call; empty if they can."""
    reasons = _device_why_not(spec.device)
    if spec.dtype not in DTYPES:
        reasons.append(f"dtype {spec.dtype}: only float16 and bfloat16")
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(spec.head_dim, spec.head_dim_v)}: at most {MAX_HEAD_DIM}")
    seqlen = max(spec.seqlen_q, spec.seqlen_k)
    if seqlen > MAX_ITEMS:
        reasons.append(f"seqlen {seqlen}: at most 2^30")
    elif spec.batch * spec.num_heads * -(-seqlen // 16) > MAX_ITEMS:
        reasons.append("batch · heads · seqlen / 16 is over 2^30")
    return reasons


def patch_embed_why_not(spec: PatchEmbedSpec) -> list[str]:
    """Return why the CUDA kernels cannot run this patch embedding; empty if they can."""
    reasons = _device_why_not(spec.device)
    if spec.dtype not in DTYPES:
        reasons.append(f"dtype {spec.dtype}: only float16 and bfloat16")
    rows, columns = spec.grid
    tokens = spec.batch * rows * columns
    patch_size = spec.in_channels * spec.patch_height * spec.patch_width
    sizes = {"batch · tokens": tokens, "channels · patch height · patch width": patch_size, "embed_dim": spec.embed_dim}
    reasons += [f"{name} is {size}, over 2^30" for name, size in sizes.items() if size > MAX_ITEMS]
    down, *across = (-(-size // 128) for size in (tokens, patch_size, spec.embed_dim))
    if max(down * max(across), across[0] * across[1]) > MAX_BLOCKS:
        reasons.append("a result has over 2^31 tiles of 128 × 128")
    return reasons


def _ops(tensor: Tensor) -> Any:
    return torch.ops.fastvit_native if tensor.is_cuda else torch.ops.fastvit_emulated


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> None:
    """Write softmax(scale QKᵀ + bias) V to ``output`` [B, H, Nq, Dv] and the row log-sum-exp to ``lse`` [B, H, Nq]."""
    if _form.get() == "automatic":
        _ops(query).attention_forward(query, key, value, bias, output, lse, is_causal, scale)
        return
    if bias is not None or is_causal:
        raise RuntimeError("the attention kernel for sm_90a: accepted is attention without bias, not causal")
    _ops(query).attention_forward_sm90(query, key, value, output, lse, scale)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> None:
    """Write the gradients of query, key and value; deterministic."""
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    _ops(query).attention_backward(
        grad_output, grad_lse, query, key, value, bias, output, lse, grad_query, grad_key, grad_value, is_causal, scale
    )


def patch_embed_forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, stride: Sequence[int] | None = None
) -> None:
    """Write the tokens [B, N, D] of ``images`` [B, C, H, W] under ``weight`` [D, C, Ph, Pw] to ``output``.

    ``stride``: pixels from one patch to the next, (down, right); None is the patch.
    """
    _ops(images).patch_embed_forward(images, weight, bias, output, stride)


def patch_embed_backward_weight(
    grad_output: Tensor,
    images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: Sequence[int] | None = None,
) -> None:
    """Write the gradients of the weight [D, C, Ph, Pw] and, unless it is None, of the bias [D]; deterministic."""
    _ops(images).patch_embed_backward_weight(grad_output, images, grad_weight, grad_bias, stride)


def patch_embed_backward_images(grad_output: Tensor, weight: Tensor, grad_images: Tensor) -> None:
    """Write the gradient of the images [B, C, H, W], which the patches tile."""
    _ops(grad_images).patch_embed_backward_images(grad_output, weight, grad_images)
