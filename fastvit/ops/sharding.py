"""How the ops run on sharded tensors (DTensor), and the sharding of a packed projection over heads.

Importing this module imports torch.distributed.tensor; fastvit does so as soon as anybody else has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

# Per way to run: the placements of the outputs, then of the inputs, with None for whatever is no tensor.
Way = tuple[list[Placement | None], list[Placement | None]]


def _like(bias: Any, dim: int) -> Placement | None:
    """Return the placement of a bias [B, H, Nq, Nk] that follows ``dim``, where it does not broadcast over it."""
    if bias is None:
        return None
    return Replicate() if bias.shape[dim] == 1 else Shard(dim)


def _ways(*candidates: tuple[Sequence[Placement | None], Sequence[Placement | None]], args: Sequence[Any]) -> list[Way]:
    """Return replication and the candidates, with None in place of arguments that are not there."""
    outputs, inputs = candidates[0]
    replicated = ([Replicate()] * len(outputs), [Replicate()] * len(inputs))
    others: list[Placement | None] = [None] * (len(args) - len(inputs))
    return [
        (list(outs), [None if arg is None else place for arg, place in zip(args, ins, strict=False)] + others)
        for outs, ins in (replicated, *candidates)
    ]


def _attention(*args: Any) -> list[Way]:
    bias = args[3]
    return _ways(
        ([Shard(0)] * 2, [Shard(0)] * 3 + [_like(bias, 0)]),
        ([Shard(1)] * 2, [Shard(1)] * 3 + [_like(bias, 1)]),
        args=args,
    )


def _attention_backward(*args: Any) -> list[Way]:
    bias = args[5]
    return _ways(
        ([Shard(0)] * 3, [Shard(0)] * 5 + [_like(bias, 0), Shard(0), Shard(0)]),
        ([Shard(1)] * 3, [Shard(1)] * 5 + [_like(bias, 1), Shard(1), Shard(1)]),
        args=args,
    )


# Packed: qkv [B, N, 3, H, D], output [B, N, H, D], LSE [B, H, N].
def _attention_qkvpacked(*args: Any) -> list[Way]:
    bias = args[1]
    return _ways(
        ([Shard(0), Shard(0)], [Shard(0), _like(bias, 0)]),
        ([Shard(2), Shard(1)], [Shard(3), _like(bias, 1)]),
        args=args,
    )


def _attention_qkvpacked_backward(*args: Any) -> list[Way]:
    bias = args[3]
    return _ways(
        ([Shard(0)], [Shard(0), Shard(0), Shard(0), _like(bias, 0), Shard(0), Shard(0)]),
        ([Shard(3)], [Shard(2), Shard(1), Shard(3), _like(bias, 1), Shard(2), Shard(1)]),
        args=args,
    )


# Images [B, C, H, W], weight [D, C, Ph, Pw], bias [D], tokens [B, N, D].
def _patch_embed(*args: Any) -> list[Way]:
    return _ways(
        ([Shard(0)], [Shard(0), Replicate(), Replicate()]),
        ([Shard(2)], [Replicate(), Shard(0), Shard(0)]),
        args=args,
    )


def _patch_embed_backward_weight(*args: Any) -> list[Way]:
    return _ways(
        ([Partial(), Partial()], [Shard(0), Shard(0), Replicate()]),
        ([Shard(0), Shard(0)], [Shard(2), Replicate(), Shard(0)]),
        args=args,
    )


def _patch_embed_backward_images(*args: Any) -> list[Way]:
    return _ways(
        ([Shard(0)], [Shard(0), Shard(0), Replicate()]),
        ([Partial()], [Shard(2), Replicate(), Shard(0)]),
        args=args,
    )


for _rule in (
    _attention,
    _attention_backward,
    _attention_qkvpacked,
    _attention_qkvpacked_backward,
    _patch_embed,
    _patch_embed_backward_weight,
    _patch_embed_backward_images,
):
    register_sharding(getattr(torch.ops.fastvit, _rule.__name__.removeprefix("_")).default)(_rule)


class PackedColwiseParallel(ParallelStyle):
    """Shard the packed projection ``qkv`` of an attention layer over heads, for ``parallelize_module``.

    The output of ``qkv`` is query, key and value, one after the other. ``ColwiseParallel`` would cut it into pieces in
    that order and give one rank the queries and the next the values. This style shards the weight [3 · H · D, C] as
    [3, H, D, C] over H, so that each rank has the same heads of all three; the parameter's shape and key stay what they
    were. The output stays a DTensor: the module goes on counting all heads, and each rank attends with its own. Next in
    the plan is ``"attn.proj": RowwiseParallel()``. The model may be swapped before or after.

    Args:
        num_heads: heads of the layer; the mesh's size must divide it.

    Raises:
        ValueError: the mesh does not divide the heads, or the module's width is no multiple of 3 · num_heads.
        TypeError: the module is no Linear.
        NotImplementedError: this torch's DTensor cannot hold heads that are spread over a flat dimension (2.11).
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise TypeError(f"qkv: got {type(module).__name__}; accepted is a torch.nn.Linear")
        if self.num_heads % device_mesh.size():
            raise ValueError(f"num_heads: got {self.num_heads}; the mesh's size {device_mesh.size()} must divide it")
        if module.out_features % (3 * self.num_heads):
            raise ValueError(f"qkv: got {module.out_features} features; accepted are multiples of 3 · {self.num_heads}")
        return distribute_module(module, device_mesh, self._partition, self._prepare)  # type: ignore[arg-type]  # may return inputs

    def _partition(self, _: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            packed = parameter.detach().unflatten(0, (3, self.num_heads, -1))
            sharded = _flattened(distribute_tensor(packed, device_mesh, [Shard(1)]))
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    @staticmethod
    def _prepare(_: nn.Module, inputs: tuple[Any, ...], device_mesh: DeviceMesh) -> tuple[Any, ...]:
        x, *rest = inputs
        if isinstance(x, Tensor) and not isinstance(x, DTensor):
            x = DTensor.from_local(x, device_mesh, (Replicate(),), run_check=False)
        elif isinstance(x, DTensor):
            x = x.redistribute(device_mesh, (Replicate(),))
        return (x, *rest)


def _flattened(packed: DTensor) -> Tensor:
    """Return [3, H, D, …], sharded over H, as [3 · H · D, …]: a rank's part of it lies in three pieces."""
    try:
        return packed.flatten(0, 2)
    except RuntimeError as error:
        raise NotImplementedError(
            f"fastvit PackedColwiseParallel: the DTensor of torch {torch.__version__} cannot flatten a sharded "
            "dimension that has another in front; it needs torch 2.12 or newer"
        ) from error
