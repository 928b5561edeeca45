"""The goals on an H200: which cases and peers they are about, and what rows of known figures say of them."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cases, gpu_goals, harness, peers, report, suite_models, suite_patch_embed
from benchmarks.goals import MET, MISSED, NOT_MEASURED
from benchmarks.gpu_goals import BANDWIDTH, GOALS, MICROSECONDS, SDPA, TFLOPS, Goal, Limit
from benchmarks.harness import Row

FLOOR = "Linear on ready patches (floor)"


def row(goal: Goal, peer: str = "SDPA flash", **changes: Any) -> Row:
    """Return a row of a goal's case."""
    columns: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Row)), "")
    columns |= {field.name: 1.0 for field in dataclasses.fields(Row) if field.type == "float"}
    columns |= {
        "suite": goal.suite, "case": goal.case, "dtype": "bfloat16", "layout": goal.layout, "threads": 0,
        "backend": "cuda", "peer": peer, "sources": harness.source_hash("cuda"), "samples": 30, "disturbed": 0,
        "device": "NVIDIA H200",
    }  # fmt: skip
    return Row(**columns | changes)


def verdicts(found: list[Row], goal: Goal) -> list[str]:
    return [line.verdict for line in gpu_goals.lines(found, [goal])]


def test_the_goals_are_the_ones_that_were_set() -> None:
    said = [
        (
            goal.suite.removeprefix("attention "),
            goal.case,
            *((each.value, each.unit or each.peer) for each in goal.limits),
        )
        for goal in GOALS
    ]
    assert said == [
        ("forward", "B256 H12 N197 D64", (300, TFLOPS), (1.3, SDPA)),
        ("forward", "B64 H16 N257 D64", (340, TFLOPS), (1.3, SDPA)),
        ("forward", "B64 H16 N257 D80", (330, TFLOPS), (1.3, SDPA)),
        ("forward, bias", "B2048 H12 N49 D32", (75, BANDWIDTH), (2.0, SDPA)),
        ("forward", "B4 H16 N577 D64", (32, MICROSECONDS), (1.25, "SDPA flash")),
        ("forward", "B16 H16 N1025 D64", (400, TFLOPS), (1.1, "SDPA cuDNN")),
        ("forward", "B16 H16 N1370 D64", (430, TFLOPS), (1.1, "SDPA cuDNN")),
        ("forward", "B2 H12 N4096 D64", (450, TFLOPS), (1.1, "SDPA cuDNN")),
        ("backward", "B256 H12 N197 D64", (250, TFLOPS), (1.5, "SDPA flash"), (1.2, "SDPA cuDNN")),
        ("patch_embed forward", "B256 224² P16 D768", (120, MICROSECONDS), (1 / 1.05, FLOOR)),
        ("patch_embed stem", "B256 224² P16 D768", (1.5, "Conv2d stem")),
        ("model inference, compiled", "vit_base_patch16_224 B256", (1.08, "timm compiled")),
        ("model inference, compiled", "vit_base_patch16_384 B256", (1.15, "timm compiled")),
        ("model inference, compiled", "vit_base_patch14_518 B256", (1.2, "timm compiled")),
    ]  # fmt: skip


def test_every_goal_is_a_case_that_comes_early_against_peers_that_there_are() -> None:
    assert harness.short(cases.DTYPES["cuda"][0]) == gpu_goals.DTYPE
    early = {work.key for work in cases.select("cuda", last_tier=1)}
    known = set(peers.availability("cuda")) | {suite_models.peer("compiled"), SDPA}
    known |= {name + harness.FLOOR * (name == suite_patch_embed.FLOOR) for mode in ("forward", "stem")
              for name in suite_patch_embed._functions(mode)}  # fmt: skip
    for goal in GOALS:
        assert (goal.suite, goal.case, "bfloat16", goal.layout) in early, goal
        assert {limit.peer for limit in goal.limits if limit.peer} <= known
    # What a run measures first, in the order of the goals: whole models, which take a minute each, behind kernels.
    ranked = sorted(cases.select("cuda"), key=gpu_goals.rank)
    assert [(work.suite, work.case) for work in ranked[: len(GOALS)]] == [(goal.suite, goal.case) for goal in GOALS]
    first = {work.key for work in cases.select("cuda", last_tier=0)}
    late = [goal.suite for goal in GOALS if (goal.suite, goal.case, "bfloat16", goal.layout) not in first]
    assert late == ["patch_embed stem"]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.suite} {goal.case}")
def test_a_goal_is_met_at_its_limits_and_missed_a_hair_beyond(goal: Goal) -> None:
    for index, limit in enumerate(goal.limits):
        for factor, verdict in ((1.0, MET), (0.999 if limit.unit != MICROSECONDS else 1.001, MISSED)):
            value = limit.value * factor
            figures: dict[str, Any] = {
                TFLOPS: {"ours_gflops": 1e3 * value}, MICROSECONDS: {"ours_p50": value / 1e3},
                BANDWIDTH: {"ours_gbs": 43 * value, "peak_gbs": 4300.0}, "": {"ratio": value},
            }[limit.unit]  # fmt: skip
            peer = "SDPA cuDNN" if limit.peer == SDPA else limit.peer or "another"
            assert verdicts([row(goal, peer, **figures)], goal)[index] == verdict


def test_the_fastest_backend_counts_against_the_fastest_of_the_peers() -> None:
    goal = GOALS[0]
    slow = [row(goal, "SDPA flash", backend="triton", ours_p50=2.0, ratio=9.0, ours_gflops=900e3)]
    fast = [
        row(goal, f"SDPA {name}", ours_gflops=310e3, ratio=ratio) for name, ratio in (("flash", 1.4), ("cuDNN", 1.2))
    ]
    assert verdicts(slow + fast, goal) == [MET, MISSED]
    assert {line.backend for line in gpu_goals.lines(slow + fast, [goal])} == {"cuda"}
    # FlexAttention is no SDPA backend, and another dtype or layout is another case.
    assert verdicts([row(goal, "FlexAttention compiled", ratio=9.0)], goal)[1] == NOT_MEASURED
    assert verdicts([row(goal, dtype="float16"), row(goal, layout="separate")], goal) == [NOT_MEASURED] * 2
    assert verdicts([], goal) == [NOT_MEASURED] * 2
    assert Limit(75, BANDWIDTH).measured([row(goal, peak_gbs=0.0)]) is None


def test_what_is_shown() -> None:
    goal = GOALS[4]
    found = [row(goal, "SDPA flash", ours_p50=0.0305, ratio=1.2501, sources="0" * 12)]
    out = io.StringIO()
    gpu_goals.show(found, Console(file=out, width=200))
    said = out.getvalue()
    assert "≤ 32 µs" in said
    assert "30.5 µs" in said
    assert "≥ 1.250 × SDPA flash" in said
    assert said.count("met, stale") == 2
    assert said.count(NOT_MEASURED) == sum(len(goal.limits) for goal in GOALS) - 2


def test_the_report_of_a_gpu_has_its_goals(tmp_path: Any) -> None:
    path = tmp_path / "gpu-nvidia-h200-2030-01-01.csv"
    harness.write([row(goal, "SDPA flash") for goal in GOALS], path)
    text = report.full([path])
    assert "### Goals" in text
    assert "| attention forward B4 H16 N577 D64 | ≤ 32 µs |" in text
