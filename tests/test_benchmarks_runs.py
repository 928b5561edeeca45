"""A run from its list of cases to its last row: what is on the list, in which modes, what a reader sees meanwhile."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import cases, harness, peers, roofline, runner, suite_models, suite_overhead, timers
from benchmarks.cases import ModelShape, Work
from benchmarks.formulas import VitShape
from benchmarks.roofline import Machine
from tests.faked_cuda import fake_cuda
from tests.swapping import ops_run

MACHINE = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0}, 10.0)
TINY_VIT = VitShape(32, 16, 192, 768, 12)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda *args, **options: MACHINE)
    monkeypatch.setattr(roofline, "environment", lambda machines: {})
    monkeypatch.setattr(timers, "gc", SimpleNamespace(collect=lambda: 0))


def test_a_gpu_is_given_the_whole_product_of_attention() -> None:
    listed = {
        (d.seqlen, d.head_dim, d.bias, d.mode, work.layout, work.dtype)
        for work in cases.select("cuda", ("attention",))
        if isinstance(d := work.details, cases.AttentionShape)
    }
    lengths = (49, 50, 64, 196, 197, 256, 257, 577, 785, 1024, 1025, 1370, 4096)
    wanted = itertools.product(
        lengths, (32, 64, 72, 80, 96, 128), (False, True), ("forward", "backward", "forward + backward"),
        ("packed", "separate"), (torch.float16, torch.bfloat16, torch.float32),
    )  # fmt: skip
    assert set(wanted) - listed == set()


def test_the_cuda_kernels_have_overhead_rows_too() -> None:
    cuda = list(cases.overhead("cuda"))
    assert [work.details for work in cuda] == list(cases.OVERHEADS)
    # They take 16 bits only.
    assert {work.dtype for work in cuda} == {torch.bfloat16}
    backward = next(work for work in cuda if work.details == "eager call, backward")
    contest = suite_overhead.contest(backward, "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1
    for entry in (*contest.ours, *contest.peers):
        gradients: Any = entry.build()()
        assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3


def test_flex_attention_is_timed_with_bias_and_backward_and_everywhere_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    costly = [work for work in cases.select("cuda") if cases.is_costly(work, "cuda")]
    assert {work.suite for work in costly} == {"attention forward", "attention forward, bias", "attention backward"}
    # Every name is one of the list, and is there before the grid.
    assert len(costly) == len(cases.COSTLY)
    assert all(work.tier <= 1 for work in costly)
    for work in costly:
        chosen, _ = peers.attention_peers("cuda", work.dtype, work.details.bias, "backward" in work.suite, True)
        assert "FlexAttention compiled" in [peer.name for peer in chosen]
    asked = []

    def contest(work: Work, device: str, backends: Any, costly: bool) -> Any:
        asked.append(costly)
        raise MemoryError

    monkeypatch.setitem(runner.CONTESTS, "attention", contest)
    separate = dataclasses.replace(costly[0], layout="separate")
    gpu = dataclasses.replace(MACHINE, device="cuda")
    for work, all_peers in ((costly[0], False), (separate, False), (separate, True)):
        runner.measure_one(work, gpu, runner.Options("cuda", all_peers=all_peers), 1)
    # On a GPU they come behind the other cases.
    assert asked == [False, False, True]

    passes = []

    def measure(todo: list[Any], report: runner.Report, options: runner.Options, *_: Any) -> list[Any]:
        passes.append(([work.label for work, _ in todo], options.all_peers))
        return []

    monkeypatch.setattr(runner, "_machines", lambda *_: [gpu])
    monkeypatch.setattr(runner, "_measure", measure)
    runner.run(runner.Options("cuda", ["attention"]))
    (first, asked_first), (second, asked_second) = passes
    assert (asked_first, asked_second) == (False, True)
    assert set(second) == {work.label for work in costly} < set(first)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have models of one block: what is compiled is the same block twelve times."""
    create = suite_models.create.__wrapped__

    def one_block(*args: Any) -> nn.Module:
        model: Any = create(*args)
        model.blocks = model.blocks[:1]
        return model

    monkeypatch.setattr(suite_models, "create", one_block)


def model(mode: str, training: bool) -> Work:
    shape = ModelShape("vit_tiny_patch16_224", TINY_VIT, 2, mode, training)
    return Work(
        f"model {'training step' if training else 'inference'}, {mode}", "tiny", torch.float32, 0, "models", shape
    )


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("training", [False, True])
def test_compiled_models_are_compiled_on_both_sides(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_ = [], torch.compile

    def keep(function: Any, **options: Any) -> Any:
        compiled.append(function)
        # Inductor's part has tests of its own, and takes ten times as long.
        return compile_(function, backend="eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", keep)
    contest = suite_models.contest(model("compiled", training), "cpu", ("cpu",))
    assert [peer.name for peer in contest.peers] == ["timm compiled"]
    calls = [entry.build() for entry in (*contest.ours, *contest.peers)]
    assert [bool(ops_run(call)) for call in calls] == [True, False]
    assert len(compiled) == 2
    torch._dynamo.reset()
    rows = harness.run(contest, MACHINE, 1).rows
    assert [(row.backend, row.peer, row.clock) for row in rows] == [("cpu", "timm compiled", "host")]


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("training", [False, True])
def test_graphed_models_are_timed_as_graphs_on_both_sides(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(work.suite == model("graphed", training).suite for work in cases.select("cuda", ("models",)))
    contest = suite_models.contest(model("graphed", training), "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1
    log: list[str] = []
    fake_cuda(monkeypatch, log)
    gpu = dataclasses.replace(MACHINE, device="cuda", threads=0)
    outcome = harness.run(contest, gpu, 3)
    assert [(row.backend, row.peer, row.clock) for row in outcome.rows] == [("cpu", "timm graphed", "graph")], (
        outcome.notes
    )
    assert log.count("replay graph") == 6
    assert outcome.rows[0].ours_eager > 0


def run(budget: float, console: Console, out: Path | None = None) -> runner.Report:
    options = runner.Options(
        budget=budget, out=out, words="attention forward float32 packed", threads=(1,), repeats=1, last_tier=0,
        suites=("attention",),
    )  # fmt: skip
    return runner.run(options, console)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.cases, "TELLING", {"cpu": tuple((1, 1, n, 16, False) for n in (17, 18, 19, 20))})


@pytest.mark.usefixtures("few")
def test_a_budget_that_ends_midway_ends_the_run_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, measure = [0.0], runner.measure_one

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def one(*args: Any) -> harness.Outcome:
        now[0] += 10.0
        return measure(*args)

    monkeypatch.setattr(runner, "time", Time)
    monkeypatch.setattr(runner, "measure_one", one)
    text = io.StringIO()
    report = run(25.0, Console(file=text, width=200), tmp_path)
    # Begun at 0, 10 and 20 seconds; the fourth would begin at 30.
    assert {row.case for row in report.rows} == {f"B1 H1 N{n} D16" for n in (17, 18, 19)}
    assert report.ended == "the budget of 25 s is spent"
    assert "the budget of 25 s is spent" in text.getvalue()
    assert report.path is not None
    assert harness.read(report.path) == report.rows


@pytest.mark.usefixtures("few")
def test_a_terminal_has_a_progress_bar_and_a_log_has_none() -> None:
    terminal, log = io.StringIO(), io.StringIO()
    count = len({row.work for row in run(60.0, Console(file=terminal, force_terminal=True, width=200)).rows})
    run(60.0, Console(file=log, width=200))
    shown = terminal.getvalue()
    assert f"{count}/{count}" in shown
    assert f"0/{count}" in shown
    # It names the case, and leaves the screen at the end: its cursor is shown again, and the line erased.
    assert "B1 H1 N17 D16" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex(f"{count}/{count}")
    assert "\x1b" not in log.getvalue()
    assert f"{count}/{count}" not in log.getvalue()
