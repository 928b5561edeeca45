"""The emulator refuses what no device would launch; and the kernels in it run clean under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastvit
from tests.emulated import emulator, needs_emulator

__all__ = ["emulator"]
pytestmark = needs_emulator
ROOT = Path(__file__).parent.parent
ONE_HEAD_DIM = "-DFASTVIT_CUDA_HEAD_DIMS=64"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"


def test_a_launch_that_does_not_fit_is_refused(emulator: ModuleType) -> None:
    emulator.configure(shared_bytes=16 * 1024)
    query = torch.randn(1, 1, 300, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="bytes of shared memory; the device has 16384"):
        fastvit.attention(query, query, query, backend="cuda")


def build_sanitized(folder: Path) -> None:
    """Build a copy of the sources, for one head dim, with the emulator under the sanitizers."""
    for name in ("csrc", "fastvit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    flags = {"CXXFLAGS": f"-O1 {SANITIZERS} {ONE_HEAD_DIM}", "LDFLAGS": SANITIZERS}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "FASTVIT_BUILD_EMULATOR": "only", **flags},
        check=True,
        capture_output=True,
    )


def test_sanitizers_are_clean(tmp_path: Path) -> None:
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        assert compiler is not None
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"the compiler has no AddressSanitizer that can be preloaded: {libraries}")
    build_sanitized(tmp_path)
    result = subprocess.run(
        [sys.executable, ROOT / "tests/sanitized_program.py"],
        cwd=tmp_path,
        env={
            **os.environ,
            "FASTVIT_EMULATE_CUDA": "1",
            "PYTHONPATH": str(tmp_path),
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "84 cases; kernels that were not run: []"
