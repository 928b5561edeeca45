"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, without torch.

tests/cpu_sanitizers.cpp calls them on buffers that end with the tensor's last element and compares with plain loops.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

# One worker of pytest-xdist builds the program that several tests run.
shares_driver = pytest.mark.xdist_group("cpu_sanitizers")
ROOT = Path(__file__).parent.parent
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
# Without optimisation the kernels compile three times as fast, and every access is checked as it is written. The
# driver's plain loops take longer to run than to compile.
COMMON = "-std=c++20 -O0 -g1 -Wall -Wextra -fno-omit-frame-pointer"
ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=all"
THREAD = "-fsanitize=thread"
ENVIRONMENT = {
    # Fresh memory is NaN, scratch included: what is read before it is written shows in the results.
    "ASAN_OPTIONS": "malloc_fill_byte=255:max_malloc_fill_size=1073741824",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66",
    "PATH": os.environ.get("PATH", ""),
}
COMPARISONS = 580


def run(program: Path, capability: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "FASTVIT_CPU_CAPABILITY": capability}
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=environment, check=False)


def compile_and_link(folder: Path, sanitizer: str, sets: dict[str, str]) -> Path:
    """Build the driver with the kernels of ``sets``, name to flags, as setup.py builds fastvit._C."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    base = [COMPILER, *COMMON.split(), *sanitizer.split()]
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    tried = subprocess.run([*base, probe, "-o", folder / "probe"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"{COMPILER} has no {sanitizer}: {tried.stderr.strip()[-200:]}")
    built = [f"-DFASTVIT_BUILT_{name.upper()}" for name in sets]
    units = [("csrc/cpu/capability.cpp", built), ("csrc/cpu/scratch.cpp", []), ("tests/cpu_sanitizers.cpp", ["-O1"])]
    units += [
        ("csrc/cpu/kernels.cpp", [f"-DFASTVIT_CAPABILITY={name}", *flags.split()]) for name, flags in sets.items()
    ]
    objects = []
    for index, (source, more) in enumerate(units):
        objects.append(folder / f"{index}.o")
        subprocess.run([*base, *more, "-c", ROOT / source, "-o", objects[-1]], check=True)
    program = folder / "driver"
    subprocess.run([*base, *objects, "-o", program, "-lpthread"], check=True)
    return program


@pytest.fixture(scope="module")
def instruction_sets() -> dict[str, str]:
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("setuptools.setup", lambda **_: None)
        sets: dict[str, str] = runpy.run_path(str(ROOT / "setup.py"))["INSTRUCTION_SETS"]
    return sets


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, instruction_sets: dict[str, str]) -> Path:
    return compile_and_link(tmp_path_factory.mktemp("address"), ADDRESS, instruction_sets)


def supported(driver: Path) -> list[str]:
    """Return the names that the driver accepts here: it lists them when it is given another."""
    refusal = run(driver, "none").stderr
    return refusal.rsplit("accepts ", 1)[1].strip().split(", ")


@shares_driver
def test_address_and_undefined_behaviour_are_clean(driver: Path, instruction_sets: dict[str, str]) -> None:
    capabilities = supported(driver)
    assert "baseline" in capabilities
    for name in instruction_sets:
        if name not in capabilities:
            print(f"not run: this processor has no {name}")
            continue
        result = run(driver, name)
        assert (result.returncode, result.stderr) == (0, ""), f"{name}: {result.stderr[-3000:]}"
        assert result.stdout == f"{name}: {COMPARISONS} comparisons\n"


@shares_driver
@pytest.mark.parametrize("fault", ["short-output", "short-key", "short-image", "short-weight"])
def test_a_buffer_without_its_last_row_is_caught(driver: Path, fault: str) -> None:
    for name in supported(driver):
        result = run(driver, name, fault)
        assert result.returncode != 0, name
        access = "WRITE" if fault == "short-output" else "READ"
        assert re.search(f"heap-buffer-overflow.*{access} of size", result.stderr, re.DOTALL), result.stderr[-3000:]
        kernel = "patch_embed" if fault in ("short-image", "short-weight") else "attention_forward"
        assert f"fastvit::cpu::{name}::{kernel}" in result.stderr or f"cpu/{kernel}.h" in result.stderr


def test_a_fault_in_the_kernels_is_caught(tmp_path: Path) -> None:
    """Scratch is one block, so an array of it that is too small shows only by the arena's gaps."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=lambda *_: ["__pycache__"])
    path = tmp_path / "csrc/cpu/attention_forward.h"
    sound = "output_lanes_ = arena.take<T>(padded_dim_v_ * W)"
    source = path.read_text()
    assert sound in source
    path.write_text(source.replace(sound, "output_lanes_ = arena.take<T>(padded_dim_v_ * W - 1)"))
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setitem(globals(), "ROOT", tmp_path)
        program = compile_and_link(tmp_path, ADDRESS, {"baseline": ""})
    result = run(program, "baseline")
    assert "use-after-poison" in result.stderr, result.stderr[-3000:]


def test_threads_do_not_race(tmp_path: Path) -> None:
    program = compile_and_link(tmp_path, THREAD, {"baseline": ""})
    # Address space layouts with more entropy than ThreadSanitizer knows end it before main.
    prefix = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    environment = {**ENVIRONMENT, "FASTVIT_CPU_CAPABILITY": "baseline"}
    results = [
        subprocess.run(
            [*prefix, program, fault, "float32"], capture_output=True, text=True, env=environment, check=False
        )
        for fault in ("", "overlap")
    ]
    if "unexpected memory mapping" in results[0].stderr:
        pytest.skip(f"ThreadSanitizer cannot run here: {results[0].stderr.strip()[-200:]}")
    assert (results[0].returncode, results[0].stderr) == (0, ""), results[0].stderr[-3000:]
    assert results[0].stdout == f"baseline: {COMPARISONS // 4} comparisons\n"
    # Two threads that were given the same task are seen.
    assert "data race" in results[1].stderr
