"""What the CUDA launchers would do on a device, asked without one, and how many blocks then share a multiprocessor.

They are asked by way of the emulator (FASTVIT_BUILD_EMULATOR=1), which notes a launch without running it.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase


@dataclass(frozen=True)
class Device:
    """What the launchers ask of a device, and what limits its blocks (CUDA programming guide, compute capabilities)."""

    name: str
    multiprocessors: int
    shared_bytes_per_block: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int
    compute_capability: int
    code: str  # the architecture of the build that runs there


DEVICES = (
    Device("A100", 108, 163 * 1024, 2048, 32, 80, "sm_80"),
    Device("L40S", 142, 99 * 1024, 1536, 24, 89, "sm_80"),
    Device("H200", 132, 227 * 1024, 2048, 32, 90, "sm_90a"),
)
REGISTERS_PER_MULTIPROCESSOR = 65536
# Registers are given to warps in units of 8 per thread, 256 per warp, and shared memory in units of 128 bytes, beside
# what the runtime keeps of each block's (CUDA occupancy calculator, 8.0 to 9.0).
REGISTER_UNIT = 8
SHARED_UNIT = 128
RESERVED_SHARED_BYTES = 1024


def demangle(name: str) -> str:
    """Return ``attention_forward_resident<Half, 64, 2, 8, false>`` for the mangled name of a kernel."""
    parts = re.match(r"_ZN7fastvit4cuda(\d+)", name)
    if parts is None:
        return name
    start, length = parts.end(), int(parts[1])
    arguments = []
    for half, number, boolean in re.findall(r"NS0_\d+(Half|BFloat16)E|Li(\d+)E|Lb([01])E", name[start + length :]):
        arguments.append(half or number or ("true" if boolean == "1" else "false"))
    return f"{name[start : start + length]}<{', '.join(arguments)}>"


def blocks_per_multiprocessor(device: Device, threads: int, shared_bytes: int, registers: int) -> int:
    """Return how many blocks share a multiprocessor, as the CUDA occupancy calculator counts them."""
    # Each quarter of a multiprocessor has its own registers and takes whole warps.
    allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32
    warps = 4 * (REGISTERS_PER_MULTIPROCESSOR // 4 // allocated)
    shared = -(-(shared_bytes + RESERVED_SHARED_BYTES) // SHARED_UNIT) * SHARED_UNIT
    limits = (
        warps // (threads // 32),
        (device.shared_bytes_per_block + RESERVED_SHARED_BYTES) // shared,
        device.threads_per_multiprocessor // threads,
        device.blocks_per_multiprocessor,
    )
    return min(limits)


Note = tuple[str, int, int, int]
Call = Callable[[], None]


@contextlib.contextmanager
def planning(device: Device, registers: Mapping[str, int] | None = None) -> Iterator[Callable[[Call], list[Note]]]:
    """Give a function that returns the launches of a call on ``device`` (kernel, blocks, threads, shared bytes).

    Nothing is run, so that the calls' tensors are of any size: no byte of them is touched. Persistent kernels have as
    many blocks as a multiprocessor holds by their ``registers``, by name; without, by shared memory alone.

    Raises:
        ImportError: the emulator is not built.
    """
    emulator = importlib.import_module("fastvit._emulator")

    def noted(call: Call) -> list[Note]:
        emulator.reset_statistics()
        call()
        return [(demangle(name), *sizes) for name, *sizes in emulator.launches()]

    def occupancy(name: str, threads: int, shared_bytes: int) -> int:
        assert registers is not None
        return blocks_per_multiprocessor(device, threads, shared_bytes, registers[demangle(name)])

    # torch makes this attribute when it is imported, where no type checker sees it.
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    emulator.configure(
        multiprocessors=device.multiprocessors,
        shared_bytes=device.shared_bytes_per_block,
        compute_capability=device.compute_capability,
        only_notes=True,
        occupancy=None if registers is None else occupancy,
    )
    try:
        yield noted
    finally:
        emulator.configure()
        deterministic.fill_uninitialized_memory = fills


def attention_calls(case: AttentionCase) -> dict[str, Call]:
    """Return the calls of a case, forward and backward, on tensors of its sizes that hold nothing."""
    batch, heads, dim = case.batch, case.num_heads, case.head_dim
    if case.layout == "packed" and (case.seqlen_q, dim) == (case.seqlen_k, case.head_dim_v):
        packed = torch.empty(batch, case.seqlen_q, 3, heads, dim, dtype=case.dtype)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        sizes = ((case.seqlen_q, dim), (case.seqlen_k, dim), (case.seqlen_k, case.head_dim_v))
        query, key, value = (
            torch.empty(batch, heads, n, d, dtype=case.dtype)
            if case.layout == "bhnd"
            else torch.empty(batch, n, heads, d, dtype=case.dtype).transpose(1, 2)
            for n, d in sizes
        )
    output = torch.empty(batch, case.seqlen_q, heads, case.head_dim_v, dtype=case.dtype).transpose(1, 2)
    lse = torch.empty(batch, heads, case.seqlen_q)
    bias = None
    if case.bias is not None:
        kind = {"bool": torch.bool, "additive": case.dtype, "float32": torch.float32}[case.bias]
        shape = case.bias_shape or (1, heads, case.seqlen_q, case.seqlen_k)
        bias = torch.empty(shape, dtype=kind).expand(batch, heads, case.seqlen_q, case.seqlen_k)
    tensors = (query, key, value, bias, output, lse)
    return {
        "forward": lambda: cuda.attention_forward(*tensors, is_causal=case.is_causal, scale=1.0),
        "backward": lambda: cuda.attention_backward(
            output, None, *tensors, query, key, value, is_causal=case.is_causal, scale=1.0
        ),
    }


def patch_embed_calls(case: PatchEmbedCase) -> dict[str, Call]:
    """Return the calls of a case whose patches tile the images, as :func:`attention_calls`."""
    memory = torch.channels_last if case.layout == "nhwc" else torch.contiguous_format
    images = torch.empty(case.batch, case.in_channels, *case.image_size, dtype=case.dtype).to(memory_format=memory)
    weight = torch.empty(case.embed_dim, case.in_channels, *case.patch, dtype=case.dtype)
    bias = torch.empty(case.embed_dim, dtype=case.dtype) if case.has_bias else None
    tokens = torch.empty(case.batch, case.grid[0] * case.grid[1], case.embed_dim, dtype=case.dtype)
    return {
        "forward": lambda: cuda.patch_embed_forward(images, weight, bias, tokens),
        "backward weight": lambda: cuda.patch_embed_backward_weight(tokens, images, weight, bias),
        "backward images": lambda: cuda.patch_embed_backward_images(tokens, weight, images),
    }


def calls_of(case: AttentionCase | PatchEmbedCase) -> dict[str, Call]:
    """Return the calls of either kind of case."""
    return attention_calls(case) if isinstance(case, AttentionCase) else patch_embed_calls(case)
