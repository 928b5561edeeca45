"""Input checks of the public functions: each raises before any kernel runs and names the argument, what was given and
what is accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvit.kernels.spec import MAX_HEAD_DIM
from fastvit.ops.autocast import autocast_dtype

FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check_tensor(name: str, value: object, rank: int, shape: str) -> Tensor:
    """Return ``value`` if it is a floating tensor of this rank, else raise TypeError or ValueError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted is a tensor {shape}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}; accepted are float16, bfloat16, float32 and float64")
    if value.dim() != rank:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; accepted are {rank} dimensions {shape}")
    return value


def check_same(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors share a device and, after autocast, a dtype."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: got device {tensor.device}; it must be on {other_name}'s device {other.device}")
    if tensor.dtype != other.dtype and autocast_dtype(tensor) != autocast_dtype(other):
        raise TypeError(f"{name}: got dtype {tensor.dtype}; it must have {other_name}'s dtype {other.dtype}")


def check_head_dim(name: str, head_dim: int) -> None:
    """Raise unless 1 <= head_dim <= 256."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name}: got head_dim {head_dim}; accepted are 1 to {MAX_HEAD_DIM}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """Return the softmax scale, 1/√head_dim unless given; raise unless it is finite and not negative."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: got {type(scale).__name__}; accepted are None (1/sqrt(head_dim)) and a number")
    # Comparisons, not math.isfinite: in a graph with dynamic shapes a scale may be symbolic. NaN fails them.
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale: got {scale}; accepted are finite numbers >= 0 and None (1/sqrt(head_dim))")
    return float(scale)


def is_bias_dtype(bias: Tensor, query: Tensor) -> bool:
    """Return whether ``bias`` is bool, float32 or of the dtype in which query enters the op."""
    return bias.dtype in (torch.bool, torch.float32) or autocast_dtype(bias) == autocast_dtype(query)


def broadcasts(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Return whether ``tensor`` broadcasts to ``shape``."""
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    return tensor.dim() <= len(shape) and all(given in (1, wanted) for given, wanted in sizes)


def check_bias(name: str, bias: Tensor | None, query: Tensor, scores_shape: tuple[int, int, int, int]) -> Tensor | None:
    """Return ``bias`` with four dimensions that broadcast to ``scores_shape`` [B, H, Nq, Nk], else raise."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor):
        raise TypeError(f"{name}: got {type(bias).__name__}; accepted are None and a tensor")
    if bias.device != query.device:
        raise ValueError(f"{name}: got device {bias.device}; it must be on query's device {query.device}")
    if not is_bias_dtype(bias, query):
        raise TypeError(
            f"{name}: got dtype {bias.dtype}; accepted are bool (True = take part), query's {query.dtype} and float32"
        )
    if bias.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{name}: requires grad, and its gradient is not supported yet; accepted is a tensor without grad "
            f"({name}.detach()), or torch.nn.functional.scaled_dot_product_attention where the gradient is needed"
        )
    if not broadcasts(bias, scores_shape):
        raise ValueError(
            f"{name}: got shape {tuple(bias.shape)}; accepted is what broadcasts to "
            f"(batch, num_heads, seqlen_q, seqlen_k) = {scores_shape}"
        )
    while bias.dim() < 4:
        bias = bias.unsqueeze(0)
    return bias


def check_pair(name: str, value: object, least: int) -> tuple[int, int]:
    """Return (height, width) of ``value``, one integer of at least ``least`` or two of them, else raise."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    accepted = f"accepted are an integer of at least {least} and a pair of them"
    # In a graph with dynamic shapes a size may be symbolic; a bool is an int to Python, and a mistake here.
    if any(isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)) for side in pair):
        raise TypeError(f"{name}: got {value!r}; {accepted}")
    if len(pair) != 2 or any(side < least for side in pair):
        raise ValueError(f"{name}: got {value!r}; {accepted}")
    return pair[0], pair[1]


def has_contiguous_rows(tensor: Tensor) -> bool:
    """Return whether the last dimension is contiguous: the one layout that kernels ask for."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return ``tensor``, copied if its last dimension is not contiguous."""
    return tensor if has_contiguous_rows(tensor) else tensor.contiguous()
