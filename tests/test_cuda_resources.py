"""The committed table of registers, spills and instructions of the CUDA kernels fits the build, and holds no fault."""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import ModuleType

import pytest

from benchmarks import cuda_launches, cuda_resources
from benchmarks.cuda_resources import Resources
from fastvit.kernels import cuda
from tests.emulated import emulator, needs_emulator

__all__ = ["emulator"]


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


def test_the_table_is_that_of_this_build(library: str) -> None:
    module = importlib.import_module("fastvit._C")
    architectures = {f"sm_{name}" for name in module.cuda_architectures().split()}
    table = {(row.kernel, row.arch): row for row in cuda_resources.read() if row.arch in architectures}
    cuobjdump = cuda_resources.find_cuobjdump()
    assert cuobjdump is not None
    used = list(cuda_resources.usage(cuobjdump, library))
    assert {name for name, *_ in used} == set(cuda.built_kernels())
    built = {
        (cuda_resources.demangle(name), arch): (registers, stack)
        for name, arch, registers, stack in used
        if arch in {"sm_80", "sm_90a"}
    }
    advice = "python -m benchmarks.cuda_resources --write"
    assert {kernel for kernel, _ in built} == {kernel for kernel, _ in table}, advice
    assert [key for key, (_, stack) in built.items() if stack] == []
    if module.cuda_compiler() != next(iter(table.values())).nvcc:
        pytest.skip(f"built by nvcc {module.cuda_compiler()}, the table by another: registers are not compared")
    assert built == {key: (row.registers, row.stack_bytes) for key, row in table.items()}, advice


def test_instructions_are_those_of_the_table(library: str) -> None:
    cuobjdump = cuda_resources.find_cuobjdump()
    assert cuobjdump is not None
    table = {(row.kernel, row.arch): row for row in cuda_resources.read()}
    by_operation = {cuda_resources.demangle(name).split("<")[0]: name for name in cuda.built_kernels()}
    for name in by_operation.values():
        for (kernel, arch), counts in cuda_resources.instructions(cuobjdump, library, "-fun", name).items():
            row = table.get((cuda_resources.demangle(kernel), arch))
            if row is not None and row.nvcc == importlib.import_module("fastvit._C").cuda_compiler():
                assert counts == {kind: getattr(row, kind) for kind in counts}, row


def test_faults_are_seen() -> None:
    row = Resources("attention_forward<Half, 64>", "sm_80", 128, 0, 16, 10, 10, 10, 1, 1, 0, "13.0.88")
    assert cuda_resources.faults([row]) == []
    assert "8 bytes of stack" in cuda_resources.faults([replace(row, stack_bytes=8)])[0]
    assert "no matrix_products" in cuda_resources.faults([replace(row, matrix_products=0)])[0]
    assert "no async_copies" in cuda_resources.faults([replace(row, async_copies=0)])[0]


def test_names_are_readable() -> None:
    name = "_ZN7fastvit4cuda26attention_forward_residentINS0_8BFloat16ELi104ELi1ELi8ELb1EEEvNS0_16ForwardArgumentsE"
    assert cuda_resources.demangle(name) == "attention_forward_resident<BFloat16, 104, 1, 8, true>"
    assert cuda_resources.demangle("main") == "main"


@needs_emulator
def test_the_table_of_launches_is_that_of_these_launchers(emulator: ModuleType) -> None:
    table = cuda_launches.read()
    assert list(cuda_launches.measure()) == table, "python -m benchmarks.cuda_launches --write"
    assert min(row.blocks_per_multiprocessor for row in table) >= 1


def test_blocks_of_a_multiprocessor() -> None:
    h200 = next(device for device in cuda_launches.DEVICES if device.name == "H200")
    count = cuda_launches.blocks_per_multiprocessor
    assert count(h200, 128, 0, 128) == 4  # 16 warps of 128 registers
    assert count(h200, 128, 0, 32) == 16  # 2048 threads
    assert count(h200, 128, 75 * 1024, 32) == 3  # 228 KB, of which each block takes 76
    assert count(h200, 224, 0, 168) == 1  # 12 warps of 168 registers: one block of 7
