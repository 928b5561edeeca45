"""Everything that a machine with an NVIDIA GPU can show, unattended and without a network: ``make gpu``.

Builds for that architecture alone; applies the tolerance rule on the device (a red case stops the speed of that kernel
and no other); runs small cases under compute-sanitizer where there is one; then the suites, the most telling cases
first, and ends when the budget is spent. Rows, environment and log are left in ``--out``, and a later run goes on
where this one ended (earlier_runs.py). The suites run in a process of their own, which is watched: a kernel that faults
or waits for ever costs its case, now and in later runs. Without a GPU it says so in one line and exits 3; exit status 1
is a red case.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import cases, correctness, earlier_runs, gpu_goals, harness, processes, roofline, runner
from benchmarks.earlier_runs import Known
from benchmarks.processes import STUCK, TOO_LONG, logged

BUDGET = 480.0
# Parts of the budget: correctness must not leave nothing for speed, nor a sanitizer.
BUILD, CORRECTNESS, SANITIZER, FORMS = 0.5, 0.4, 0.2, 0.15
# And the sanitizer no more than this, however large the budget.
SANITIZER_SECONDS = 90.0
# The forms no more than this, and not at all with less than they take.
FORMS_SECONDS, FORMS_LEAST = 90.0, 55.0
RESTARTS = 5
# Seconds after which a case hangs: torch.compile takes a minute and more for a large model.
PATIENCE, COMPILING = 90.0, 240.0
# The last case begins at least so many seconds before the end, where it is ended.
LAST_CASE = 25.0
FORMS_NAME = "cuda_forms"
# What a suite's process ends with when the device's context is lost.
LOST = 4


def architecture(capability: tuple[int, int]) -> str:
    """Return what TORCH_CUDA_ARCH_LIST must be for one device: 9.0 in its own form, with wgmma and TMA."""
    major, minor = capability
    return f"{major}.{minor}" + "a" * ((major, minor) == (9, 0))


def search_path() -> str:
    """Return PATH with the toolkit's programs, nvcc and compute-sanitizer, behind what is on it."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    return f"{os.environ.get('PATH', '')}{os.pathsep}{toolkit}"


def build(seconds: float, log: Path) -> dict[str, Any]:
    """Build fastvit._C in place for the architecture of device 0; return seconds and what went wrong, if anything."""
    name = architecture(torch.cuda.get_device_capability())
    processes.say(f"building for {name} alone", log)
    variables = {
        "TORCH_CUDA_ARCH_LIST": name,
        # Without nvcc it would build for the CPU alone and say nothing.
        "FASTVIT_BUILD_CUDA": "1",
        "PATH": search_path(),
    }
    start = time.perf_counter()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, said = processes.captured(command, seconds, log, variables)
    figures: dict[str, Any] = {"architecture": name, "seconds": round(time.perf_counter() - start, 1)}
    libraries = (harness.ROOT / "fastvit").glob("_C.*")
    figures["native_mib"] = round(sum(path.stat().st_size for path in libraries) / 2**20, 2)
    if status:
        figures["error"] = said[-3000:] if status != TOO_LONG else f"not finished after {seconds:.0f} s"
        processes.say(f"the build failed, so the kernels that are there are measured:\n{figures['error']}", log)
    return figures


SANITIZED = "from benchmarks.device_cases import run_sanitized; run_sanitized()"
FOUND = 9


TOOLS = ("memcheck", "racecheck")


def find_sanitizer() -> str | None:
    """Return compute-sanitizer's path, if it is on PATH or in the toolkit."""
    return shutil.which("compute-sanitizer", path=search_path())


def sanitizer_check(tool: str) -> str:
    """Return what a tool's verdict is kept as: it belongs to the cases that it has seen."""
    digest = hashlib.sha256(SANITIZED.encode())
    for path in sorted((harness.ROOT / "benchmarks").glob("*cases.py")):
        digest.update(path.read_bytes())
    return f"compute-sanitizer {tool} {digest.hexdigest()[:12]}"


def unsanitized(known: Known) -> list[str]:
    """Return the tools that are here and have no verdict on these kernels yet."""
    if find_sanitizer() is None:
        return []
    return [tool for tool in TOOLS if sanitizer_check(tool) not in known.checks]


def sanitize(seconds: float, log: Path, known: Known) -> dict[str, str]:
    """Run small cases of the CUDA kernels under compute-sanitizer; return what each tool said, now or before.

    Only the exit status that the tool was given for findings is a finding: some virtual machines refuse the tool.
    """
    program = find_sanitizer()
    if program is None:
        return {"compute-sanitizer": "was found neither on PATH nor in the toolkit"}
    said: dict[str, str] = {}
    end = time.monotonic() + seconds
    for tool in TOOLS:
        name = sanitizer_check(tool)
        if name in known.checks:
            said[tool] = known.checks[name]
            continue
        # PyTorch's own kernels are left out: their findings are not ours.
        options = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kernel_substring=fastvit"]
        # Nor are the calls of the runtime that PyTorch tries and that fail.
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [program, *options, sys.executable, "-c", SANITIZED]
        # The first that is not finished has all the time: two halves might never be enough for either.
        share = max(end - time.monotonic(), 0.0)
        # A byte past a tensor is a byte of another one in the caching allocator's block.
        status, output = processes.captured(command, share, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        if status == TOO_LONG:
            said[tool] = f"not finished after {share:.0f} s"
            continue
        summary = next((line.strip("= ") for line in reversed(output.splitlines()) if "SUMMARY" in line), "no summary")
        if status == 0:
            said[tool] = f"clean: {summary}"
        elif status == FOUND and "not supported" not in output:
            said[tool] = f"FOUND: {summary}\n{output[-3000:]}"
        else:
            said[tool] = f"could not run here: exit status {status}, {summary}"
            continue
        known.checks[name] = said[tool]
        known.save()
    return said


def patience(label: str, all_peers: bool) -> float:
    """Return the seconds after which a case hangs; "" is the start of a process, its rooflines included."""
    # FlexAttention among the peers, a training step, dozens of processes.
    slow = ("compiled", "training", "overhead import", "overhead first call", *cases.COSTLY)
    return COMPILING if all_peers or any(words in label for words in slow) else PATIENCE


def suites(options: argparse.Namespace, red: set[tuple[str, str, str]], facts: dict[str, Any], end: float) -> bool:
    """Run the suites in a process; begin another behind a case that lost the device. Return whether none does."""
    log, state = options.out / "gpu.log", options.out / "gpu-state.json"
    known = Known.load(options.out, options.device)
    if options.again:
        known.faults = {}
        known.save()
    content: dict[str, Any] = {"red": sorted(red), "skip": known.faults, "facts": facts, "running": ""}

    def stuck() -> bool:
        return processes.age(state) > patience(json.loads(state.read_text())["running"], options.all_peers)

    try:
        for _ in range(RESTARTS):
            left = end - time.monotonic()
            if left <= 0:
                break
            processes.write(state, json.dumps(content, default=str))
            command = [sys.executable, "-m", "benchmarks.gpu", "--suites", str(state)]
            command += ["--budget", str(left - min(LAST_CASE, left / 4)), "--out", str(options.out)]
            command += ["-k", options.words, "--device", options.device, "--repeats", str(options.repeats)]
            command += ["--again"] * options.again + ["--quick"] * options.quick + ["--all-peers"] * options.all_peers
            status = logged(command, left, log, stuck)
            running = json.loads(state.read_text())["running"]
            if status in (0, 130):
                break
            if status == TOO_LONG:
                processes.say(f"the budget was spent in {running or 'the start'}: it is for the next run", log)
                break
            why = "did not end: does a kernel wait for ever?" if status == STUCK else f"exit status {status}"
            if not running:
                processes.say(f"the suites ended before their first case: {why}", log)
                return False
            processes.say(f"{running}: {why}; the suites go on without it", log)
            known.faults[running] = f"its process was lost in it ({why}), so it is skipped"
            known.save()
    finally:
        for path in (state, state.with_name(state.name + ".partial")):
            path.unlink(missing_ok=True)
    for label, why in known.faults.items():
        processes.say(f"{label}: {why} (--again tries it)", log)
    return not known.faults


def child(options: argparse.Namespace) -> int:
    """Run the suites in this process, as :func:`suites` asks."""
    state: Path = options.suites
    content = json.loads(state.read_text())

    def note(label: str) -> None:
        processes.write(state, json.dumps(content | {"running": label}))

    result = runner.run(
        runner.Options(
            options.device, tuple(cases.SUITES), options.words, 3, options.quick, options.budget, out=options.out,
            again=options.again, all_peers=options.all_peers, red={tuple(kernel) for kernel in content["red"]},
            skip=content["skip"], note=note, repeats=options.repeats,
        ),
        facts=content["facts"],
    )  # fmt: skip
    for line in sorted(set(result.notes)):
        print(f"not timed: {line}")
    return {runner.INTERRUPTED: 130, runner.LOST: LOST}.get(result.ended, 0)


def show_goals(options: argparse.Namespace, log: Path) -> None:
    """Print the goals and how far the rows are from them, whatever has ended the suites."""
    paths = earlier_runs.files(options.out, harness.device_slug(options.device, roofline.device_name(options.device)))
    text = StringIO()
    gpu_goals.show(harness.read(paths[-1]) if paths else [], Console(file=text, width=140))
    processes.say(text.getvalue(), log)


def add_fact(options: argparse.Namespace, name: str, fact: object) -> None:
    """Write what came out behind the suites into the file that they have left, if they have left one."""
    slug = harness.device_slug(options.device, roofline.device_name(options.device))
    written = [
        path.with_suffix(".json") for path in earlier_runs.files(options.out, slug) if path.parent == options.out
    ]
    if not written or not written[-1].exists():
        return
    content = json.loads(written[-1].read_text())
    content["facts"][name] = fact
    processes.write(written[-1], json.dumps(content, indent=1, sort_keys=True) + "\n")


def forms(seconds: float, log: Path, known: Known) -> str:
    """Run benchmarks.cuda_forms last, in a process of its own; return what it ended with, now or before."""
    if FORMS_NAME in known.checks:
        return known.checks[FORMS_NAME]
    status = logged([sys.executable, "-m", "benchmarks.cuda_forms"], seconds, log)
    if status == TOO_LONG:
        return f"not finished after {seconds:.0f} s"
    # 3: no GPU of compute capability 9.0.
    said = {0: "green", 1: "MISSES", 3: "not this architecture"}.get(status, f"exit status {status}")
    if not said.startswith("exit"):
        known.checks[FORMS_NAME] = said
        known.save()
    return said


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    budget = float(os.environ.get("BUDGET") or BUDGET)
    out = Path(os.environ.get("OUT") or harness.RESULTS)
    parser.add_argument("--budget", type=float, default=budget, help="seconds for all of this, the build included")
    parser.add_argument("--out", type=Path, default=out, help="folder for rows, environment and log")
    parser.add_argument("-k", dest="words", default="", help="only cases whose name has all the words")
    parser.add_argument("--quick", action="store_true", help="the first cases alone")
    parser.add_argument("--again", action="store_true", help="measure fresh rows anew")
    parser.add_argument("--no-build", action="store_true", help="measure the kernels that are there")
    parser.add_argument("--no-correctness", action="store_true", help="only the gate of each case")
    parser.add_argument("--all-peers", action="store_true", help="FlexAttention in every case that is timed")
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
    log, is_gpu = options.out / "gpu.log", options.device == "cuda"
    facts: dict[str, Any] = {}
    red: set[tuple[str, str, str]] = set()
    try:
        if is_gpu and not options.no_build:
            facts["build"] = build(options.budget * BUILD, log)
        if not options.no_correctness:
            red = _correct(options, (end - time.monotonic()) * CORRECTNESS, facts)
        whole, reserved = True, 0.0
        with_forms = is_gpu and not options.words and not options.quick
        if is_gpu:
            # Behind the build: what is known belongs to the kernels as they are.
            left, known = end - time.monotonic(), Known.load(options.out, options.device)
            if with_forms and FORMS_NAME not in known.checks:
                reserved = min(FORMS_SECONDS, left * FORMS)
                # A part of them is worth nothing: a later run has more left, its correctness being done.
                with_forms = reserved >= FORMS_LEAST
                reserved *= with_forms
            reserved += min(SANITIZER_SECONDS, left * SANITIZER) * len(unsanitized(known)) / len(TOOLS)
        whole = suites(options, red, facts, end - reserved)
        if is_gpu:
            show_goals(options, log)
            # Behind the goals: where a tool hangs, it costs nothing else.
            known = Known.load(options.out, options.device)
            share = min(SANITIZER_SECONDS, max(end - time.monotonic(), 0.0) * (0.5 if with_forms else 1.0))
            facts["sanitizer"] = sanitize(share, log, known)
            for tool, what in facts["sanitizer"].items():
                processes.say(f"compute-sanitizer: {tool}: {what}", log)
            add_fact(options, "sanitizer", facts["sanitizer"])
        if with_forms:
            last = forms(max(end - time.monotonic(), 0.0), log, Known.load(options.out, options.device))
            processes.say(f"benchmarks.cuda_forms: {last}", log)
            whole = whole and not last.startswith(("MISSES", "exit"))
    except KeyboardInterrupt:
        processes.say("interrupted; the finished rows are kept", log)
        return 130
    found = any("FOUND" in what for what in facts.get("sanitizer", {}).values())
    return 1 if red or found or not whole or "error" in facts.get("build", {}) else 0


def _correct(options: argparse.Namespace, seconds: float, facts: dict[str, Any]) -> set[tuple[str, str, str]]:
    backends = runner.BACKENDS[options.device]
    slug = harness.device_slug(options.device, roofline.device_name(options.device))
    path, log = options.out / f"{slug}-correctness.jsonl", options.out / "gpu.log"
    committed = harness.RESULTS / path.name
    if not path.exists() and committed.exists():
        shutil.copyfile(committed, path)
    if options.again and path.exists():
        correctness.forget_faults(path)
    end = time.monotonic() + seconds
    red: set[tuple[str, str, str]] = set()
    facts["correctness"] = {}
    for index, backend in enumerate(backends):
        # What one backend leaves of its part is the next one's.
        part = (end - time.monotonic()) / (len(backends) - index)
        kernels, figures = correctness.run(backend, options.device, path, part, log)
        red |= kernels
        facts["correctness"][backend] = figures
        counts = f"{figures['cases']} cases ({figures['cannot']} not for it, {figures['not reached']} not reached)"
        processes.say("\n  ".join([f"{backend}: {counts}, {len(figures['misses'])} misses", *figures["misses"]]), log)
    for kernel in sorted(red):
        processes.say(f"red, so its speed is not measured: {' '.join(kernel)}", log)
    return red


if __name__ == "__main__":
    sys.exit(main())
