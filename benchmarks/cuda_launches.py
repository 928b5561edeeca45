"""How the CUDA kernels are launched for the shapes of real ViTs, and how many blocks then share a multiprocessor.

``python -m benchmarks.cuda_launches --write`` keeps the table as benchmarks/cuda_launches.csv. The launchers are asked
by way of the emulator (FASTVIT_BUILD_EMULATOR=1), which notes a launch without running it; registers come from
benchmarks/cuda_resources.csv. Needs no GPU.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import committed, cuda_resources
from benchmarks.cuda_planning import (
    DEVICES,
    Call,
    attention_calls,
    blocks_per_multiprocessor,
    patch_embed_calls,
    planning,
)
from fastvit.testing import AttentionCase, PatchEmbedCase

TABLE = Path(__file__).parent / "cuda_launches.csv"
ATTENTION = ((64, 12, 50, 64), (64, 12, 197, 64), (64, 12, 257, 64), (64, 12, 577, 64), (64, 12, 1025, 64),
             (64, 16, 257, 80), (64, 16, 257, 88), (64, 16, 257, 128), (1024, 3, 49, 32), (1, 12, 197, 64))  # fmt: skip
PATCH_EMBED = ((64, 224, 16, 768), (64, 224, 14, 1280), (1, 224, 16, 768))


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
    calls, resources = _calls(), cuda_resources.read()
    for device in DEVICES:
        registers = {row.kernel: row.registers for row in resources if row.arch == device.code}
        with planning(device, registers) as noted:
            for work, call in calls.items():
                for kernel, blocks, threads, shared_bytes in noted(call):
                    used = registers[kernel]
                    shared = blocks_per_multiprocessor(device, threads, shared_bytes, used)
                    yield Launch(
                        device.name, work, kernel, blocks, threads, shared_bytes, used, shared, shared * threads // 32
                    )


def read() -> list[Launch]:
    """Return the committed table."""
    return committed.read_rows(Launch, TABLE)


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
        committed.write_rows(Launch, rows, TABLE)


if __name__ == "__main__":
    main()
