"""The committed table of registers, spills and instructions of the CUDA kernels fits the build, and holds no fault."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import cuda_launches, cuda_resources
from benchmarks.cuda_planning import DEVICES, blocks_per_multiprocessor, demangle
from benchmarks.cuda_resources import Resources
from fastvit.kernels import cuda
from tests.emulated import emulator, needs_emulator

__all__ = ["emulator"]

ADVICE = "python -m benchmarks.cuda_resources --write"


@pytest.fixture(scope="module")
def library() -> str:
    if not cuda.built_kernels():
        pytest.skip("fastvit._C was built without CUDA: nvcc was not found, or FASTVIT_BUILD_CUDA=0")
    if cuda_resources.find_cuobjdump() is None:
        pytest.skip("cuobjdump was not found: neither on PATH nor in triton")
    return str(importlib.import_module("fastvit._C").__file__)


def test_the_table_has_no_faults() -> None:
    rows = cuda_resources.read()
    assert {row.arch for row in rows} == {"sm_80", "sm_90a"}
    assert cuda_resources.faults(rows) == []


def same_compiler(table: Iterable[Resources]) -> bool:
    return importlib.import_module("fastvit._C").cuda_compiler() == next(iter(table)).nvcc


def built_rows(found: Iterable[tuple[tuple[str, str], object]]) -> dict[tuple[str, str], object]:
    """Return what was found of the architectures that the table has, by kernel and architecture."""
    return {(demangle(name), arch): what for (name, arch), what in found if arch in cuda_resources.DEVICE_OF}


def of_this_build() -> dict[tuple[str, str], Resources]:
    architectures = {f"sm_{name}" for name in importlib.import_module("fastvit._C").cuda_architectures().split()}
    return {(row.kernel, row.arch): row for row in cuda_resources.read() if row.arch in architectures}


def test_the_table_is_that_of_this_build(library: str) -> None:
    table = of_this_build()
    cuobjdump = cuda_resources.find_cuobjdump()
    assert cuobjdump is not None
    used = cuda_resources.usage(cuobjdump, library)
    assert {name for name, *_ in used} == set(cuda.built_kernels())
    built = built_rows(((name, arch), (registers, stack)) for name, arch, registers, stack in used)
    assert set(built) == set(table), ADVICE
    assert [name for name, *_, stack in used if stack] == []
    if not same_compiler(table.values()):
        pytest.skip("built by another nvcc than the table's: registers are not compared")
    assert built == {key: (row.registers, row.stack_bytes) for key, row in table.items()}, ADVICE


def test_instructions_are_those_of_the_table(library: str) -> None:
    table = of_this_build()
    if not same_compiler(table.values()):
        pytest.skip("built by another nvcc than the table's: instructions are not compared")
    cuobjdump = cuda_resources.find_cuobjdump()
    assert cuobjdump is not None
    counts = cuda_resources.instructions(cuobjdump, library)
    # Kernels for sm_90a are empty on other architectures.
    counted = {key: found for key, found in built_rows(counts.items()).items() if key in table}
    expected = {key: {kind: getattr(row, kind) for kind in cuda_resources.COUNTED} for key, row in table.items()}
    assert counted == expected, ADVICE


@needs_emulator
@pytest.mark.parametrize("arch", list(cuda_resources.DEVICE_OF))
def test_the_blocks_of_the_table_are_those_of_these_launchers(arch: str, emulator: ModuleType) -> None:
    (device,) = (device for device in DEVICES if device.name == cuda_resources.DEVICE_OF[arch])
    table = {row.kernel: row for row in cuda_resources.read() if row.arch == arch}
    launched = cuda_resources.launches(device)
    assert set(launched) == set(table), ADVICE
    for kernel, (work, threads, shared_bytes) in launched.items():
        row = table[kernel]
        assert (row.device, row.work, row.threads, row.shared_bytes) == (device.name, work, threads, shared_bytes), (
            ADVICE
        )
        assert row.blocks_per_multiprocessor == blocks_per_multiprocessor(device, threads, shared_bytes, row.registers)


GOOD = Resources(
    "attention_forward_resident<Half, 64, 2, 8, false>", "sm_80", 128, 0, 10, 0, 10, 10, 10, 0, 1, 1, 0,
    "A100", "B1", 128, 1024, 2, "13.0.88",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "lacks"),
    [
        ("attention_forward_resident", ("hmma", "ldsm", "ldgsts_128", "ldg_128", "stg_128")),
        ("attention_backward_streaming", ("hmma", "ldsm", "ldgsts_128", "stg_128")),
        ("attention_forward_sm90", ("hgmma", "utmaldg", "stg_128")),
        ("patch_embed_forward", ("hmma", "ldsm", "ldgsts_128", "stg_128")),
        ("patch_embed_backward_weight", ("hmma", "ldsm", "ldgsts_128")),
        ("patch_embed_backward_images", ("hmma", "ldsm", "ldgsts_128", "stg_128")),
        ("patch_embed_reduce", ("ldg_128",)),
    ],
)
def test_each_kernel_is_held_to_its_own_instructions(kernel: str, lacks: tuple[str, ...]) -> None:
    row = replace(GOOD, kernel=f"{kernel}<Half, 64>", hgmma=12, utmaldg=6)
    assert cuda_resources.faults([row]) == []
    for kind in cuda_resources.COUNTED[:-1]:
        expected = [f"{row.kernel} on sm_80: no {kind}"] if kind in lacks else []
        assert cuda_resources.faults([replace(row, **{kind: 0})]) == expected  # type: ignore[arg-type]


def test_faults_are_seen() -> None:
    assert cuda_resources.faults([GOOD]) == []
    assert "8 bytes of stack" in cuda_resources.faults([replace(GOOD, stack_bytes=8)])[0]
    assert "2 accesses" in cuda_resources.faults([replace(GOOD, local_accesses=2)])[0]
    assert "no block fits" in cuda_resources.faults([replace(GOOD, blocks_per_multiprocessor=0)])[0]
    assert "not in MEANT" in cuda_resources.faults([replace(GOOD, kernel="layer_norm<Half>")])[0]


def test_instructions_are_told_apart(tmp_path: Path) -> None:
    listing = """
    arch = sm_90a
            Function : _first
            /*0000*/  HMMA.16816.F32 R4, R8, R12, R4 ;
            /*0010*/  HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;
            /*0020*/  LDGSTS.E.BYPASS.128 [R7], [R4.64], P0 ;
            /*0030*/  LDGSTS.E.64 [R7], [R4.64], P0 ;
            /*0040*/  LDGDEPBAR ;
            /*0050*/  UTMALDG.4D [UR8], [UR4] ;
    arch = sm_80
            Function : _second
            /*0000*/  LDG.E.128 R4, [R2.64] ;
            /*0010*/  LDG.E.U16 R4, [R2.64] ;
            /*0020*/  STG.E.128 [R2.64], R4 ;
            /*0030*/  LDSM.16.MT88.4 R4, [R2] ;
            /*0040*/  STL [R1], R4 ;
            /*0050*/  LDL.64 R4, [R1] ;
    """
    program = tmp_path / "cuobjdump"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{listing}\nEND\n")
    program.chmod(0o755)
    none = dict.fromkeys(cuda_resources.COUNTED, 0)
    assert cuda_resources.instructions(str(program), "library") == {
        ("_first", "sm_90a"): none | {"hmma": 1, "hgmma": 1, "ldgsts": 2, "ldgsts_128": 1, "utmaldg": 1},
        ("_second", "sm_80"): none | {"ldg_128": 1, "stg_128": 1, "ldsm": 1, "local_accesses": 2},
    }


def test_names_are_readable() -> None:
    name = "_ZN7fastvit4cuda26attention_forward_residentINS0_8BFloat16ELi104ELi1ELi8ELb1EEEvNS0_16ForwardArgumentsE"
    assert demangle(name) == "attention_forward_resident<BFloat16, 104, 1, 8, true>"
    assert demangle("main") == "main"


@needs_emulator
def test_the_table_of_launches_is_that_of_these_launchers(emulator: ModuleType) -> None:
    table = cuda_launches.read()
    assert list(cuda_launches.measure()) == table, "python -m benchmarks.cuda_launches --write"
    assert min(row.blocks_per_multiprocessor for row in table) >= 1


def test_blocks_of_a_multiprocessor() -> None:
    h200 = next(device for device in DEVICES if device.name == "H200")
    count = blocks_per_multiprocessor
    assert count(h200, 128, 0, 128) == 4  # 16 warps of 128 registers
    assert count(h200, 128, 0, 32) == 16  # 2048 threads
    assert count(h200, 128, 75 * 1024, 32) == 3  # 228 KB, of which each block takes 76
    assert count(h200, 224, 0, 168) == 1  # 12 warps of 168 registers: one block of 7
    # As the CUDA occupancy calculator has it: 32 blocks on 9.0 and 24 on 8.9; shared memory in units of 128.
    l40s = next(device for device in DEVICES if device.name == "L40S")
    assert (count(h200, 32, 0, 32), count(l40s, 32, 0, 32)) == (32, 24)
    assert (count(h200, 32, 228 * 64 - 1024, 32), count(h200, 32, 228 * 64 - 1023, 32)) == (16, 15)
    assert count(l40s, 256, 0, 40) == 6  # 1536 threads
