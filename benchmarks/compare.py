"""What got faster or slower between two files of rows: ``python -m benchmarks compare A.csv B.csv [--fail-slower]``.

The change of a case is the ratio of our medians, B over A, divided by the same ratio of the peer's: the peer ran in
turn with ours in both runs, so that a machine that was slower as a whole does not look like a slower kernel. (--raw, or
a peer of another version, leaves the peer out.)

The interval: the standard error of a median of n samples is 1 / (2 f √n), f the density at the median (Cramér 1946,
section 28.5), and f is estimated by 0.6 / (p80 − p20), the mass between the two quantiles over their distance (Siddiqui
1960; Bloch & Gastwirth 1968). The logarithms of the medians are taken as normal and independent, their variances add
up, and the level of each interval is such that all of them hold together with 95 % (Bonferroni). Samples are not kept:
a bootstrap of the median needs them and estimates the same variance; tests/test_benchmarks_compare.py holds the
coverage of these intervals against simulated runs. What varies only from one process to the next (where memory lies,
clocks) is in no interval; changes below --threshold are therefore never called changes (Kalibera & Jones 2013).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from benchmarks import harness
from benchmarks.harness import Row

CONFIDENCE = 0.95
THRESHOLD = 0.03
# The files from before rows carried the number of samples were written with this one.
EARLIER_SAMPLES = 15
FASTER, SLOWER, SAME = "faster", "slower", "no change seen"


@dataclass(frozen=True)
class Change:
    """One case: ``change`` is B's time over A's (above 1: slower), with its interval."""

    row: Row
    change: float
    low: float
    high: float
    verdict: str
    control: str

    def __str__(self) -> str:
        name = " ".join(filter(None, (self.row.suite, self.row.case, self.row.dtype, self.row.layout)))
        return (
            f"{self.verdict}: {name}, {self.row.backend}, {self.row.threads} threads: "
            f"{100 * (self.change - 1):+.1f} % [{100 * (self.low - 1):+.1f}, {100 * (self.high - 1):+.1f}] "
            f"{self.control}"
        )


def log_variance(p20: float, p50: float, p80: float, samples: int) -> float:
    """Return the variance of the logarithm of a median (delta method on the standard error of the median)."""
    density = 0.6 / max(p80 - p20, 1e-12)
    return (1 / (2 * density * math.sqrt(samples or EARLIER_SAMPLES)) / p50) ** 2


def compare(
    before: Sequence[Row], after: Sequence[Row], threshold: float = THRESHOLD, raw: bool = False
) -> list[Change]:
    """Return the change of every case that both files have, the slowest first."""
    pairs = _pairs(before, after)
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * max(len(pairs), 1)))
    changes = []
    for old, new in pairs:
        controlled = not raw and _same_peer(old, new)
        change = math.log(new.ours_p50 / old.ours_p50)
        parts = [(row.ours_p20, row.ours_p50, row.ours_p80, row.samples) for row in (old, new)]
        if controlled:
            change -= math.log(new.peer_p50 / old.peer_p50)
            parts += [(row.peer_p20, row.peer_p50, row.peer_p80, row.samples) for row in (old, new)]
        margin = z * math.sqrt(sum(log_variance(*part) for part in parts))
        low, high, limit = change - margin, change + margin, math.log1p(threshold)
        verdict = SLOWER if low > 0 and change > limit else FASTER if high < 0 and change < -limit else SAME
        control = f"(against {new.peer})" if controlled else "(our times alone)"
        changes.append(Change(new, math.exp(change), math.exp(low), math.exp(high), verdict, control))
    return sorted(changes, key=lambda change: -change.change)


def _same_peer(old: Row, new: Row) -> bool:
    same = (old.peer_version, old.torch, old.triton) == (new.peer_version, new.torch, new.triton)
    # The first files have no version of the peer: it was torch's own.
    earlier = old.torch == new.torch and not (old.peer_version and new.peer_version)
    return old.peer != harness.NO_PEER and (same or earlier)


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return one pair per work and backend, with the peer that both have and whose times scatter least."""
    earlier = {(*_work(row), row.backend, row.peer): row for row in before}
    found: dict[tuple[object, ...], list[tuple[Row, Row]]] = {}
    for row in after:
        key = (*_work(row), row.backend)
        if (*key, row.peer) in earlier:
            found.setdefault(key, []).append((earlier[(*key, row.peer)], row))

    def scatter(pair: tuple[Row, Row]) -> float:
        return sum(log_variance(row.peer_p20, row.peer_p50 or 1.0, row.peer_p80, row.samples) for row in pair)

    return [min(pairs, key=scatter) for pairs in found.values()]


def _work(row: Row) -> tuple[object, ...]:
    # The first files have no layout: attention was timed on packed projections.
    return row.suite, row.case, row.dtype, row.threads, row.layout or "packed"


def remarks(before: Sequence[Row], after: Sequence[Row], compared: int) -> list[str]:
    """Return what a reader must know before believing the comparison."""
    lines = []
    for what in ("device", "capability", "torch", "driver"):
        old, new = ({getattr(row, what) for row in rows} - {""} for rows in (before, after))
        if old and new and old != new:
            lines.append(f"note: another {what}: {', '.join(sorted(old))} → {', '.join(sorted(new))}")
    works = [{(*_work(row), row.backend) for row in rows} for rows in (before, after)]
    only = [len(works[0] - works[1]), len(works[1] - works[0])]
    if any(only):
        lines.append(f"note: {only[0]} cases are only in the first file and {only[1]} only in the second")
    if not compared:
        lines.append("note: the files have no case in common")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; return 1 with --fail-slower if something got slower."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path, metavar="A.csv")
    parser.add_argument("after", type=Path, metavar="B.csv")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="least change that counts (default: 0.03)")
    parser.add_argument("--raw", action="store_true", help="our times alone, without the peer as a control")
    parser.add_argument("--all", action="store_true", help="also the cases without a change")
    parser.add_argument("--fail-slower", action="store_true", help="exit 1 if a case got slower")
    options = parser.parse_args(arguments)
    try:
        before, after = harness.read(options.before), harness.read(options.after)
    except (OSError, ValueError) as error:
        print(f"compare: {error}")
        return 2
    changes = compare(before, after, options.threshold, options.raw)
    for line in remarks(before, after, len(changes)):
        print(line)
    for change in changes:
        if options.all or change.verdict != SAME:
            print(change)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in (FASTER, SLOWER, SAME)}
    print(f"{len(changes)} cases: " + ", ".join(f"{number} {verdict}" for verdict, number in counts.items()))
    if not changes:
        return 2
    return int(options.fail_slower and counts[SLOWER] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
