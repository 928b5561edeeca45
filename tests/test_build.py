"""The build: where torch may be included, what each instruction set may export, and what setup.py does when asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/([^>"]*)')


def sources(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found
    return found


def test_kernels_never_see_torch() -> None:
    for path in sources("csrc/cpu/*"):
        assert not TORCH_INCLUDE.search(path.read_text()), path


def test_only_the_stable_abi_is_included() -> None:
    for path in [*sources("csrc/*.*"), *sources("csrc/ops/*")]:
        for root, rest in TORCH_INCLUDE.findall(path.read_text()):
            assert root == "torch", path
            assert rest.startswith(("csrc/stable/", "headeronly/")), path


def test_an_instruction_set_shares_no_function_with_another(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    nm = shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("needs a C++ compiler and nm")
    target = tmp_path / "kernels.o"
    command = [compiler, "-std=c++20", "-O1", "-DFASTVIT_CAPABILITY=baseline", "-c", ROOT / "csrc/cpu/kernels.cpp"]
    subprocess.run([*command, "-o", target], check=True)
    listed = subprocess.run([nm, "-C", "--defined-only", target], capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=2)[2] for line in listed.splitlines() if line.split()[1] in "TWVuBD"]
    shared = [name for name in names if "fastvit::cpu::baseline::" not in name and not name.startswith("DW.ref")]
    assert any("attention_forward" in name for name in names)
    assert shared == []


def build(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", f"-t{environment['OUT']}", f"-b{environment['OUT']}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_compiler_the_build_goes_on_and_says_so(tmp_path: Path) -> None:
    result = build({"OUT": str(tmp_path), "CXX": "no-such-compiler"})
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler (CXX=no-such-compiler): fastvit._C is not built" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_that_is_asked_for_and_absent_is_an_error(tmp_path: Path) -> None:
    result = build({"OUT": str(tmp_path), "FASTVIT_BUILD_CUDA": "1", "NVCC": "no-such-nvcc"})
    assert result.returncode != 0
    assert "FASTVIT_BUILD_CUDA=1: nvcc was not found" in result.stderr
    result = build({"OUT": str(tmp_path), "FASTVIT_BUILD_CUDA": "yes"})
    assert "FASTVIT_BUILD_CUDA: got 'yes'; accepted are 0, 1 and unset" in result.stderr


def test_cuda_sources_are_compiled_when_nvcc_is_found(tmp_path: Path) -> None:
    nvcc = shutil.which(os.environ.get("NVCC", "nvcc"))
    if nvcc is None:
        pytest.skip("nvcc was not found")
    # A copy of the tree with one kernel in csrc/cuda: the package itself has none yet.
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(ROOT / "fastvit", tree / "fastvit", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "csrc/cuda").mkdir()
    (tree / "csrc/cuda/twice.cu").write_text(
        "__global__ void twice(float* x) { x[threadIdx.x] *= 2; }\n"
        "void launch_twice(float* x) { twice<<<1, 32>>>(x); }\n"
    )
    code = "import torch; from fastvit import _C; print(_C.cuda_architectures())"
    for wanted, expected in (("1", "80 90a"), ("0", "")):
        environment = {**os.environ, "FASTVIT_BUILD_CUDA": wanted, "TORCH_CUDA_ARCH_LIST": "8.0;9.0a"}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
        result = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
        assert result.stdout.strip() == expected
