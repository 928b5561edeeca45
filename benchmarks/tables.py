"""Rows as tables for a terminal, and their summary."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import Row


def show(rows: list[Row], console: Console) -> None:
    """Print the rows against their fastest rival, and the geometric mean and the least ratio of each suite."""
    chosen = harness.best(rows)
    for threads in sorted({row.threads for row in chosen}):
        group = [row for row in chosen if row.threads == threads]
        first = group[0]
        table = Table(
            "suite", "case", "dtype", "ours", "ms", "peer", "peer ms", "ratio", "GFLOP/s", "of roof", "of FMA", "rule"
        )
        for row in group:
            table.add_row(
                row.suite, " ".join(filter(None, (row.case, row.layout))), row.dtype, row.backend,
                f"{row.ours_p50:.4g}", row.peer, f"{row.peer_p50:.4g}", f"{row.ratio:.2f}", f"{row.ours_gflops:.0f}",
                roof(row), fma(row), f"{row.rule:.2f}",
            )  # fmt: skip
        threads_shown = f", threads: {threads}" if threads else ""
        table.title = f"{first.device}, {first.capability}, torch {first.torch}{threads_shown}"
        console.print(table)
        for text in summaries(group):
            console.print(text, soft_wrap=True)
    if harness.is_stale(chosen):
        console.print("stale: the kernels have changed since some of these rows were measured")


def roof(row: Row) -> str:
    """Return the share of the measured roof and which one it is, "–" where it was not measured."""
    return f"{100 * row.share:.0f} % {row.bound}" if row.bound else "–"


def fma(row: Row) -> str:
    """Return the share of the rate of multiply-adds in registers, "–" where it was not measured."""
    return f"{100 * row.fma_share:.0f} %" if row.fma_share else "–"


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers."""
    listed = list(values)
    return math.exp(sum(map(math.log, listed)) / len(listed))


def summaries(rows: list[Row]) -> list[str]:
    """Return one line per suite, dtype and backend: geometric mean and least ratio; above 1 is faster than the peer."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(f"{row.suite} {row.dtype} {row.backend}", []).append(row.ratio)
    return [
        f"{name}: geometric mean {geometric_mean(ratios):.2f} ×, least {min(ratios):.2f} ×"
        for name, ratios in groups.items()
    ]
