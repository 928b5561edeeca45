"""Every row of the Triton configuration table, compiled without a GPU: spills, shared memory, instructions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastvit.kernels.triton import configs

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]


def run_aot(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the ahead-of-time compiler in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "fastvit.kernels.triton.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_row_compiles_without_spills(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_aot("--arch", family, "--processes", "2")
    with capsys.disabled():
        print(f"\n{run.stdout}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "FAULT" not in run.stdout
    meant = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}[family]
    assert meant in run.stdout


def test_interpreter_is_refused_by_name() -> None:
    run = run_aot("--arch", "sm_80", interpret=True)
    assert run.returncode != 0
    assert "TRITON_INTERPRET" in run.stderr


def test_every_row_is_valid() -> None:
    rows = [config for row in configs.all_rows() for config in row.values()]
    assert rows
    assert all(configs.is_valid(config) for config in rows)


def test_a_row_that_cannot_run_is_invalid() -> None:
    assert not configs.is_valid(configs.Config(24, 64, 4, 2))
    assert not configs.is_valid(configs.Config(64, 8, 4, 2))
    assert not configs.is_valid(configs.Config(64, 64, 3, 2))
    assert not configs.is_valid(configs.Config(64, 64, 4, 9))
