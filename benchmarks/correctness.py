"""The tolerance rule on a device, kernel by kernel, in processes of their own: ``python -m benchmarks.correctness``.

A kernel that faults takes its process's device context with it, and one that waits for ever takes its time: the case
that was running is then red, and the next process goes on behind it. Every case is a line in a file, so that a later
run on the same device, with the same sources and versions, does not repeat it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import device_cases, harness, processes, timers
from benchmarks.timers import first_line
from fastvit.commands.env import why_nothing_runs
from fastvit.testing import (
    AttentionCase,
    Comparison,
    PatchEmbedCase,
    check_attention,
    check_patch_embed,
    vit_attention_cases,
    vit_patch_embed_cases,
)

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
# The first case of a Triton kernel compiles it; a float64 truth of the longest sequence takes a second or two. The
# first case of a process also loads the libraries of the device.
CASE_SECONDS, FIRST_SECONDS = 60.0, 180.0
CANNOT = "cannot run this call"
# Op, the part of its kernels that the case is about ("D64"), name, dtype and check.
Case = tuple[str, str, str, torch.dtype, Callable[[str, str], list[Comparison]]]


def cases() -> list[Case]:
    """Return every case, the dtypes in the order in which they matter on a GPU."""
    listed: list[AttentionCase | PatchEmbedCase] = []
    for dtype in DTYPES:
        listed += device_cases.telling(dtype)
        listed += [*vit_attention_cases([dtype]), *vit_patch_embed_cases([dtype])]
    listed += [case for dtype in HALVES for case in device_cases.every_form(dtype)]
    # A case is known by its name.
    return [_case(case) for case in dict.fromkeys(listed)]


def _case(case: AttentionCase | PatchEmbedCase) -> Case:
    if isinstance(case, AttentionCase):
        return "attention", part_of(case.head_dim), str(case), case.dtype, partial(check_attention, case)
    return "patch_embed", "", str(case), case.dtype, partial(check_patch_embed, case)


def part_of(head_dim: int) -> str:
    """Return what the kernels of one head_dim are called."""
    return f"D{head_dim}"


def stamp(backend: str, device: str) -> dict[str, str]:
    """Return what a finished case depends on."""
    from benchmarks.roofline import device_name

    return {
        "backend": backend,
        "sources": harness.source_hash(backend),
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": harness.triton_version(),
    }


def finished(path: Path, backend: str, device: str) -> dict[str, dict[str, Any]]:
    """Return, by name, the cases of ``path`` that count for this backend as it is."""
    found: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return found
    expected = stamp(backend, device)
    for entry in _entries(path):
        if all(entry.get(key) == value for key, value in expected.items()) and entry["state"] != "began":
            found[entry["case"]] = entry
    return found


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text().splitlines():
        # The last line may be that of a process that was ended while it wrote.
        with contextlib.suppress(ValueError):
            yield json.loads(text)


def forget_faults(path: Path) -> None:
    """Keep of a file the cases that passed: all others are tried again."""
    entries = [entry for entry in _entries(path) if entry["state"] == "ran"]
    passed = [entry for entry in entries if all(ratio <= 1.0 for ratio in entry["ratios"].values())]
    with open(path, "w") as file:
        for entry in passed:
            _append(file, entry)


def work_off(backend: str, device: str, path: Path, seconds: float) -> None:
    """Run the cases that ``path`` does not have, and append a line when each begins and when it ends."""
    if reasons := why_nothing_runs(backend, torch.device(device), DTYPES):
        # Not a line for each case: another build runs them, and they would count as done.
        print(f"{backend} cannot run here: {'; '.join(reasons)}")
        return
    begin, done, common = time.monotonic(), finished(path, backend, device), stamp(backend, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        for op, part, name, dtype, check in cases():
            if name in done:
                continue
            if time.monotonic() - begin > seconds:
                return
            entry = common | {"op": op, "part": part, "case": name, "dtype": harness.short(dtype)}
            _append(file, entry | {"state": "began"})
            try:
                results = check(backend, device)
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                # Triton's errors (OutOfResources, CompilationError) are no RuntimeErrors.
                cannot = CANNOT in str(error)
                _append(file, entry | {"state": "cannot" if cannot else "failed", "error": first_line(error)})
                if not cannot and timers.is_lost(device):
                    # The next process goes on.
                    raise SystemExit(4) from error
            else:
                _append(file, entry | {"state": "ran", "ratios": {result.name: result.ratio for result in results}})


def _append(file: Any, entry: dict[str, Any]) -> None:
    file.write(json.dumps(entry) + "\n")
    file.flush()


def run(
    backend: str, device: str, path: Path, seconds: float, log: Path
) -> tuple[set[tuple[str, str, str]], dict[str, Any]]:
    """Work off the cases of a backend in processes, for at most ``seconds``.

    A case that takes CASE_SECONDS hangs, the first of a process one that takes FIRST_SECONDS.

    Returns:
        The red kernels, as (backend, "attention forward D64", "bfloat16"), and the figures for the JSON.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        before = len(finished(path, backend, device))
        command = [sys.executable, "-m", "benchmarks.correctness", backend, device, str(path), str(left)]
        # A case is a line when it begins and when it ends.
        path.touch()
        begun = time.monotonic()

        def stuck(begun: float = begun) -> bool:
            return processes.age(path) > CASE_SECONDS and time.monotonic() - begun > FIRST_SECONDS

        status = processes.logged(command, left, log, stuck)
        # A case in which the time was up, or the machine went, only began: it says nothing, and comes again.
        if status not in (0, processes.TOO_LONG):
            _bury(path)
        # A process that died has at least left the line of the case that it died in; without one it cannot begin.
        if status in (0, processes.TOO_LONG) or len(finished(path, backend, device)) == before:
            break
    return judge(finished(path, backend, device), backend)


def _bury(path: Path) -> None:
    """Write down that the case that was running has ended its process."""
    entries = list(_entries(path))
    if entries and entries[-1]["state"] == "began":
        with open(path, "a") as file:
            _append(file, entries[-1] | {"state": "died"})


def judge(entries: dict[str, dict[str, Any]], backend: str) -> tuple[set[tuple[str, str, str]], dict[str, Any]]:
    """Return the red kernels and the figures of a backend's finished cases.

    A miss or an error is about the kernels of its head_dim, a process that died in a case about all of the op.
    """
    red: set[tuple[str, str, str]] = set()
    misses = []
    for name, entry in entries.items():
        state = entry["state"]
        if state == "cannot":
            continue
        if state == "ran":
            bad = {key: ratio for key, ratio in entry["ratios"].items() if not ratio <= 1.0}
            directions = {"backward" if key.startswith("grad") else "forward" for key in bad}
            misses += [f"{name}: {key}: {ratio:.2f} of what is allowed" for key, ratio in bad.items()]
        else:
            directions = {"forward", "backward"}
            misses.append(f"{name}: {entry.get('error', 'the process died or was ended in this case')}")
        part = entry.get("part", "") if state in ("ran", "failed") else ""
        red |= {(backend, f"{entry['op']} {direction} {part}".rstrip(), entry["dtype"]) for direction in directions}
    states = [entry["state"] for entry in entries.values()]
    total = len(cases())
    figures = {
        "cases": len(entries),
        "not reached": total - len(entries),
        "cannot": states.count("cannot"),
        "misses": misses,
        "red": sorted(red),
    }
    return red, figures


def main() -> None:
    """Work off the cases of one backend."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.correctness", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("path", type=Path)
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    work_off(arguments.backend, arguments.device, arguments.path, arguments.seconds)


if __name__ == "__main__":
    main()
