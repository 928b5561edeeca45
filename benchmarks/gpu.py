"""Everything that a machine with an NVIDIA GPU can show, unattended and without a network: ``make gpu``.

Builds for that architecture alone; applies the tolerance rule on the device (a red case stops the speed of that kernel
and no other); runs small cases under compute-sanitizer where there is one; then the suites, the most telling cases
first, until the budget is spent. Rows, environment and log are left in ``--out``, and a later run goes on where this
one ended. A suite runs in a process of its own: a kernel that faults or waits for ever costs its case. Without a GPU it
says so in one line and exits 3; exit status 1 is a red case.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, correctness, harness, roofline, runner

BUDGET = 480.0
# Parts of the budget: correctness must not leave nothing for speed, nor a sanitizer.
CORRECTNESS, SANITIZER, FORMS = 0.4, 0.1, 0.15
FORMS_SECONDS = 90.0
RESTARTS = 5
# What a suite's process ends with when the device's context is lost.
LOST = 4


def architecture(capability: tuple[int, int]) -> str:
    """Return what TORCH_CUDA_ARCH_LIST must be for one device: 9.0 in its own form, with wgmma and TMA."""
    major, minor = capability
    return f"{major}.{minor}" + "a" * ((major, minor) == (9, 0))


def build() -> dict[str, Any]:
    """Build fastvit._C in place for the architecture of device 0; return seconds and what went wrong, if anything."""
    name = architecture(torch.cuda.get_device_capability())
    print(f"building for {name} alone", flush=True)
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=harness.ROOT, env={**os.environ, "TORCH_CUDA_ARCH_LIST": name}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    figures: dict[str, Any] = {"architecture": name, "seconds": round(time.perf_counter() - start, 1)}
    libraries = (harness.ROOT / "fastvit").glob("_C.*")
    figures["native_mib"] = round(sum(path.stat().st_size for path in libraries) / 2**20, 2)
    if result.returncode:
        figures["error"] = (result.stderr or result.stdout)[-3000:]
        print(f"the build failed, so the kernels that are there are measured:\n{figures['error']}", flush=True)
    return figures


SANITIZED = "from benchmarks.device_cases import run_sanitized; run_sanitized()"
FOUND = 9


def sanitize(seconds: float) -> dict[str, str]:
    """Run small cases of the CUDA kernels under compute-sanitizer; return what each tool said.

    Only the exit status that the tool was given for findings is a finding: some virtual machines refuse the tool.
    """
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"compute-sanitizer": "was not found on PATH"}
    said = {}
    for tool in ("memcheck", "racecheck"):
        # PyTorch's own kernels are left out: their findings are not ours.
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kernel_substring=fastvit"]
        command = [program, *options, sys.executable, "-c", SANITIZED]
        try:
            result = subprocess.run(
                command, cwd=harness.ROOT, capture_output=True, text=True, check=False, timeout=seconds / 2
            )
        except subprocess.TimeoutExpired:
            said[tool] = f"not finished after {seconds / 2:.0f} s"
            continue
        lines = result.stdout.splitlines()
        summary = next((line.strip("= ") for line in reversed(lines) if "SUMMARY" in line), "no summary")
        if result.returncode == 0:
            said[tool] = f"clean: {summary}"
        elif result.returncode == FOUND and "not supported" not in result.stdout:
            said[tool] = f"FOUND: {summary}\n{(result.stdout + result.stderr)[-3000:]}"
        else:
            said[tool] = f"could not run here: exit status {result.returncode}, {summary}"
    return said


TOO_LONG = -1000


def logged(command: list[str], seconds: float, log: Path) -> int:
    """Run a command, print what it says and append it to ``log``; return its exit status, or TOO_LONG."""
    late = threading.Event()
    with (
        open(log, "a") as file,
        subprocess.Popen(
            command, cwd=harness.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        ) as process,
    ):  # fmt: skip

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
            status = process.wait()
        finally:
            # After an interrupt, which reaches both, it is still writing its last rows.
            timer.cancel()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
    return TOO_LONG if late.is_set() else status


def suites(options: argparse.Namespace, red: set[tuple[str, str, str]], facts: dict[str, Any], end: float) -> bool:
    """Run the suites in a process; begin another behind a case that lost the device. Return whether none did."""
    log = options.out / "gpu.log"
    state = options.out / "gpu-state.json"
    content = {"red": sorted(red), "skip": [], "facts": facts}
    lost = False
    try:
        for _ in range(RESTARTS):
            left = end - time.monotonic()
            if left <= 0:
                break
            state.write_text(json.dumps(content, default=str))
            command = [sys.executable, "-m", "benchmarks.gpu", "--suites", str(state), "--budget", str(left)]
            command += ["--out", str(options.out), "-k", options.words, "--device", options.device]
            command += ["--again"] * options.again + ["--quick"] * options.quick
            # The last case may begin just before the end: a model in float64, or one that compiles.
            status = logged(command, left + 90, log)
            if status == TOO_LONG:
                print("the suites did not end with the budget: does a kernel wait for ever?", flush=True)
                return False
            content = json.loads(state.read_text())
            if status in (0, 130):
                break
            if not content.get("running"):
                print(f"the suites ended with exit status {status} before their first case", flush=True)
                return False
            lost = True
            print(f"exit status {status} in {content['running']}; the suites go on without it", flush=True)
            content["skip"].append(content.pop("running"))
    finally:
        state.unlink(missing_ok=True)
    return not lost


def child(options: argparse.Namespace) -> int:
    """Run the suites in this process, as :func:`suites` asks."""
    state: Path = options.suites
    content = json.loads(state.read_text())

    def note(label: str) -> None:
        state.write_text(json.dumps(content | {"running": label}))

    result = runner.run(
        runner.Options(
            options.device, tuple(cases.SUITES), options.words, 3, options.quick, options.budget, out=options.out,
            again=options.again, red={tuple(kernel) for kernel in content["red"]}, skip=set(content["skip"]), note=note,
            repeats=options.repeats,
        ),
        facts=content["facts"],
    )  # fmt: skip
    for line in sorted(set(result.notes)):
        print(f"not timed: {line}")
    return {runner.INTERRUPTED: 130, runner.LOST: LOST}.get(result.ended, 0)


def forms(seconds: float, log: Path) -> str:
    """Run benchmarks.cuda_forms last, in a process of its own; return what it ended with."""
    status = logged([sys.executable, "-m", "benchmarks.cuda_forms"], seconds, log)
    if status == TOO_LONG:
        return f"stopped after {seconds:.0f} s; does a kernel wait for ever?"
    # 3: no GPU of compute capability 9.0.
    return {0: "green", 3: "not this architecture"}.get(status, f"exit status {status}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    budget = float(os.environ.get("BUDGET") or BUDGET)
    out = Path(os.environ.get("OUT") or harness.RESULTS)
    parser.add_argument("--budget", type=float, default=budget, help="seconds after which no new case is begun")
    parser.add_argument("--out", type=Path, default=out, help="folder for rows, environment and log")
    parser.add_argument("-k", dest="words", default="", help="only cases whose name has all the words")
    parser.add_argument("--quick", action="store_true", help="the first cases alone")
    parser.add_argument("--again", action="store_true", help="measure fresh rows anew")
    parser.add_argument("--no-build", action="store_true", help="measure the kernels that are there")
    parser.add_argument("--no-correctness", action="store_true", help="only the gate of each case")
    parser.add_argument("--repeats", type=int, default=0, help="samples per case")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal of all this")
    parser.add_argument("--suites", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run everything within the budget; return the exit status."""
    options = _parse(arguments)
    options.out = options.out.resolve()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device on this machine; nothing was run")
        return 3
    if options.suites:
        return child(options)
    end = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    if options.device == "cuda" and not options.no_build:
        facts["build"] = build()
    red: set[tuple[str, str, str]] = set()
    slug = runner.device_slug(options.device, roofline.device_name(options.device))
    try:
        if not options.no_correctness:
            red = _correct(options, slug, facts)
        if options.device == "cuda":
            facts["sanitizer"] = sanitize(options.budget * SANITIZER)
            print("\n".join(f"compute-sanitizer: {tool}: {what}" for tool, what in facts["sanitizer"].items()))
        whole = suites(options, red, facts, end)
        if options.device == "cuda" and not options.words and not options.quick:
            last = forms(min(FORMS_SECONDS, max(options.budget * FORMS, 20.0)), options.out / "gpu.log")
            print(f"benchmarks.cuda_forms: {last}")
            whole = whole and not last.startswith(("exit", "stopped"))
    except KeyboardInterrupt:
        print("interrupted; the finished rows are kept")
        return 130
    found = any("FOUND" in what for what in facts.get("sanitizer", {}).values())
    return 1 if red or found or not whole or "error" in facts.get("build", {}) else 0


def _correct(options: argparse.Namespace, slug: str, facts: dict[str, Any]) -> set[tuple[str, str, str]]:
    backends = runner.BACKENDS[options.device]
    seconds = options.budget * CORRECTNESS / len(backends)
    red: set[tuple[str, str, str]] = set()
    facts["correctness"] = {}
    for backend in backends:
        kernels, figures = correctness.run(backend, options.device, options.out / f"{slug}-correctness.jsonl", seconds)
        red |= kernels
        facts["correctness"][backend] = figures
        print(
            f"{backend}: {figures['cases']} cases ({figures['cannot']} not for it, "
            f"{figures['not reached']} not reached), "
            f"{len(figures['misses'])} misses",
            *figures["misses"], sep="\n  ", flush=True,
        )  # fmt: skip
    for kernel in sorted(red):
        print(f"red, so its speed is not measured: {' '.join(kernel)}", flush=True)
    return red


if __name__ == "__main__":
    sys.exit(main())
