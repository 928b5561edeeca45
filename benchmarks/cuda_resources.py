"""What nvcc made of each CUDA kernel: registers, spills and instructions, read from fastvit._C; needs no GPU.

``python -m benchmarks.cuda_resources`` prints the table and exits 1 if a kernel spills or lacks the instructions that
it is meant to have; ``--write`` keeps it as benchmarks/cuda_resources.csv, which a test compares with the build.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastvit.kernels import cuda

TABLE = Path(__file__).parent / "cuda_resources.csv"
REGISTERS_PER_MULTIPROCESSOR = 65536
# Registers are given to warps in units of 8 per thread, 256 per warp (CUDA occupancy calculator, 8.0 to 9.0).
REGISTER_UNIT = 8
COUNTED = {
    "matrix_products": r"\b(HMMA|HGMMA)\.",
    "matrix_loads": r"\bLDSM\.",
    "async_copies": r"\b(LDGSTS|UTMALDG)\b",
    "wide_loads": r"\bLDG\.E\.128",
    "wide_stores": r"\bSTG\.E\.128",
    "local_accesses": r"\b(LDL|STL)\b",
}


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; instructions are counted in the code, not in a run."""

    kernel: str
    arch: str
    registers: int
    stack_bytes: int
    warps_per_multiprocessor: int
    matrix_products: int
    matrix_loads: int
    async_copies: int
    wide_loads: int
    wide_stores: int
    local_accesses: int
    nvcc: str


def find_cuobjdump() -> str | None:
    """Return a cuobjdump: on PATH, or the one in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return shutil.which(str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"))


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


def usage(cuobjdump: str, library: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield (mangled name, architecture, registers, stack bytes) of each kernel in ``library``.

    Kernels for sm_90a are compiled to nothing on the other architectures, and not counted there.
    """
    arch = name = ""
    for line in _run(cuobjdump, "-res-usage", library):
        if found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif (found := re.match(r"\s*REG:(\d+) STACK:(\d+)", line)) and ("_sm90I" not in name or arch == "sm_90a"):
            yield name, arch, int(found[1]), int(found[2])


def instructions(cuobjdump: str, library: str, *options: str) -> dict[tuple[str, str], dict[str, int]]:
    """Return how often each kind of instruction is in the code of each (mangled name, architecture)."""
    patterns = {kind: re.compile(pattern) for kind, pattern in COUNTED.items()}
    counts: dict[tuple[str, str], dict[str, int]] = {}
    arch, current = "", dict.fromkeys(COUNTED, 0)
    for line in _run(cuobjdump, "-sass", *options, library):
        if found := re.match(r"\s*Function : (\w+)", line):
            current = counts.setdefault((found[1], arch), dict.fromkeys(COUNTED, 0))
        elif found := re.match(r"arch = (\w+)", line):
            arch = found[1]
        else:
            for kind, pattern in patterns.items():
                current[kind] += pattern.search(line) is not None
    return counts


def _run(*command: str) -> Iterator[str]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")


def measure() -> list[Resources]:
    """Return the resources of every kernel in fastvit._C.

    Raises:
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
    rows = []
    for name, arch, registers, stack in usage(cuobjdump, library):
        allocated = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32
        warps = REGISTERS_PER_MULTIPROCESSOR // allocated
        counted = counts[name, arch]
        rows.append(Resources(demangle(name), arch, registers, stack, warps, **counted, nvcc=module.cuda_compiler()))
    return sorted(rows, key=lambda row: (_natural(row.kernel), row.arch))


def _natural(text: str) -> list[object]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def faults(rows: Iterable[Resources]) -> list[str]:
    """Return what is wrong: kernels that spill, and kernels without the instructions they are meant to have."""
    wrong = []
    for row in rows:
        if row.stack_bytes or row.local_accesses:
            wrong.append(f"{row.kernel} on {row.arch}: {row.stack_bytes} bytes of stack, {row.local_accesses} accesses")
        if "attention" in row.kernel or "gemm" in row.kernel:
            meant = ("matrix_products", "async_copies")
            wrong += [f"{row.kernel} on {row.arch}: no {kind}" for kind in meant if not getattr(row, kind)]
    return wrong


def read() -> list[Resources]:
    """Return the committed table."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Resources)}
    with open(TABLE, newline="") as file:
        return [Resources(**{name: kinds[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def main() -> int:
    """Print, check and, with --write, keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    arguments = parser.parse_args()
    rows = measure()
    names = [field.name for field in fields(Resources)]
    print(",".join(names))
    for row in rows:
        print(",".join(str(value) for value in asdict(row).values()))
    if arguments.write:
        with open(TABLE, "w", newline="") as file:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    wrong = faults(rows)
    print(f"{len(rows)} kernels, {len(wrong)} faults", *wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
