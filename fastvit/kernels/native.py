"""The ``cpu`` backend: the thin door to fastvit._C, whose kernels are C++ in csrc/cpu."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec, PatchEmbedSpec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@functools.cache
def load_error() -> str | None:
    """Load fastvit._C and return None, or why it cannot be used."""
    try:
        module = importlib.import_module("fastvit._C")
    except ImportError as error:
        return (
            f"fastvit._C cannot be imported ({error}); it is built when fastvit is installed on a machine with a C++ "
            "compiler: pip install --no-build-isolation --force-reinstall --no-deps ."
        )
    try:
        module.cpu_capability()
    except RuntimeError as error:
        return str(error)
    return None


def poison(wanted: bool) -> None:
    """Fill what C++ allocates with NaN before the kernel runs, for tests, as torch can fill its ``torch.empty``."""
    if load_error() is None:
        importlib.import_module("fastvit._C").poison_outputs(wanted)


def _why_not(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if device.type != "cpu":
        reasons.append(f"device {device}: only CPU tensors")
    if dtype not in DTYPES:
        reasons.append(f"dtype {dtype}: only float16, bfloat16, float32 and float64")
    error = load_error()
    return reasons if error is None else [*reasons, error]


def attention_why_not(spec: AttentionSpec) -> list[str]:
    """Return why the CPU kernels cannot run this attention call; empty if they can."""
    reasons = _why_not(spec.device, spec.dtype)
    if max(spec.head_dim, spec.head_dim_v) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {max(spec.head_dim, spec.head_dim_v)}: at most {MAX_HEAD_DIM}")
    return reasons


def patch_embed_why_not(spec: PatchEmbedSpec) -> list[str]:
    """Return why the CPU kernels cannot run this patch embedding; empty if they can."""
    return _why_not(spec.device, spec.dtype)


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
    torch.ops.fastvit_native.attention_forward(query, key, value, bias, output, lse, is_causal, scale)


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
    torch.ops.fastvit_native.attention_backward(
        grad_output, grad_lse, query, key, value, bias, output, lse, grad_query, grad_key, grad_value, is_causal, scale
    )


def patch_embed_forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, stride: Sequence[int] | None = None
) -> None:
    """Write the tokens [B, N, D] of ``images`` [B, C, H, W] under ``weight`` [D, C, Ph, Pw] to ``output``.

    ``stride``: pixels from one patch to the next, (down, right); None is the patch.
    """
    torch.ops.fastvit_native.patch_embed_forward(images, weight, bias, output, stride)


def patch_embed_backward_weight(
    grad_output: Tensor,
    images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: Sequence[int] | None = None,
) -> None:
    """Write the gradients of the weight [D, C, Ph, Pw] and, unless it is None, of the bias [D]; deterministic."""
    torch.ops.fastvit_native.patch_embed_backward_weight(grad_output, images, grad_weight, grad_bias, stride)


def patch_embed_backward_images(grad_output: Tensor, weight: Tensor, grad_images: Tensor) -> None:
    """Write the gradient of the images [B, C, H, W], which the patches tile."""
    torch.ops.fastvit_native.patch_embed_backward_images(grad_output, weight, grad_images)
