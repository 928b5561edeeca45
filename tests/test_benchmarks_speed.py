"""benchmarks/test_speed.py as it is run: by pytest-benchmark, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICK = ("--benchmark-min-rounds=2", "--benchmark-max-time=0.01", "--benchmark-warmup=off", "-p", "no:cacheprovider")


def test_both_sides_of_each_suite_are_timed_and_kept(tmp_path: Path) -> None:
    kept = tmp_path / "speed.json"
    # The windows, the patches, a model and a tiny call: one of each suite.
    chosen = "N49 or P16 or vit_tiny or overhead"
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-n", "0", "-k", chosen, f"--benchmark-json={kept}"]
    # A worker of pytest-xdist times nothing, and this is no such worker.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run([*command, *QUICK], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    timed = json.loads(kept.read_text())["benchmarks"]
    groups: dict[str, set[str]] = {}
    for one in timed:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["side"])
        assert one["stats"]["median"] > 0
        assert one["stats"]["rounds"] >= 2
        assert one["extra_info"]["rule"] <= 1
    assert len(groups) == 4
    assert all(len(sides) == 2 and "cpu" in sides for sides in groups.values()), groups
