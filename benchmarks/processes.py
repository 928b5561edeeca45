"""Processes of an unattended run: logged, watched while they work, and ended with everything that they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from benchmarks import harness

# What logged() returns for a process that it ended: its time was up, or its watcher found it stuck.
TOO_LONG, STUCK = -1000, -1001
POLL = 0.2
# After an interrupt a process writes its last rows; after a kill one that sits in a driver may still not be gone.
LAST_SECONDS = 30.0


def logged(
    command: list[str],
    seconds: float,
    log: Path,
    stuck: Callable[[], bool] | None = None,
    quiet: bool = False,
    variables: dict[str, str] | None = None,
) -> int:
    """Run a command in the project's root, print what it says and append it to ``log``.

    It is in a process group of its own, which is ended with it: what it has started would keep the device, and the
    pipe. ``stuck`` is asked several times a second. An interrupt is passed on.

    Returns:
        Its exit status, TOO_LONG or STUCK.
    """
    end = time.monotonic() + seconds
    process = subprocess.Popen(
        command, cwd=harness.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}, process_group=0,
    )  # fmt: skip
    reader = threading.Thread(target=_copy, args=(process.stdout, log, quiet), daemon=True)
    reader.start()
    status = None
    try:
        while status is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=POLL)
                break
            if time.monotonic() > end:
                status = TOO_LONG
            elif stuck is not None and stuck():
                status = STUCK
    except KeyboardInterrupt:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LAST_SECONDS)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=LAST_SECONDS)
        reader.join(timeout=LAST_SECONDS)
    return status


def captured(command: list[str], seconds: float, log: Path, variables: dict[str, str]) -> tuple[int, str]:
    """Run a command as :func:`logged` does, printing nothing; return its status and what it said."""
    before = log.stat().st_size if log.exists() else 0
    status = logged(command, seconds, log, quiet=True, variables=variables)
    with open(log, errors="replace") as file:
        file.seek(before)
        return status, file.read()


def say(text: str, log: Path) -> None:
    """Print a line of our own, and append it to ``log``."""
    print(text, flush=True)
    with open(log, "a") as file:
        file.write(text + "\n")


def age(path: Path) -> float:
    """Return the seconds since ``path`` was written."""
    return time.time() - path.stat().st_mtime


def write(path: Path, text: str) -> None:
    """Write a file that another process reads at any moment."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def _copy(source: IO[str], log: Path, quiet: bool) -> None:
    with open(log, "a") as file:
        for line in source:
            if not quiet:
                sys.stdout.write(line)
                sys.stdout.flush()
            file.write(line)
            file.flush()


def _signal(process: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
