"""Host-timed cases for pytest-benchmark: ``pytest benchmarks --benchmark-json=FILE``, comparable between commits.

A short list, on the CPU: ``pytest-benchmark compare A.json B.json`` shows what a commit did to them. The gate comes
first, as everywhere: a wrong result fails and is not timed. The suites have the peers, the roofs and the other shapes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, formulas, suite_attention, suite_models, suite_overhead, suite_patch_embed
from benchmarks.cases import AttentionShape, ModelShape, PatchShape, Work

TINY = ModelShape("vit_tiny_patch16_224", dict(cases.MODELS)["vit_tiny_patch16_224"], 1)
SHAPES = (AttentionShape(1, 12, 197, 64), AttentionShape(64, 3, 49, 32), AttentionShape(1, 12, 197, 64, "backward"))
WORKS = (
    *(cases.attention_work(shape, torch.float32, "packed", 0) for shape in SHAPES),
    cases.attention_work(AttentionShape(1, 12, 197, 64), torch.bfloat16, "packed", 0),
    Work("patch_embed forward", "B1 224² P16 D768", torch.float32, 0, "patch_embed", PatchShape(1, 224, 16, 768)),
    Work("model inference, eager", TINY.case, torch.float32, 0, "models", TINY),
    Work("overhead eager call", "B1 H1 N16 D64", torch.float32, 0, "overhead", "eager call"),
)
SUITES: dict[str, Any] = {
    "attention": suite_attention, "patch_embed": suite_patch_embed, "models": suite_models, "overhead": suite_overhead,
}  # fmt: skip


@pytest.mark.parametrize("side", ["fastvit", "PyTorch"])
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.label)
def test_speed(benchmark: Any, work: Work, side: str) -> None:
    """Time ours, and beside it the first peer, so that a machine that was slower as a whole shows in both."""
    contest = SUITES[work.kind].contest(work, "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1.0, "wrong, so not timed"
    entry = contest.ours[0] if side == "fastvit" else contest.peers[0]
    benchmark.group = work.label
    benchmark.extra_info.update(
        side=entry.name,
        rule=contest.rules["cpu"],
        flop=contest.flop,
        bytes=contest.moved,
        threads=torch.get_num_threads(),
    )
    if work.kind == "attention" and work.details.mode == "forward":
        shape = work.details
        assert contest.flop == formulas.attention_flop(shape.batch, shape.heads, shape.seqlen, shape.head_dim)
    benchmark(entry.build())
