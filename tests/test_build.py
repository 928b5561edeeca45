"""The build: where torch may be included, what each instruction set may export, and what setup.py does when asked."""

from __future__ import annotations

import importlib
import io
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pybind11
import pytest
from ninja.ninja_syntax import Writer

from fastvit.kernels import cuda

ROOT = Path(__file__).parent.parent
TORCH_INCLUDE = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)/([^>"]*)')


def sources(pattern: str) -> list[Path]:
    found = sorted(ROOT.glob(pattern))
    assert found
    return found


def test_kernels_never_see_torch() -> None:
    for path in [*sources("csrc/cpu/*"), *sources("csrc/cuda/*"), *sources("csrc/emulator/*.h")]:
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
    # Mangled: nm gives up on the longest names.
    listed = subprocess.run([nm, "--defined-only", target], capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=2)[2] for line in listed.splitlines() if line.split()[1] in "TWVuBD"]
    shared = [name for name in names if "7fastvit3cpu8baseline" not in name and not name.startswith("DW.ref")]
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


def read_setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run setup.py without building anything; return what it defines."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_which_toolkit_and_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = read_setup(monkeypatch)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho '#$ TOP=/opt/toolkit/bin/..' >&2; echo 'Cuda compilation tools, V13.0.88'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    assert module["find_nvcc"]() == str(nvcc)
    assert module["cuda_root"](str(nvcc)) == "/opt/toolkit"
    assert module["nvcc_version"](str(nvcc)) == "13.0.88"
    monkeypatch.setenv("FASTVIT_BUILD_CUDA", "0")
    assert module["find_nvcc"]() is None
    for given, expected in (("", ["80", "90a"]), ("8.6 9.0+PTX", ["86", "90"]), ("10.0a;12.0", ["100a", "120"])):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given or "8.0;9.0a")
        assert module["cuda_architectures"]() == expected


def test_a_torch_without_cuda_builds_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = read_setup(monkeypatch)
    (tmp_path / "lib").mkdir()
    monkeypatch.setitem(module["find_nvcc"].__globals__, "find_torch", lambda: tmp_path)
    monkeypatch.setenv("NVCC", shutil.which("true") or "true")
    assert module["find_nvcc"]() is None
    monkeypatch.setenv("FASTVIT_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="the torch that is installed has no CUDA"):
        module["find_nvcc"]()


def test_pybind11_is_the_one_that_setup_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch has a copy among its headers, which in 2.11 is an error where TORCH_TARGET_VERSION is defined.
    module, written = read_setup(monkeypatch), io.StringIO()
    module["cxx_rule"](Writer(written, width=1000), "c++", "")
    directories = re.findall(r"-isystem (\S+)", written.getvalue())
    assert next(path for path in directories if Path(path, "pybind11").is_dir()) == pybind11.get_include()
    assert str(module["find_torch"]() / "include") in directories


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is x86-64's")
def test_instructions_without_a_result_reach_the_binary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # To GCC 12 a function that only prefetches does nothing, and its calls are left out unless it is inlined.
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = read_setup(monkeypatch)["INSTRUCTION_SETS"]["amx"].split()
    parameters = "const float* source, const SplitMatrix<3>& target, Range& range"
    calls = {
        "rows_of_a": "split_a(source, 2304, 197, 64, 1.0f, target, range)",
        "columns_of_b": "split_b(source, 2304, 64, 197, 1.0f, target, range)",
        "transposed_b": "split_b_transposed(source, 2304, 197, 64, 1.0f, target, range)",
        "transposed_a": "split_a_transposed(source, 2304, 64, 197, target, range)",
        "to_write": "fetch_rows<true>(source, 2304, 197, 64)",
        "awake": "keep_tiles_awake()",
        "transposed_pairs": "pack_transposed((const BFloat16*)source, 1152, 197, 64, target.data)",
    }
    instructions = dict.fromkeys(calls, "prefetcht0") | {"to_write": "prefetchw", "awake": "tdpbf16ps"}
    functions = [f'extern "C" void {name}({parameters}) {{ {call}; }}' for name, call in calls.items()]
    source = ['#include "split.h"', "using namespace fastvit::cpu::probe;", *functions]
    (tmp_path / "probe.cpp").write_text("\n".join(source))
    command = [compiler, "-std=c++20", "-O3", "-DFASTVIT_CAPABILITY=probe", *flags, f"-I{ROOT / 'csrc/cpu'}", "-S"]
    subprocess.run([*command, tmp_path / "probe.cpp", "-o", tmp_path / "probe.s"], check=True)
    assembly = (tmp_path / "probe.s").read_text()
    bodies = dict(re.findall(r"^([A-Za-z_][\w.]*):\n(.*?)\.cfi_endproc", assembly, re.MULTILINE | re.DOTALL))
    for name in calls:
        called = re.findall(r"\t(?:call|jmp)\t([\w.]+)", bodies[name])
        text = bodies[name] + "".join(bodies.get(symbol, "") for symbol in called)
        assert instructions[name] in text, name


@pytest.mark.parametrize(("given", "expected"), [("", ["_C"]), ("1", ["_C", "_emulator"]), ("only", ["_emulator"])])
def test_the_emulator_is_built_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, given: str, expected: list[str]
) -> None:
    monkeypatch.setenv("FASTVIT_BUILD_EMULATOR", given)
    assert read_setup(monkeypatch)["NAMES"] == [f"fastvit.{name}" for name in expected]
    monkeypatch.setenv("FASTVIT_BUILD_EMULATOR", "yes")
    with pytest.raises(SystemExit, match="FASTVIT_BUILD_EMULATOR: got 'yes'; accepted are 0, 1, only and unset"):
        read_setup(monkeypatch)


@pytest.mark.parametrize("given", ["1", "only"])
def test_no_wheel_is_built_with_the_emulator(given: str, tmp_path: Path) -> None:
    command = ["build", f"--build-base={tmp_path}", "bdist_wheel", f"--dist-dir={tmp_path}"]
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=ROOT,
        env={**os.environ, "FASTVIT_BUILD_EMULATOR": given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "FASTVIT_BUILD_EMULATOR: the emulator is for tests, never shipped" in result.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert not list(tmp_path.rglob("*.whl"))


def test_a_wheel_has_no_emulator_that_was_built_in_place_before(tmp_path: Path) -> None:
    for name in ("csrc", "fastvit"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    # Writes empty files.
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do case "$1" in -o | -MF) : > "$2" ;; esac; shift; done\n')
    compiler.chmod(0o755)

    def setup(emulator: str, *command: str) -> None:
        given = {"FASTVIT_BUILD_EMULATOR": emulator, "FASTVIT_BUILD_CUDA": "0", "CXX": str(compiler)}
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", *command],
            cwd=tmp_path,
            env={**os.environ, **given},
            check=True,
            capture_output=True,
        )

    setup("only", "build_ext", "--inplace")
    assert list(tmp_path.glob("fastvit/_emulator.*.so"))
    # As earlier versions of setup.py left one.
    stale = tmp_path / "library/fastvit/_emulator.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    setup("0", "build", "--build-lib=library", "bdist_wheel")
    (wheel,) = tmp_path.glob("dist/*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert [name.split(".")[0] for name in libraries] == ["fastvit/_C"]


def test_the_cuda_kernels_of_this_build() -> None:
    if not cuda.built_kernels():
        pytest.skip("fastvit._C was built without CUDA: nvcc was not found, or FASTVIT_BUILD_CUDA=0")
    module = importlib.import_module("fastvit._C")
    assert module.cuda_architectures().split()
    assert re.fullmatch(r"\d+\.\d+\.\d+", module.cuda_compiler())
    names = {name for name in cuda.built_kernels() if "attention_forward_resident" in name}
    assert any("Half" in name for name in names)
    assert any("BFloat16" in name for name in names)
