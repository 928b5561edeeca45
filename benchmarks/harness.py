"""The row, the gate before it, and the files that rows are kept in.

A row is written only when the two sides compute the same thing (the tolerance rule, in the same run). Both sides run in
turn, so that whatever else the machine does hits both, and a row carries p20, p50 and p80 of each.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fastvit
from benchmarks import timers
from benchmarks.formulas import bound
from benchmarks.timers import Entry, Times
from fastvit.kernels import native

if TYPE_CHECKING:
    from benchmarks.roofline import Machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NO_PEER = "none"
FLOOR = " (floor)"


@dataclass(frozen=True)
class Row:
    """One measurement: one backend of ours against one peer.

    Times are milliseconds, rates GFLOP/s of useful work and GB/s of least traffic, memory MiB. Columns after
    ``sources`` are absent from the first files that were committed and read as their defaults; 0 is "not measured".
    ``fma_gflops`` is the rate of float32 multiply-adds in registers on the same threads, taken between the samples: a
    processor's clock moves within a run.
    ``share`` is the part of the roof ``bound`` that ours reaches, ``clock`` "host", "graph" or "events", and the
    columns ``…_eager`` are p50 on a GPU without a graph. ``disturbed`` of the samples were taken while others used the
    processor, for want of enough better ones: such a row is measured anew by the next run.
    """

    suite: str
    case: str
    dtype: str
    threads: int
    backend: str
    peer: str
    ours_p20: float
    ours_p50: float
    ours_p80: float
    peer_p20: float
    peer_p50: float
    peer_p80: float
    ratio: float
    ours_gflops: float
    peer_gflops: float
    rule: float
    device: str
    capability: str
    torch: str
    fastvit: str
    commit: str
    sources: str
    layout: str = ""
    clock: str = "host"
    samples: int = 0
    ours_gbs: float = 0.0
    bound: str = ""
    share: float = 0.0
    peak_gflops: float = 0.0
    peak_gbs: float = 0.0
    per_second: float = 0.0
    ours_eager: float = 0.0
    peer_eager: float = 0.0
    ours_mib: float = 0.0
    peer_mib: float = 0.0
    peer_version: str = ""
    driver: str = ""
    triton: str = ""
    measured: str = ""
    fma_gflops: float = 0.0
    disturbed: int = 0

    @property
    def fma_share(self) -> float:
        """The part of the FMA rate that ours reaches; 0 unless the work is float32 on a CPU."""
        return self.ours_gflops / self.fma_gflops if self.fma_gflops else 0.0

    @property
    def work(self) -> tuple[str, str, str, str, int]:
        """What was measured, whoever did it."""
        return self.suite, self.case, self.dtype, self.layout, self.threads

    @property
    def is_floor(self) -> bool:
        """Whether the peer does less than the work: a bound, no rival."""
        return self.peer.endswith(FLOOR)


@dataclass(frozen=True)
class Contest:
    """Ours, by backend, against peers on the same data.

    ``flop`` and ``moved`` (bytes) are the useful work of one call, ``items`` what it is counted in (images). ``rules``
    has, for each backend, the worst error as a part of what the tolerance rule allows, measured before any timing.
    ``repeats`` and ``clock`` ("cpu": the host's) are given where the run's own do not suit.
    """

    suite: str
    case: str
    dtype: torch.dtype
    ours: tuple[Entry, ...]
    peers: tuple[Entry, ...]
    rules: dict[str, float]
    flop: float = 0.0
    moved: float = 0.0
    items: int = 0
    layout: str = ""
    repeats: int = 0
    clock: str = ""
    absent: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """What a contest gave: rows, and one line for everything that was not timed."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(contest: Contest, machine: Machine, repeats: int) -> Outcome:
    """Time a contest; a backend whose results are wrong is not timed, and a line says so."""
    label = " ".join(filter(None, (contest.suite, contest.case, short(contest.dtype), contest.layout)))
    outcome = Outcome(notes=[f"{label}: {name}: {reason}" for name, reason in contest.absent.items()])
    ours = []
    for entry in contest.ours:
        rule = contest.rules.get(entry.name, float("nan"))
        # A NaN is no proof either.
        if rule <= 1.0:
            ours.append(entry)
        else:
            outcome.notes.append(f"{label}: {entry.name}: wrong ({rule:.2f} of what is allowed), so not timed")
    if not ours:
        return outcome
    device = contest.clock or machine.device
    patience = PATIENCE if device == machine.device else 0.0
    gauges = [FMA] if device == "cpu" and contest.dtype == torch.float32 and contest.flop else []
    times, absent = timers.measure([*ours, *contest.peers, *gauges], contest.repeats or repeats, device, patience)
    fma = timers.quantiles(times.pop(FMA.name).samples)[1] if FMA.name in times else 0.0
    outcome.notes += [f"{label}: {name}: {reason}" for name, reason in absent.items()]
    for entry in ours:
        if entry.name not in times:
            continue
        peers: list[Entry | None] = [peer for peer in contest.peers if peer.name in times]
        for peer in peers or [None]:
            outcome.rows.append(_row(contest, machine, entry, peer, times, fma))
    return outcome


def _fma_burst() -> Callable[[], object]:
    # One burst, of a millisecond or so: a second does not begin after this time.
    return functools.partial(importlib.import_module("fastvit._C").fma_peak, 1e-4)


FMA = Entry("FMA in registers", _fma_burst, gauge=True)


def _row(
    contest: Contest, machine: Machine, entry: Entry, peer: Entry | None, times: dict[str, Times], fma: float = 0.0
) -> Row:
    ours, theirs = times[entry.name], times[peer.name] if peer else Times([0.0])
    mine, other = timers.quantiles(ours.samples), timers.quantiles(theirs.samples)
    roof, least = bound(contest.flop, contest.moved, machine.peak(contest.dtype), machine.gbs)
    return Row(
        suite=contest.suite, case=contest.case, dtype=short(contest.dtype), threads=machine.threads,
        backend=entry.name, peer=NO_PEER if peer is None else peer.name + FLOOR * peer.floor,
        **dict(zip(TIME_COLUMNS, (float(f"{value * 1e3:.5g}") for value in (*mine, *other)), strict=True)),
        ratio=round(other[1] / mine[1], 3),
        ours_gflops=round(contest.flop / mine[1] / 1e9, 1),
        peer_gflops=round(contest.flop / other[1] / 1e9, 1) if peer else 0.0,
        rule=round(contest.rules[entry.name], 3),
        device=machine.name, capability=machine.capability, torch=torch.__version__, fastvit=fastvit.__version__,
        commit=commit(), sources=source_hash(entry.name),
        layout=contest.layout, clock=ours.clock, samples=len(ours.samples),
        ours_gbs=round(contest.moved / mine[1] / 1e9, 1), bound=roof, share=round(least / mine[1], 4),
        peak_gflops=machine.peak(contest.dtype), peak_gbs=machine.gbs,
        per_second=round(contest.items / mine[1], 2),
        ours_eager=_median_ms(ours.eager), peer_eager=_median_ms(theirs.eager),
        ours_mib=round(ours.mib, 1), peer_mib=round(theirs.mib, 1),
        peer_version=peer.version if peer else "", driver=machine.driver, triton=triton_version(),
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        fma_gflops=round(fma, 2),
        disturbed=ours.disturbed,
    )  # fmt: skip


# Seconds that a case may wait for others to leave the processor alone (timers.measure). Tests share it on purpose, and
# wait for nobody.
PATIENCE = float(os.environ.get("FASTVIT_PATIENCE", "10"))
TIME_COLUMNS = ("ours_p20", "ours_p50", "ours_p80", "peer_p20", "peer_p50", "peer_p80")


def _median_ms(samples: list[float]) -> float:
    return float(f"{timers.quantiles(samples)[1] * 1e3:.5g}") if samples else 0.0


def short(dtype: torch.dtype) -> str:
    """Return "float32"."""
    return str(dtype).removeprefix("torch.")


def best(rows: Iterable[Row]) -> list[Row]:
    """Return, for each work and backend, its row against the fastest rival; a floor is none."""
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        key = (*row.work, row.backend)
        if row.peer == NO_PEER or row.is_floor:
            continue
        if key not in found or row.peer_p50 < found[key].peer_p50:
            found[key] = row
    return list(found.values())


def device_slug(device: str, name: str) -> str:
    """Return the device's part of a file name, "cpu-amd-epyc" or "gpu-nvidia-h200"."""
    words = name.lower().replace("(r)", "").replace("(tm)", "").replace("/", " ").split()
    return "-".join(["cpu" if device == "cpu" else "gpu", *words[:4]])


def capability() -> str:
    """Return the instruction set of the CPU kernels in this process."""
    error = native.load_error()
    if error is not None:
        raise SystemExit(f"benchmarks: {error}")
    # As an attribute: a compiled module has no types to import.
    return str(importlib.import_module("fastvit._C").cpu_capability())


@functools.cache
def commit() -> str:
    """Return the commit that was measured, with a + when the tree differed from it in more than what a run writes.

    A copy of the tree without .git is told it: by the variable FASTVIT_COMMIT, or by a file COMMIT in its root.
    """
    if told := os.environ.get("FASTVIT_COMMIT", "").strip():
        return told
    # Only of this tree: it may have been copied into somebody else's repository.
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            name = _git("describe", "--always")
            return name + "+" * bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md"))
    written = ROOT / "COMMIT"
    return (written.read_text().strip() if written.exists() else "") or "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def triton_version() -> str:
    """Return Triton's version, empty where it is not installed."""
    from benchmarks.roofline import installed

    return installed("triton")


SOURCES = {
    "cpu": ("csrc/cpu/*", "csrc/params.h"),
    "cuda": ("csrc/cuda/*", "csrc/params.h"),
    "triton": ("fastvit/kernels/triton/*.py",),
}


def source_hash(backend: str = "cpu") -> str:
    """Return a hash of a backend's kernel sources: a row whose hash differs from the tree's is stale."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES.get(backend, ()) for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def is_stale(rows: Iterable[Row]) -> bool:
    """Return whether the kernels have changed since any of ``rows`` was measured."""
    return any(row.sources != source_hash(row.backend) for row in rows)


def is_fresh(row: Row, machine: Machine) -> bool:
    """Return whether measuring ``row`` again would measure the same thing: device, versions and kernel sources.

    Of the driver the branch counts ("580"): the machines of several runs differ in the numbers behind it.
    """
    branches = row.driver.split(".")[0], machine.driver.split(".")[0]
    return (
        (row.device, row.capability, branches[0]) == (machine.name, machine.capability, branches[1])
        and (row.torch, row.fastvit, row.triton) == (torch.__version__, fastvit.__version__, triton_version())
        and row.samples > 0
        and not is_stale([row])
    )


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV; the file is whole at every moment, whatever ends the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    partial.replace(path)


# What the suites were called before there were rows of backward alone, of models in other modes and of layouts.
EARLIER_NAMES = {
    "attention backward": "attention forward + backward",
    "attention bias": "attention forward, bias",
    "patch_embed backward": "patch_embed forward + backward",
    "model": "model inference, eager",
}


def read(path: Path) -> list[Row]:
    """Read rows that :func:`write` wrote, now or before the columns after ``sources`` existed."""
    kinds = {"str": str, "int": int, "float": float}
    rows = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = set(reader.fieldnames or ())
        missing = [column.name for column in fields(Row) if column.name not in columns and column.default is MISSING]
        if missing:
            raise ValueError(f"{path}: has no columns {', '.join(missing)}; it is no file of benchmark rows")
        for record in reader:
            values = {
                column.name: kinds[str(column.type)](record[column.name])
                for column in fields(Row)
                if column.name in columns
            }
            if "samples" not in columns:
                values["suite"] = EARLIER_NAMES.get(values["suite"], values["suite"])
            rows.append(Row(**values))
    return rows
