"""Interleaved timing and the row that comes out of it.

A row is written only when the two sides compute the same thing (the tolerance rule, in the same run). Both sides run in
turn, so that whatever else the machine does hits both, and a row carries p20, p50 and p80 of each.
"""

from __future__ import annotations

import csv
import hashlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import fastvit
from fastvit.kernels import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One measurement; times in milliseconds, rates in GFLOP/s of useful work."""

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


@dataclass(frozen=True)
class Contest:
    """Ours against one or more peers on the same data; ``flop`` is the useful work of one call.

    ``rule`` is the worst error as a part of what the tolerance rule allows, measured before any timing.
    """

    suite: str
    case: str
    dtype: torch.dtype
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    flop: float
    rule: float


def run(contest: Contest, repeats: int, device: str) -> Row | None:
    """Time a contest against the fastest of its peers; None, and a line that says so, if the results are wrong."""
    if not contest.rule <= 1.0:
        print(f"{contest.suite} {contest.case}: wrong ({contest.rule:.2f} of what is allowed), so not timed")
        return None
    times = interleave([contest.ours, *contest.peers.values()], repeats)
    ours, *peers = [quantiles(list(values)) for values in times]
    name, peer = min(zip(contest.peers, peers, strict=True), key=lambda pair: pair[1][1])
    return Row(
        contest.suite,
        contest.case,
        str(contest.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        "cpu",
        name,
        *(round(value * 1e3, 4) for value in (*ours, *peer)),
        round(peer[1] / ours[1], 3),
        round(contest.flop / ours[1] / 1e9, 1),
        round(contest.flop / peer[1] / 1e9, 1),
        round(contest.rule, 3),
        device,
        capability(),
        torch.__version__,
        fastvit.__version__,
        commit(),
        source_hash(),
    )


def interleave(functions: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Return seconds per call of each function, all of them called once per repeat after two warm-up rounds."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(-2, repeats):
        for function, values in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if repeat >= 0:
                values.append(time.perf_counter() - start)
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Return p20, p50 and p80."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def attention_flop(batch: int, heads: int, seqlen: int, head_dim: int) -> float:
    """Return the FLOP of QKᵀ and PV: 4 B H N² D (Dao 2023, section 4.1); backward is 2.5 × this."""
    return 4.0 * batch * heads * seqlen**2 * head_dim


def patch_embed_flop(batch: int, tokens: int, embed_dim: int, patch_elements: int) -> float:
    """Return the FLOP of the projection: 2 B N D K; backward of weight and bias is as much again."""
    return 2.0 * batch * tokens * embed_dim * patch_elements


def capability() -> str:
    """Return the instruction set of the CPU kernels in this process."""
    error = native.load_error()
    if error is not None:
        raise SystemExit(f"benchmarks: {error}")
    from fastvit import _C

    return str(_C.cpu_capability())


def commit() -> str:
    """Return the commit that was measured, with a + when the tree differed from it."""
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip()


SOURCES = {
    "cpu": ("csrc/cpu/*", "csrc/params.h"),
    "cuda": ("csrc/cuda/*", "csrc/params.h"),
    "triton": ("fastvit/kernels/triton/*.py",),
}


def source_hash(backend: str = "cpu") -> str:
    """Return a hash of a backend's kernel sources: a row whose hash differs from the tree's is stale."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES[backend] for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """Read rows that :func:`write` wrote."""
    kinds = {"str": str, "int": int, "float": float}
    with open(path, newline="") as file:
        return [
            Row(**{field.name: kinds[str(field.type)](record[field.name]) for field in fields(Row)})
            for record in csv.DictReader(file)
        ]
