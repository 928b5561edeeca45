"""What several runs on one device add up to: fresh rows, what was not timed and why, and what is known of its faults.

A GPU is often there for minutes at a time. Each run takes over what the earlier ones left in its folder, or in the
committed one, and begins no case again whose row is fresh, nor one that is known to lose the device.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, roofline
from benchmarks.harness import Row
from benchmarks.roofline import Machine


@dataclass
class Earlier:
    """What the runs before this one left: rows, lines of what was not timed, facts, and one environment per run."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    environments: list[dict[str, Any]] = field(default_factory=list)


def files(out: Path, slug: str) -> list[Path]:
    """Return the device's files, the oldest first, in ``out`` and among the committed; of one day's, ``out``'s last."""
    folders = [harness.RESULTS, out] if out.resolve() != harness.RESULTS.resolve() else [out]
    found = [
        (path.stem[-10:], index, path)
        for index, folder in enumerate(folders)
        for path in folder.glob(f"{slug}-????-??-??.csv")
    ]
    return [path for _, _, path in sorted(found)]


def earlier(paths: list[Path], own: Path, machine: Machine) -> Earlier:
    """Return what ``paths`` (the oldest first) have for a run into ``own``.

    Of the file itself every row is kept: another number of threads, another version. Of the others those are taken
    that are fresh, and of two the newer.
    """
    rows: dict[tuple[object, str], list[Row]] = {}
    for row in harness.read(own) if own.exists() else []:
        rows.setdefault((row.work, row.backend), []).append(row)
    for path in paths:
        fresh: dict[tuple[object, str], list[Row]] = {}
        for row in harness.read(path):
            if harness.is_fresh(row, machine):
                fresh.setdefault((row.work, row.backend), []).append(row)
        rows |= fresh
    found = Earlier([row for group in rows.values() for row in group])
    # A run that timed nothing has left its reasons alone.
    side = next((path.with_suffix(".json") for path in (own, *paths[-1:]) if path.with_suffix(".json").exists()), None)
    if side is not None:
        content = json.loads(side.read_text())
        found.facts = content.get("facts", {})
        environments = found.facts.pop("environment", [])
        # The first files have one environment, of the first run.
        found.environments = environments if isinstance(environments, list) else [environments]
        found.notes = _standing(content.get("not timed", []), found.environments[-1:])
    return found


def _standing(notes: list[str], last: list[dict[str, Any]]) -> list[str]:
    """Return the lines that still hold: what a backend could not do before it was changed says nothing of it now."""
    sources = last[0].get("sources", {}) if last else {}
    changed = {name for name, value in sources.items() if value != harness.source_hash(name)}
    return [note for note in notes if not changed & set(note.split(": ")[1:2])]


def merged(before: Iterable[str], ran: set[str], now: Iterable[str]) -> list[str]:
    """Return the lines of cases that did not run again, and those of now; a line begins with its case's label."""
    return sorted({note for note in before if note.split(": ")[0] not in ran} | set(now))


def environment(machines: list[Machine], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the environment of this run; what an earlier run has said at length is not said again."""
    found = roofline.environment(machines)
    for other in before:
        if "collect_env" in found and other.get("collect_env") == found["collect_env"]:
            return found | {"collect_env": f"as in the run of {other['measured']}"}
    return found


@dataclass
class Known:
    """What is known of one device with these kernels and versions: cases that lose it, and checks that are done."""

    path: Path
    stamp: dict[str, Any]
    faults: dict[str, str] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, out: Path, device: str) -> Known:
        """Read what the runs before this one left in ``out`` or among the committed; of other kernels: nothing."""
        name = roofline.device_name(device)
        stamp = {
            "device": name, "torch": torch.__version__, "triton": harness.triton_version(),
            "sources": {backend: harness.source_hash(backend) for backend in ("triton", "cuda")},
        }  # fmt: skip
        file = f"{harness.device_slug(device, name)}-known.json"
        for folder in (out, harness.RESULTS):
            path = folder / file
            content = json.loads(path.read_text()) if path.exists() else {}
            if content.get("stamp") == stamp:
                return cls(out / file, stamp, content["faults"], content["checks"])
        return cls(out / file, stamp)

    def save(self) -> None:
        """Write it down at once: the next process may be the one that is lost."""
        content = {"stamp": self.stamp, "faults": self.faults, "checks": self.checks}
        self.path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
