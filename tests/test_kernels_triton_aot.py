"""Every row of the Triton configuration table, compiled without a GPU: spills, shared memory, instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.kernels.triton import configs

pytest.importorskip("triton")
from fastvit.kernels.triton import aot

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run Python in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=900, check=False
    )


def run_aot(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the ahead-of-time compiler."""
    return run("-m", "fastvit.kernels.triton.aot", *arguments, interpret=interpret)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_row_compiles_without_spills(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_aot("--arch", family, "--processes", "2")
    with capsys.disabled():
        print(f"\n{result.stdout}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAULT" not in result.stdout
    meant = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[family]
    assert meant in result.stdout


def test_interpreter_is_refused_by_name() -> None:
    result = run_aot("--arch", "sm_80", interpret=True)
    assert result.returncode != 0
    assert "TRITON_INTERPRET" in result.stderr


# The heads of a packed projection are 72 elements apart, which the compiler is not told to be a multiple of anything.
HEADS_OF_72 = """
from dataclasses import replace
from fastvit.kernels.triton import aot
for kernel in ("attention_forward", "grad_key_value", "grad_query"):
    job = aot._attention_job(kernel, "sm_90", "bf16", 72)
    outcome = aot.compile_job(replace(job, constants={**job.constants, "ALIGNED": False}))
    print(outcome.resources.single_accesses > 0)
"""


def test_without_the_promise_heads_of_72_are_moved_one_element_at_a_time() -> None:
    result = run("-c", HEADS_OF_72)
    assert result.stdout.split() == ["True"] * 3, result.stderr[-2000:]


@pytest.mark.parametrize(
    ("accesses", "moves"),
    [
        ("ld.global.b16 %rs1, [%rd1];", 1),
        ("@%p1 st.global.b16 [ %rd1 + 0 ], { %rs1 };", 1),
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 0),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;", 0),
        ("global_load_ushort v1, v[2:3], off", 1),
        ("buffer_store_short v1, v2, s[0:3], 0 offen", 1),
        ("global_load_dwordx4 v[0:3], v[4:5], off", 0),
    ],
)
def test_single_elements_are_counted_in_both_assemblies(accesses: str, moves: int) -> None:
    assert len(aot.SINGLE.findall(accesses)) == moves


def test_every_row_is_valid() -> None:
    rows = [config for row in configs.all_rows() for config in row.values()]
    assert rows
    assert all(configs.is_valid(config) for config in rows)


def test_a_row_that_cannot_run_is_invalid() -> None:
    assert not configs.is_valid(configs.Config(24, 64, 4, 2))
    assert not configs.is_valid(configs.Config(64, 8, 4, 2))
    assert not configs.is_valid(configs.Config(64, 64, 3, 2))
    assert not configs.is_valid(configs.Config(64, 64, 4, 9))
