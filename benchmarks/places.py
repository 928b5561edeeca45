"""The automatic order that committed rows earn: ``python -m benchmarks.places FILE…``.

For each device family, op and class of shapes, the backends by the geometric mean of their times over those of the
fastest of them. It is what ``MEASURED_ORDER`` in fastvit/ops/backends.py must say; :func:`misplaced` compares the two.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks import harness
from benchmarks.gates import FRAMES, TUBELET
from benchmarks.harness import Row
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec, Spec
from fastvit.ops.backends import SPECIFICATION, Measured, Place, shape_class


def spec_of(row: Row) -> Spec | None:
    """Return the call that a row of the attention and patch-embedding suites is about; None of another suite."""
    numbers = {name: int(number) for name, number in re.findall(r"\b([BHNPD])(\d+)\b", row.case)}
    dtype, device = getattr(torch, row.dtype), torch.device("cuda")
    if row.suite.startswith("attention "):
        batch, heads, seqlen, dim = (numbers[name] for name in "BHND")
        return AttentionSpec(batch, heads, seqlen, seqlen, dim, dim, dtype, None, False, device)
    if row.suite.startswith("patch_embed "):
        found = re.search(r"(\d+)²", row.case)
        assert found is not None, row.case
        side, patch = int(found[1]), numbers["P"]
        side -= side % patch
        batch = numbers["B"] * (FRAMES // TUBELET if "tubelet" in row.suite else 1)
        return PatchEmbedSpec(batch, 3, side, side, patch, patch, numbers["D"], dtype, device)
    return None


def earned(rows: Iterable[Row]) -> dict[Measured, list[tuple[str, float]]]:
    """Return, for each place where rows of a GPU hold, its backends with their mean of time over the fastest's time."""
    times: dict[Measured, dict[tuple[object, ...], dict[str, float]]] = {}
    for row in rows:
        spec = spec_of(row)
        if spec is None or row.clock == "host" or not row.rule <= 1.0:
            continue
        where = Measured(row.capability, row.suite.split()[0], shape_class(spec))
        times.setdefault(where, {}).setdefault((row.device, *row.work), {})[row.backend] = row.ours_p50
    order = {}
    for where, works in times.items():
        slower: dict[str, list[float]] = {}
        for measured in works.values():
            for backend, time in measured.items():
                slower.setdefault(backend, []).append(math.log(time / min(measured.values())))
        means = {backend: math.exp(sum(logs) / len(logs)) for backend, logs in slower.items()}
        order[where] = sorted(means.items(), key=lambda mean: mean[1])
    return order


def misplaced(table: Mapping[Measured, tuple[Place, ...]], rows: Mapping[str, list[Row]]) -> list[str]:
    """Return where a table says otherwise than the rows of its evidence, which are given by file."""
    wrong = []
    for where, places in table.items():
        own = [place for place in places if place != SPECIFICATION]
        found = earned(row for file in sorted({place.evidence for place in own}) for row in rows[file])
        names = [name for name, _ in found.get(where, [])]
        if [place.backend for place in own] != names:
            wrong.append(f"{' '.join(where)}: {[place.backend for place in own]}, measured {names}")
    return wrong


def main() -> None:
    """Print what some files earn."""
    rows = [row for name in sys.argv[1:] for row in harness.read(Path(name))]
    for where, means in earned(rows).items():
        print(f"{' '.join(where)}: " + ", ".join(f"{backend} {mean:.2f}" for backend, mean in means))


if __name__ == "__main__":
    main()
