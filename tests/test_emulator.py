"""The emulator catches faults planted in the real kernels, one at a time; and the sanitizers are clean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastvit
from tests.emulated import emulator, needs_emulator

__all__ = ["emulator"]
# One worker of pytest-xdist builds the tree once.
pytestmark = [needs_emulator, pytest.mark.xdist_group("emulator")]
ROOT = Path(__file__).parent.parent
ONE_HEAD_DIM = "-DFASTVIT_CUDA_HEAD_DIMS=64"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# Both forms, whole tiles and partial ones; prints the first thing that is wrong.
SCRIPT = """
import torch
from fastvit import _emulator
from fastvit.testing import AttentionCase, check_attention

torch.set_num_threads(1)
for shared_bytes in (227 * 1024, 60 * 1024):
    for seqlen_q, seqlen_k, features in ((197, 197, {}), (130, 150, {"bias": "additive"}), (50, 300, {})):
        _emulator.configure(multiprocessors=1, shared_bytes=shared_bytes)
        case = AttentionCase(1, 2, seqlen_q, seqlen_k, dtype=torch.float16, **features)
        for result in check_attention(case, "cuda", backward=False, written_out=True):
            if not result.passed:
                raise SystemExit(f"tolerance: {result}")
print("conflicts", _emulator.statistics()["bank_conflicts"])
"""


@dataclass(frozen=True)
class Tree:
    """A copy of the sources with an emulator of its own, for one head dim."""

    path: Path
    compiler_flags: str
    linker_flags: str = ""

    def create(self) -> None:
        for name in ("csrc", "fastvit"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, self.path / name, ignore=ignored, dirs_exist_ok=True)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.path)
        self.build()

    def build(self) -> None:
        flags = {"CXXFLAGS": f"{self.compiler_flags} {ONE_HEAD_DIM}", "LDFLAGS": self.linker_flags}
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=self.path,
            env={**os.environ, "FASTVIT_BUILD_EMULATOR": "only", **flags},
            check=True,
            capture_output=True,
        )

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=self.path,
            env={**os.environ, "FASTVIT_EMULATE_CUDA": "1", "PYTHONPATH": str(self.path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    made = Tree(tmp_path_factory.mktemp("tree"), "-O1")
    made.create()
    result = made.run(SCRIPT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "conflicts 0"
    return made


@dataclass(frozen=True)
class Fault:
    """A line of a kernel, what it is made to be, and what the emulator or the rule says of it."""

    name: str
    file: str
    line: str
    replacement: str
    said: str
    occurrence: int = 0


FORWARD, TILE = "attention_forward.cuh", "tile.cuh"
FAULTS = (
    Fault("forgotten wait", FORWARD, "cp_async_wait<1>();", "", "on its way", 1),
    Fault("wait for too little", FORWARD, "cp_async_wait<0>();", "cp_async_wait<1>();", "on its way"),
    Fault(
        "missing barrier after a wait",
        FORWARD,
        "    barrier();\n    const HeadIndex",
        "    const HeadIndex",
        "race|on its way|before it is written",
    ),
    Fault("missing barrier before reuse", FORWARD, "      barrier();\n    }\n    finish", "    }\n    finish", "race"),
    Fault("missing warp barrier", FORWARD, "warp_barrier();\n  store_tile", "store_tile", "race"),
    Fault(
        "barrier that one warp skips",
        FORWARD,
        "    barrier();\n    if (p.stages == 2)",
        "    if (warp > 0 || item + grid_blocks() < p.items) barrier();\n    if (p.stages == 2)",
        "not all threads reach",
    ),
    Fault("row off by one", TILE, "return row < rows &&", "return row <= rows &&", "out of bounds|tolerance"),
    Fault(
        "tile off by one",
        FORWARD,
        "key_tile, tile_row + 8 * j",
        "key_tile, tile_row + 8 * j + 8",
        "before it is written|out of bounds|tolerance",
    ),
    Fault(
        "output not guarded",
        TILE,
        "if (!target.has(first + row, chunk * kChunkElements)) continue;",
        "",
        "global memory out of bounds",
    ),
    Fault(
        "wrong fragment map",
        TILE,
        "left[1] = pack<T>(first[2], first[3]);\n  left[2] = pack<T>(second[0], second[1]);",
        "left[2] = pack<T>(first[2], first[3]);\n  left[1] = pack<T>(second[0], second[1]);",
        "tolerance",
    ),
    Fault("transpose forgotten", TILE, "ldmatrix<4, true>", "ldmatrix<4, false>", "tolerance"),
    Fault(
        "misaligned copy",
        TILE,
        "cp_async<16>(Tile<kDim>::address(begin, row, chunk)",
        "cp_async<16>(Tile<kDim>::address(begin, row, chunk) + 8",
        "misaligned|out of bounds",
    ),
    Fault("rescale forgotten", FORWARD, "state.output[m][c][2 * half] *= rescale;", "", "tolerance"),
    Fault("permutation dropped", TILE, "(row / (8 / kPermuted) & (kPermuted - 1))", "(row & 0)", "conflicts [1-9]"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name.replace(" ", "-") for fault in FAULTS])
def test_a_planted_fault_is_caught(tree: Tree, fault: Fault) -> None:
    path = tree.path / "csrc/cuda" / fault.file
    sound = path.read_text()
    parts = sound.split(fault.line)
    assert len(parts) > fault.occurrence + 1, f"{fault.file} has changed: {fault.line!r} is gone"
    head, tail = fault.line.join(parts[: fault.occurrence + 1]), fault.line.join(parts[fault.occurrence + 1 :])
    try:
        path.write_text(head + fault.replacement + tail)
        tree.build()
        result = tree.run(SCRIPT)
    finally:
        path.write_text(sound)
    output = result.stdout + result.stderr
    assert re.search(fault.said, output), output[-2000:]


def test_a_launch_that_does_not_fit_is_refused(emulator: ModuleType) -> None:
    emulator.configure(shared_bytes=16 * 1024)
    query = torch.randn(1, 1, 300, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="bytes of shared memory; the device has 16384"):
        fastvit.attention(query, query, query, backend="cuda")


def test_sanitizers_are_clean(tmp_path: Path) -> None:
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        assert compiler is not None
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        libraries.append(found.stdout.strip())
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip(f"the compiler has no AddressSanitizer that can be preloaded: {libraries}")
    sanitized = Tree(tmp_path, f"-O1 {SANITIZERS}", SANITIZERS)
    sanitized.create()
    result = sanitized.run(SCRIPT, LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.strip() == "conflicts 0"
