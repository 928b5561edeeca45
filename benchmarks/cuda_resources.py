"""What nvcc made of each CUDA kernel: registers, spills and instructions, read from fastvit._C; needs no GPU.

And what a launch of it takes of a multiprocessor, as its launcher says. ``python -m benchmarks.cuda_resources`` prints
the table and exits 1 if a kernel spills or lacks the instructions that it is meant to have; ``--write`` keeps it as
benchmarks/cuda_resources.csv, which a test compares with the build.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks import committed, cuda_forms, device_cases
from benchmarks.cuda_planning import (
    DEVICES,
    Call,
    Device,
    blocks_per_multiprocessor,
    calls_of,
    demangle,
    planning,
)
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase

TABLE = Path(__file__).parent / "cuda_resources.csv"
# Instructions by name; those that move 16 bytes for each thread are counted once more.
COUNTED = ("hmma", "hgmma", "ldsm", "ldgsts", "ldgsts_128", "utmaldg", "ldg_128", "stg_128", "local_accesses")
_LINE = re.compile(rb"Function : (\w+)|\barch = (\w+)|\b(HMMA|HGMMA|LDSM|LDGSTS|UTMALDG|LDG|STG|LDL|STL)\b((?:\.\w+)*)")
# What each kernel is written for: products of matrix units, their loads, copies and accesses of 16 bytes. The key side
# of the streaming backward pass has no plain loads that could be wide, and float sums go out in pairs.
_TILES = ("hmma", "ldsm", "ldgsts_128")
MEANT = {
    "attention_forward_resident": (*_TILES, "ldg_128", "stg_128"),
    "attention_forward_streaming": (*_TILES, "ldg_128", "stg_128"),
    "attention_forward_sm90": ("hgmma", "utmaldg", "stg_128"),
    "attention_backward_resident": (*_TILES, "ldg_128", "stg_128"),
    "attention_backward_streaming": (*_TILES, "stg_128"),
    "patch_embed_forward": (*_TILES, "stg_128"),
    "patch_embed_backward_weight": _TILES,
    "patch_embed_backward_images": (*_TILES, "stg_128"),
    "patch_embed_reduce": ("ldg_128",),
}
# The device of each architecture of which the table says how many blocks share a multiprocessor.
DEVICE_OF = {"sm_80": "A100", "sm_90a": "H200"}


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; instructions are counted in the code, not in a run.

    ``work`` is the first of the device's correctness cases (benchmarks/device_cases.py, cuda_forms.py) whose launcher
    takes the kernel on ``device``: ``threads``, ``shared_bytes`` (all of it dynamic) and
    ``blocks_per_multiprocessor`` are those of that launch.
    """

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    hmma: int
    hgmma: int
    ldsm: int
    ldgsts: int
    ldgsts_128: int
    utmaldg: int
    ldg_128: int
    stg_128: int
    local_accesses: int
    device: str
    work: str
    threads: int
    shared_bytes: int
    blocks_per_multiprocessor: int
    nvcc: str


def find_cuobjdump() -> str | None:
    """Return a cuobjdump: on PATH, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))


def usage(cuobjdump: str, library: str) -> list[tuple[str, str, int, int]]:
    """Return (mangled name, architecture, registers, stack bytes) of each kernel in ``library``.

    Kernels for sm_90a are compiled to nothing on the other architectures, and not counted there.
    """
    rows: list[tuple[str, str, int, int]] = []
    arch = name = ""
    for text in _run(cuobjdump, "-res-usage", library):
        for line in text.decode().splitlines():
            if found := re.match(r"arch = (\w+)", line):
                arch = found[1]
            elif found := re.match(r"\s*Function (\w+):", line):
                name = found[1]
            elif found := re.match(r"\s*REG:(\d+) STACK:(\d+)", line):
                rows += [(name, arch, int(found[1]), int(found[2]))]
    return [row for row in rows if "_sm90I" not in row[0] or row[1] == "sm_90a"]


def instructions(cuobjdump: str, library: str) -> dict[tuple[str, str], dict[str, int]]:
    """Return how often each kind of instruction is in the code of each (mangled name, architecture)."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    arch, current = "", dict.fromkeys(COUNTED, 0)
    for text in _run(cuobjdump, "-sass", library):
        for function, architecture, instruction, modifiers in _LINE.findall(text):
            if function:
                current = counts.setdefault((function.decode(), arch), dict.fromkeys(COUNTED, 0))
            elif architecture:
                arch = architecture.decode()
            else:
                kind = instruction.decode().lower()
                for name in (kind, f"{kind}_128" if modifiers.endswith(b".128") else "", _LOCAL.get(kind, "")):
                    if name in current:
                        current[name] += 1
    return counts


_LOCAL = {"ldl": "local_accesses", "stl": "local_accesses"}


def _run(*command: str) -> Iterator[bytes]:
    """Yield what a command prints, in runs of whole lines: of machine code it is hundreds of megabytes."""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while text := process.stdout.read(1 << 22):
            yield text + process.stdout.readline()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")


def launches(device: Device) -> dict[str, tuple[str, int, int]]:
    """Return, by kernel, the first work that takes it on a device, its threads and its dynamic shared memory.

    Raises:
        ImportError: the emulator is not built.
    """
    found: dict[str, tuple[str, int, int]] = {}
    with planning(device) as noted:

        def note(case: AttentionCase | PatchEmbedCase, calls: Iterable[Call]) -> None:
            for call in calls:
                for kernel, _, threads, shared_bytes in noted(call):
                    found.setdefault(kernel, (label(case), threads, shared_bytes))

        for dtype in (torch.bfloat16, torch.float16):
            for case in (*device_cases.telling(dtype), *device_cases.every_form(dtype)):
                note(case, calls_of(case).values())
        if device.compute_capability == 90:
            with cuda.form("sm90"):
                for attention in cuda_forms.cases():
                    note(attention, [calls_of(attention)["forward"]])
    return found


def label(case: AttentionCase | PatchEmbedCase) -> str:
    """Return a case's sizes and features in a few words."""
    if isinstance(case, PatchEmbedCase):
        return f"B{case.batch} {case.image_size[0]}² P{case.patch[0]} D{case.embed_dim}"
    features = f" {case.bias} bias" * (case.bias is not None) + " causal" * case.is_causal
    return f"B{case.batch} H{case.num_heads} N{case.seqlen_q} D{case.head_dim}{features}"


def measure() -> list[Resources]:
    """Return the resources of every kernel in fastvit._C.

    Raises:
        ImportError: the emulator is not built.
        RuntimeError: there is no cuobjdump, or fastvit._C has no CUDA kernels.
    """
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        raise RuntimeError("cuobjdump was not found: it comes with the CUDA toolkit and with Triton")
    if not cuda.built_kernels():
        raise RuntimeError("fastvit._C has no CUDA kernels: FASTVIT_BUILD_CUDA=1 needs nvcc")
    module = importlib.import_module("fastvit._C")
    library = str(module.__file__)
    counts = instructions(cuobjdump, library)
    devices = {arch: next(d for d in DEVICES if d.name == name) for arch, name in DEVICE_OF.items()}
    taken = {arch: launches(device) for arch, device in devices.items()}
    rows = []
    for name, arch, registers, stack in usage(cuobjdump, library):
        if arch not in devices:
            continue
        kernel, device = demangle(name), devices[arch]
        work, threads, shared = taken[arch][kernel]
        blocks = blocks_per_multiprocessor(device, threads, shared, registers)
        rows.append(
            Resources(
                kernel,
                arch,
                registers,
                stack,
                **counts[name, arch],
                device=device.name,
                work=work,
                threads=threads,
                shared_bytes=shared,
                blocks_per_multiprocessor=blocks,
                nvcc=module.cuda_compiler(),
            )
        )
    return sorted(rows, key=lambda row: (_natural(row.kernel), row.arch))


def _natural(text: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def faults(rows: Iterable[Resources]) -> list[str]:
    """Return what is wrong: kernels that spill, that fit no multiprocessor, that lack the instructions they are for."""
    wrong = []
    for row in rows:
        name = f"{row.kernel} on {row.arch}"
        if row.stack_bytes or row.local_accesses:
            wrong.append(f"{name}: {row.stack_bytes} bytes of stack, {row.local_accesses} accesses")
        if row.blocks_per_multiprocessor < 1:
            wrong.append(f"{name}: no block fits a multiprocessor")
        meant = MEANT.get(row.kernel.split("<")[0])
        if meant is None:
            wrong.append(f"{name}: what it is meant to have is not in MEANT")
        wrong += [f"{name}: no {kind}" for kind in meant or () if not getattr(row, kind)]
    return wrong


def read() -> list[Resources]:
    """Return the committed table."""
    return committed.read_rows(Resources, TABLE)


def main() -> int:
    """Print, check and, with --write, keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    os.environ["FASTVIT_EMULATE_CUDA"] = "1"
    rows = measure()
    names = [field.name for field in fields(Resources)]
    print(",".join(names))
    for row in rows:
        print(",".join(str(value) for value in asdict(row).values()))
    if arguments.write:
        committed.write_rows(Resources, rows, TABLE)
    wrong = faults(rows)
    print(f"{len(rows)} kernels, {len(wrong)} faults", *wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
