"""Faults planted in a copy of the kernels, all of them in one program, which runs them one at a time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where, at the end of what the emulator says.
WHERE = r"( at byte \d+)?( \(thread \d+ of block \d+ of \d+, \d+ threads\))?"


@dataclass(frozen=True)
class Site:
    """A text of the sources, the text in its place, and the faults that this plants.

    In ``instead`` $1, $2, … say whether the first, the second, … of the faults is on. ``faults`` has the words in which
    each is found, all of them but where it was, as a regular expression.
    """

    there: str
    instead: str
    faults: dict[str, str]


def names(sites: Iterable[Site]) -> list[str]:
    """Return the faults in the order of their numbers, from 1 on."""
    return [name for site in sites for name in site.faults]


def pattern(sites: Iterable[Site], name: str) -> re.Pattern[str]:
    """Return what the whole line has to match in which a fault is found."""
    return re.compile(next(site.faults[name] for site in sites if name in site.faults) + WHERE)


def plant(tree: Path, sites: Sequence[Site]) -> None:
    """Put the faults into the kernels of a copy of csrc.

    Raises:
        AssertionError: a text is there no longer, or twice.
    """
    numbers = {name: number for number, name in enumerate(names(sites), 1)}
    texts = {path: path.read_text() for path in sorted(tree.glob("cuda/*.cuh"))}
    for site in sites:
        holders = [path for path, text in texts.items() for _ in range(text.count(site.there))]
        assert len(holders) == 1, f"{len(holders)} times in the kernels, change this fault with them: {site.there}"
        instead = site.instead
        for place, name in enumerate(site.faults, 1):
            assert f"${place}" in instead, name
            instead = instead.replace(f"${place}", f"(fault == {numbers[name]})")
        texts[holders[0]] = texts[holders[0]].replace(site.there, instead)
    for path, text in texts.items():
        path.write_text(text)


def compile_program(folder: Path, source: Path, tree: Path, *options: str) -> Path:
    """Compile a program with the emulator of a copy of csrc, or skip where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = folder / source.stem
    common = ["-std=c++20", "-O1", "-DFASTVIT_EMULATOR", "-Wno-unknown-pragmas", f"-I{tree}", *options]
    emulator = [tree / f"emulator/{name}.cpp" for name in ("emulator", "hopper", "wgmma", "fiber")]
    subprocess.run([compiler, *common, source, *emulator, "-o", program], check=True)
    return program


def run(program: Path) -> list[str]:
    """Return the lines that a program prints."""
    return subprocess.run([program], capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()


def run_with_faults(folder: Path, source: Path, sites: Sequence[Site], *options: str) -> dict[str, str]:
    """Return what is found with each fault, and with none: the fault ""."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    plant(tree, sites)
    every = ["", *names(sites)]
    program = compile_program(folder, source, tree, f"-DFAULTS={len(every) - 1}", *options)
    return dict(zip(every, run(program), strict=True))
