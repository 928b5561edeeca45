"""A swapped model on two processes (gloo, CPU): DDP, FSDP2 and tensor parallelism match one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

for library in ("timm", "torchvision", "transformers", "open_clip"):
    pytest.importorskip(library, reason="every library's models run on two processes")
ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("data_parallel", ["ddp", "fsdp"]),
        (
            "tensor_parallel",
            [
                "tensor_parallel",
                "tensor_parallel_with_norms",
                "tensor_parallel_with_separate_projections",
                "refusals",
            ],
        ),
        ("sharding", ["sharding_of_attention", "sharding_of_packed", "sharding_of_patch_embed"]),
    ],
)
def test_two_processes(case: str, parts: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed_program", case],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # Both ranks write into one pipe.
    assert {part: finished.stdout.count(f"{part}: fine") for part in parts} == dict.fromkeys(parts, 2), finished.stdout
    if "refuses PackedColwiseParallel" in finished.stdout:
        pytest.skip(
            f"the DTensor of torch {torch.__version__} cannot shard a packed projection; the refusal was tested"
        )
