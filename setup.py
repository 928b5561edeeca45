"""Builds fastvit._C with ninja: the CPU sources once per instruction set, CUDA sources when nvcc is found.

Environment: FASTVIT_BUILD_CUDA=0|1 (default: 1 if nvcc is found), TORCH_CUDA_ARCH_LIST ("8.0;9.0a"), MAX_JOBS, CXX,
CXXFLAGS, LDFLAGS, NVCC. Neither a GPU nor nvcc is needed; without a C++ compiler the pure-Python backends are installed
alone. FASTVIT_BUILD_EMULATOR=1 builds fastvit._emulator as well (the CUDA sources for the host: for tests, never
shipped), "only" nothing else. FASTVIT_BUILD_NATIVE=0 builds nothing at all.
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
        "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mprfchw"
        " -Wno-maybe-uninitialized"
    )
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"
    INSTRUCTION_SETS["amx"] = INSTRUCTION_SETS["avx512_bf16"] + " -mamx-tile -mamx-bf16"


def find_torch() -> Path:
    """Return torch's directory, with its headers and libraries."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed; its headers are needed to build fastvit._C")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    """Return nvcc's path, or None where CUDA is not to be built; FASTVIT_BUILD_CUDA=1 makes its absence an error."""
    wanted = os.environ.get("FASTVIT_BUILD_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"FASTVIT_BUILD_CUDA: got {wanted!r}; accepted are 0, 1 and unset")
    nvcc = None if wanted == "0" else shutil.which(os.environ.get("NVCC", "nvcc"))
    if wanted == "1" and nvcc is None:
        sys.exit("FASTVIT_BUILD_CUDA=1: nvcc was not found on PATH nor in NVCC")
    if nvcc and not list(find_torch().glob("lib/libtorch_cuda.*")):
        if wanted == "1":
            sys.exit("FASTVIT_BUILD_CUDA=1: the torch that is installed has no CUDA")
        return None
    return nvcc


def cuda_root(nvcc: str) -> str:
    """Ask nvcc where its toolkit is: the nvcc on PATH may be a wrapper that lives elsewhere."""
    output = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    return str(Path(found[1].strip()).resolve()) if found else str(Path(nvcc).resolve().parent.parent)


def nvcc_version(nvcc: str) -> str:
    """Return "13.0.88"."""
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", output)
    return found[1] if found else "unknown"


def cuda_architectures() -> list[str]:
    """Return the architectures to build for, as nvcc names them ("80", "90a")."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(",", ";").replace(" ", ";")
    return [name.removesuffix("+PTX").replace(".", "") for name in listed.split(";") if name]


class BuildNative(build_ext):
    """Writes build.ninja and runs it."""

    def run(self) -> None:
        """Build; the emulator in place alone, so that no wheel has it."""
        if not self.inplace and any(ext.name == "fastvit._emulator" for ext in self.extensions):
            sys.exit("FASTVIT_BUILD_EMULATOR: the emulator is for tests, never shipped: build_ext --inplace")
        if self.inplace:
            # Where setuptools links before it copies: a wheel is made of everything in build_lib, whoever put it there.
            self.build_lib = str(Path(self.build_temp) / "in_place")
        else:
            for stale in Path(self.build_lib).glob("fastvit/_emulator.*"):
                stale.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Compile and link ``ext`` where setuptools wants it; without a compiler, say so and leave it out."""
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if compiler is None:
            named = os.environ.get("CXX", "c++")
            print(f"warning: no C++ compiler (CXX={named}): {ext.name} is not built", file=sys.stderr)
            return
        build, target = Path(self.build_temp).resolve() / ext.name, Path(self.get_ext_fullpath(ext.name)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as file:
            # Its annotation says str; it takes a file. Lines must not wrap inside quoted defines.
            ninja = Writer(file, width=1000)  # type: ignore[arg-type]
            objects, libraries = (emulator if ext.name == "fastvit._emulator" else native)(ninja, compiler)
            flags = os.environ.get("LDFLAGS", "")
            ninja.rule("link", f"{compiler} -shared $in -o $out {flags} -L{find_torch()}/lib -ltorch_cpu {libraries}")
            ninja.build([str(target)], "link", objects)
            ninja.default([str(target)])
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([Path(BIN_DIR) / "ninja", "--quiet", "-C", build, *jobs], check=True)


def cxx_rule(ninja: Writer, compiler: str, options: str) -> None:
    """Define the rule ``cxx``: one C++ source, with ``$more`` options of its own."""
    # pybind11 comes before torch's copy of it, which some versions (2.11) forbid where the stable ABI is asked for.
    includes = (pybind11.get_include(), find_torch() / "include", sysconfig.get_path("include"))
    flags = f"-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"
    flags += "".join(f" -isystem {path}" for path in includes)
    command = f"{compiler} -MMD -MF $out.d {flags} {options} {os.environ.get('CXXFLAGS', '')} $more -c $in -o $out"
    ninja.rule("cxx", command, depfile="$out.d", deps="gcc")


def compile_all(ninja: Writer, rule: str, patterns: list[str], more: str = "") -> list[str]:
    """Describe one object per source that matches, in the order of the patterns; return the objects."""
    objects = []
    for source in dict.fromkeys(path for pattern in patterns for path in sorted(ROOT.glob(f"csrc/{pattern}"))):
        objects.append(f"{source.parent.name}_{source.stem}.o")
        ninja.build([objects[-1]], rule, [str(source)], variables={"more": more})
    return objects


def native(ninja: Writer, compiler: str) -> tuple[list[str], str]:
    """Describe fastvit._C; return its objects and libraries."""
    nvcc = find_nvcc()
    architectures = cuda_architectures() if nvcc else []
    defines = f"-DFASTVIT_CUDA_ARCHITECTURES='\"{' '.join(architectures)}\"'"
    defines += f" -DFASTVIT_CUDA_COMPILER='\"{nvcc_version(nvcc) if nvcc else ''}\"'"
    defines += "".join(f" -DFASTVIT_BUILT_{name.upper()}" for name in INSTRUCTION_SETS)
    cxx_rule(ninja, compiler, f"-O3 {defines}")
    objects: list[str] = []
    if nvcc is not None:
        gencode = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in architectures)
        command = f"{nvcc} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden {gencode} -MD -MF $out.d -c $in -o $out"
        ninja.rule("nvcc", command, depfile="$out.d", deps="gcc")
        # What takes longest begins first: ninja takes them in this order.
        objects += compile_all(ninja, "nvcc", ["cuda/attention_forward_*.cu", "cuda/*.cu"])
        objects += compile_all(ninja, "cxx", ["ops/*_cuda.cpp"], "-DUSE_CUDA")
    objects += compile_all(ninja, "cxx", ["*.cpp", "ops/*_cpu.cpp", "cpu/capability.cpp", "cpu/scratch.cpp"])
    for name, options in INSTRUCTION_SETS.items():
        more = {"more": f"-DFASTVIT_CAPABILITY={name} {options}"}
        objects.append(f"kernels_{name}.o")
        ninja.build([objects[-1]], "cxx", [str(ROOT / "csrc/cpu/kernels.cpp")], variables=more)
    if nvcc is None:
        return objects, ""
    # Statically: a wheel must not depend on which CUDA runtime torch came with.
    return objects, f"-ltorch_cuda -L{cuda_root(nvcc)}/lib64 -lcudart_static -ldl -lrt -lpthread"


def emulator(ninja: Writer, compiler: str) -> tuple[list[str], str]:
    """Describe fastvit._emulator; return its objects and libraries."""
    cxx_rule(ninja, compiler, "-O2 -DFASTVIT_EMULATOR -Wno-unknown-pragmas")
    objects = compile_all(ninja, "cxx", ["schemas.cpp", "ops/*_cuda.cpp", "emulator/*.cpp"])
    # Kernels are visible, so that they can be named.
    return objects + compile_all(ninja, "cxx", ["cuda/*.cu"], "-x c++ -fvisibility=default"), "-ldl"


WANTED = {"": ["fastvit._C"], "1": ["fastvit._C", "fastvit._emulator"], "only": ["fastvit._emulator"]}
NAMES = WANTED.get(os.environ.get("FASTVIT_BUILD_EMULATOR", "").replace("0", ""))
if NAMES is None:
    sys.exit(f"FASTVIT_BUILD_EMULATOR: got {os.environ['FASTVIT_BUILD_EMULATOR']!r}; accepted are 0, 1, only and unset")
if os.environ.get("FASTVIT_BUILD_NATIVE") == "0":
    NAMES = []
setup(ext_modules=[Extension(name, sources=[]) for name in NAMES], cmdclass={"build_ext": BuildNative})
