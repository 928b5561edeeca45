"""When an eager call may go from the public function straight to the C++ of the ``cpu`` backend.

At a tiny shape the way to the kernel is most of a call: the dispatcher enters Python for autograd (autograd.py) and for
the choice of the backend (attention_op.py), and each takes as long as the kernel. Where nobody wants either, the
overload ``cpu`` of an op (csrc/schemas.cpp) has the same result, and the op's name in a profile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from fastvit.kernels.spec import MAX_HEAD_DIM
from fastvit.ops.backends import runs_natively
from fastvit.ops.checks import FLOATING

_PLAIN = (Tensor, torch.nn.Parameter)

try:
    from torch._C import (
        _are_functorch_transforms_active,
        _is_any_autocast_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
        _len_torch_function_stack,
    )

    CAN_TELL = hasattr(forward_ad, "_current_level")
except ImportError:
    # Names that torch keeps to itself: where one is gone, every call takes the long way.
    CAN_TELL = False


def attention_goes_straight(
    backend: str | None, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> bool:
    """Return whether query, key and value are what :func:`fastvit.attention` accepts and the call may go straight.

    Written out, because each function or loop would be a tenth of it. False means nothing; the checks say what is wrong
    if anything is. The bias still has to be checked.
    """
    if (
        type(query) is not Tensor
        or type(key) is not Tensor
        or type(value) is not Tensor
        or not (query.is_cpu and key.is_cpu and value.is_cpu)
        or (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        or _is_watched(bias)
    ):
        return False
    dtype, shape, key_shape, value_shape = query.dtype, query.shape, key.shape, value.shape
    if key.dtype is not dtype or value.dtype is not dtype or dtype not in FLOATING or len(shape) != 4:
        return False
    if key_shape != shape and (len(key_shape) != 4 or key_shape[:2] != shape[:2] or key_shape[3] != shape[3]):
        return False
    if value_shape != key_shape and (len(value_shape) != 4 or value_shape[:3] != key_shape[:3]):
        return False
    return 0 < shape[3] <= MAX_HEAD_DIM and 0 < value_shape[3] <= MAX_HEAD_DIM and runs_natively(backend)


def packed_goes_straight(backend: str | None, qkv: Tensor, bias: Tensor | None) -> bool:
    """Return whether qkv is what :func:`fastvit.attention_qkvpacked` accepts and the call may go straight."""
    if (
        type(qkv) is not Tensor
        or not qkv.is_cpu
        or (torch.is_grad_enabled() and qkv.requires_grad)
        or qkv.dtype not in FLOATING
        or _is_watched(bias)
    ):
        return False
    shape = qkv.shape
    return len(shape) == 5 and shape[2] == 3 and 0 < shape[4] <= MAX_HEAD_DIM and runs_natively(backend)


def patch_embed_goes_straight(backend: str | None, images: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the tensors are what :func:`fastvit.patch_embed` accepts, tile the images, lie contiguous and may
    go straight. Other layouts take the long way, which reads or copies them.
    """
    tensors = (images, weight) if bias is None else (images, weight, bias)
    if _is_watched(None):
        return False
    for tensor in tensors:
        if (
            type(tensor) not in _PLAIN
            or not tensor.is_cpu
            or (tensor.requires_grad and torch.is_grad_enabled())
            or tensor.dtype is not images.dtype
            or not tensor.is_contiguous()
        ):
            return False
    size, patch = images.shape, weight.shape
    return (
        images.dtype in FLOATING
        and len(size) == len(patch) == 4
        and size[1] == patch[1]
        and min(patch) > 0
        and size[2] >= patch[2]
        and size[3] >= patch[3]
        and size[2] % patch[2] == size[3] % patch[3] == 0
        and (bias is None or bias.shape == patch[:1])
        and runs_natively(backend)
    )


def _is_watched(bias: Tensor | None) -> bool:
    """Return whether something changes or records what ops do: a compiler or tracer, autocast, torch.func, a mode, or a
    bias of a class of its own. Shapes must not even be compared then: it could become a condition of the graph.
    """
    return (
        not CAN_TELL
        or is_dynamo_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _are_functorch_transforms_active()
        or _is_any_autocast_enabled()
        or _is_tracing()
        or forward_ad._current_level >= 0
        or (bias is not None and type(bias) is not Tensor)
    )
