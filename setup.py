"""Builds fastvit._C with ninja: the CPU sources once per instruction set, CUDA sources when nvcc is found.

Environment: FASTVIT_BUILD_CUDA=0|1 (default: 1 if nvcc is found), TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), MAX_JOBS, CXX,
CXXFLAGS, NVCC. Neither a GPU nor nvcc is needed; without a C++ compiler the pure-Python backends are installed alone.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja import BIN_DIR
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# One wheel serves every torch from this one on: the oldest supported version, 2.11, as torch's headers encode it.
TORCH_TARGET_VERSION = "0x020b000000000000"
INSTRUCTION_SETS = {"baseline": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma -mf16c"
    # GCC 12's own AVX-512 headers read a register before it is written, on purpose, and warn about it.
    INSTRUCTION_SETS["avx512"] = (
        "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
        " -Wno-maybe-uninitialized"
    )
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"


def find_nvcc() -> str | None:
    """Return nvcc's path, or None where CUDA is not to be built; FASTVIT_BUILD_CUDA=1 makes its absence an error."""
    wanted = os.environ.get("FASTVIT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"FASTVIT_BUILD_CUDA: got {wanted!r}; accepted are 0, 1 and unset")
    nvcc = None if wanted == "0" else shutil.which(os.environ.get("NVCC", "nvcc"))
    if wanted == "1" and nvcc is None:
        sys.exit("FASTVIT_BUILD_CUDA=1: nvcc was not found on PATH nor in NVCC")
    return nvcc


def cuda_root(nvcc: str) -> str:
    """Ask nvcc where its toolkit is: the nvcc on PATH may be a wrapper that lives elsewhere."""
    output = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    return str(Path(found[1].strip()).resolve()) if found else str(Path(nvcc).resolve().parent.parent)


def cuda_architectures() -> list[str]:
    """Return the architectures to build for, as nvcc names them ("80", "90a")."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(",", ";").replace(" ", ";")
    return [name.removesuffix("+PTX").replace(".", "") for name in listed.split(";") if name]


class BuildNative(build_ext):
    """Writes build.ninja and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link ``ext`` where setuptools wants it; without a compiler, say so and leave it out."""
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            named = os.environ.get("CXX", "c++")
            print(f"warning: no C++ compiler (CXX={named}): fastvit._C is not built", file=sys.stderr)
            return
        build, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as file:
            # Its annotation says str; it takes a file. Lines must not wrap inside quoted defines.
            write_ninja(Writer(file, width=1000), compiler, target)  # type: ignore[arg-type]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([Path(BIN_DIR) / "ninja", "--quiet", "-C", build, *jobs], check=True)


def write_ninja(ninja: Writer, compiler: str, target: Path) -> None:
    """Describe the build: one object per source, the kernels once per instruction set."""
    torch_spec = importlib.util.find_spec("torch")
    if torch_spec is None or torch_spec.origin is None:
        sys.exit("torch is not installed; its headers are needed to build fastvit._C")
    torch = Path(torch_spec.origin).parent
    includes = f"-isystem {torch}/include -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    nvcc = find_nvcc()
    cuda_sources = sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else []
    architectures = cuda_architectures() if cuda_sources else []
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    defines += f" -DFASTVIT_CUDA_ARCHITECTURES='\"{' '.join(architectures)}\"'"
    defines += "".join(f" -DFASTVIT_BUILT_{name.upper()}" for name in INSTRUCTION_SETS)
    flags = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra {os.environ.get('CXXFLAGS', '')}"
    command = f"{compiler} -MMD -MF $out.d {flags} {defines} {includes} $more -c $in -o $out"
    ninja.rule("cxx", command, depfile="$out.d", deps="gcc")
    per_set = ROOT / "csrc/cpu/kernels.cpp"
    objects: list[str] = []
    for source in sorted(ROOT.glob("csrc/**/*.cpp")):
        if source != per_set:
            objects.append(f"{source.parent.name}_{source.stem}.o")
            ninja.build([objects[-1]], "cxx", [str(source)])
    for name, options in INSTRUCTION_SETS.items():
        more = {"more": f"-DFASTVIT_CAPABILITY={name} {options}"}
        objects.append(f"kernels_{name}.o")
        ninja.build([objects[-1]], "cxx", [str(per_set)], variables=more)
    libraries = f"-L{torch}/lib -ltorch_cpu"
    if nvcc and cuda_sources:
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures)
        command = f"{nvcc} -std=c++20 -O3 -Xcompiler -fPIC {gencode} -MD -MF $out.d -c $in -o $out"
        ninja.rule("nvcc", command, depfile="$out.d", deps="gcc")
        for source in cuda_sources:
            objects.append(f"cuda_{source.stem}.o")
            ninja.build([objects[-1]], "nvcc", [str(source)])
        libraries += f" -L{cuda_root(nvcc)}/lib64 -lcudart"
    ninja.rule("link", f"{compiler} -shared $in -o $out {libraries}")
    ninja.build([str(target)], "link", objects)
    ninja.default([str(target)])


setup(ext_modules=[Extension("fastvit._C", sources=[])], cmdclass={"build_ext": BuildNative})
