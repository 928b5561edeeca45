"""How the CUDA kernels are launched for the shapes of real ViTs, and how many blocks then share a multiprocessor.

``python -m benchmarks.cuda_launches --write`` keeps the table as benchmarks/cuda_launches.csv. The launchers are asked
by way of the emulator (FASTVIT_BUILD_EMULATOR=1), which notes a launch without running it; registers come from
benchmarks/cuda_resources.csv. Needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import cuda_resources
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase

TABLE = Path(__file__).parent / "cuda_launches.csv"
ATTENTION = ((64, 12, 50, 64), (64, 12, 197, 64), (64, 12, 257, 64), (64, 12, 577, 64), (64, 12, 1025, 64),
             (64, 16, 257, 80), (64, 16, 257, 88), (64, 16, 257, 128), (1024, 3, 49, 32), (1, 12, 197, 64))  # fmt: skip
PATCH_EMBED = ((64, 224, 16, 768), (64, 224, 14, 1280), (1, 224, 16, 768))


@dataclass(frozen=True)
class Device:
    """What the launchers ask of a device, and what limits its blocks (CUDA programming guide, compute capabilities)."""

    name: str
    multiprocessors: int
    shared_bytes_per_block: int
    threads_per_multiprocessor: int
    compute_capability: int
    code: str  # the architecture of the build that runs there


DEVICES = (
    Device("A100", 108, 163 * 1024, 2048, 80, "sm_80"),
    Device("L40S", 142, 99 * 1024, 1536, 89, "sm_80"),
    Device("H200", 132, 227 * 1024, 2048, 90, "sm_90a"),
)
BLOCKS_PER_MULTIPROCESSOR = 24  # the fewest of these
RESERVED_SHARED_BYTES = 1024


@dataclass(frozen=True)
class Launch:
    """One launch; ``blocks_per_multiprocessor`` is what registers, shared memory and threads allow."""

    device: str
    work: str
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    registers: int
    blocks_per_multiprocessor: int
    warps_per_multiprocessor: int


def blocks_per_multiprocessor(device: Device, threads: int, shared_bytes: int, registers: int) -> int:
    """Return how many blocks share a multiprocessor."""
    unit = cuda_resources.REGISTER_UNIT
    # Each quarter of a multiprocessor has its own registers and takes whole warps.
    warps = 4 * (cuda_resources.REGISTERS_PER_MULTIPROCESSOR // 4 // (-(-registers // unit) * unit * 32))
    limits = (
        warps // (threads // 32),
        (device.shared_bytes_per_block + RESERVED_SHARED_BYTES) // (shared_bytes + RESERVED_SHARED_BYTES),
        device.threads_per_multiprocessor // threads,
        BLOCKS_PER_MULTIPROCESSOR,
    )
    return min(limits)


Note = tuple[str, int, int, int]
Call = Callable[[], None]


@contextlib.contextmanager
def planning(device: Device) -> Iterator[Callable[[Call], list[Note]]]:
    """Give a function that returns the launches of a call on ``device`` (kernel, blocks, threads, shared bytes).

    Nothing is run, so that the calls' tensors are of any size: no byte of them is touched.

    Raises:
        ImportError: the emulator is not built.
    """
    emulator = importlib.import_module("fastvit._emulator")

    def noted(call: Call) -> list[Note]:
        emulator.reset_statistics()
        call()
        return [(cuda_resources.demangle(name), *sizes) for name, *sizes in emulator.launches()]

    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    emulator.configure(
        multiprocessors=device.multiprocessors,
        shared_bytes=device.shared_bytes_per_block,
        compute_capability=device.compute_capability,
        only_notes=True,
    )
    try:
        yield noted
    finally:
        emulator.configure()
        torch.utils.deterministic.fill_uninitialized_memory = fills


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
    options = {"is_causal": case.is_causal, "scale": 1.0}
    tensors = (query, key, value, bias, output, lse)
    return {
        "forward": lambda: cuda.attention_forward(*tensors, **options),
        "backward": lambda: cuda.attention_backward(output, None, *tensors, query, key, value, **options),
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


def _calls() -> dict[str, Call]:
    half = torch.float16
    return {
        f"attention {name} B{b} H{h} N{n} D{d}": call
        for b, h, n, d in ATTENTION
        for name, call in attention_calls(AttentionCase(b, h, n, n, d, d, half)).items()
    } | {
        f"patch_embed {name} B{b} {s}² P{p} D{d}": call
        for b, s, p, d in PATCH_EMBED
        for name, call in patch_embed_calls(PatchEmbedCase(b, 3, (s // p, s // p), (p, p), d, half)).items()
    }


def measure() -> Iterator[Launch]:
    """Yield every launch of every shape on every device.

    Raises:
        ImportError: the emulator is not built.
    """
    registers = {(row.kernel, row.arch): row.registers for row in cuda_resources.read()}
    calls = _calls()
    for device in DEVICES:
        with planning(device) as noted:
            for work, call in calls.items():
                for kernel, blocks, threads, shared_bytes in noted(call):
                    used = registers[kernel, device.code]
                    shared = blocks_per_multiprocessor(device, threads, shared_bytes, used)
                    yield Launch(
                        device.name, work, kernel, blocks, threads, shared_bytes, used, shared, shared * threads // 32
                    )


def read() -> list[Launch]:
    """Return the committed table."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Launch)}
    with open(TABLE, newline="") as file:
        return [Launch(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def main() -> None:
    """Print and, with --write, keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    os.environ["FASTVIT_EMULATE_CUDA"] = "1"
    rows = list(measure())
    names = [field.name for field in fields(Launch)]
    print(",".join(names), *(",".join(str(value) for value in asdict(row).values()) for row in rows), sep="\n")
    if arguments.write:
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)


if __name__ == "__main__":
    main()
