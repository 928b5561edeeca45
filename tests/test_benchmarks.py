"""The benchmarks: the lists of cases, the contests, the gate, the runner, and its files."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import __main__ as entry
from benchmarks import (
    cases,
    harness,
    peers,
    roofline,
    runner,
    suite_attention,
    suite_models,
    suite_overhead,
    suite_patch_embed,
    timers,
)
from benchmarks.cases import AttentionShape, ModelShape, PatchShape, Work
from benchmarks.formulas import VitShape
from benchmarks.harness import Contest, Row
from benchmarks.roofline import Machine
from benchmarks.timers import Entry
from fastvit.kernels import native

MACHINE = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0, "bfloat16": 100.0}, 10.0)
TINY_VIT = VitShape(32, 16, 192, 768, 12)


def tiny_attention(mode: str = "forward", bias: bool = False, layout: str = "packed") -> Work:
    return cases.attention_work(AttentionShape(2, 3, 17, 16, mode, bias), torch.float32, layout, 0)


def tiny_patches(mode: str) -> Work:
    return Work(f"patch_embed {mode}", "tiny", torch.float32, 0, "patch_embed", PatchShape(2, 32, 16, 24, mode))


def tiny_model(mode: str = "eager", training: bool = False) -> Work:
    shape = ModelShape("vit_tiny_patch16_224", TINY_VIT, 2, mode, training)
    return Work("model", "tiny", torch.float32, 0, "models", shape)


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.fixture(autouse=True)
def quick_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the roofs at once: their measurement has its own test."""
    monkeypatch.setattr(
        roofline, "measure", lambda *args, **kwargs: dataclasses.replace(MACHINE, threads=torch.get_num_threads())
    )
    monkeypatch.setattr(roofline, "environment", lambda machines: {})
    # With everything imported that other tests import it takes a second, in each case.
    monkeypatch.setattr(timers, "gc", SimpleNamespace(collect=lambda: 0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_lists_hold_what_is_to_be_measured(device: str) -> None:
    works = cases.select(device, words="attention")
    shapes = {(work.details.seqlen, work.details.head_dim) for work in works if work.kind == "attention"}
    assert {n for n, _ in shapes} >= set(cases.SEQLENS) - ({4096} if device == "cpu" else set())
    assert {d for _, d in shapes} >= set(cases.HEAD_DIMS)
    suites = {work.suite for work in works}
    assert suites >= {f"attention {mode}{bias}" for mode in cases.MODES for bias in ("", ", bias")}
    assert {work.layout for work in works if work.kind == "attention"} == set(cases.LAYOUTS)
    assert {work.dtype for work in works} >= {torch.float16, torch.bfloat16, torch.float32}
    # Each once, tier by tier; the first is what a reader asks for first.
    assert len({work.key for work in works}) == len(works)
    assert [work.tier for work in works] == sorted(work.tier for work in works)
    assert works[0].case == {"cpu": "B1 H12 N197 D64", "cuda": "B256 H12 N197 D64"}[device]


def test_a_gpu_has_the_models_of_the_plan_and_a_cpu_those_that_fit() -> None:
    gpu = {(w.details.name, w.details.batch) for w in cases.select("cuda", ("models",)) if not w.details.training}
    names = {name for name, _ in gpu}
    assert len(names) == 11
    assert {batch for _, batch in gpu} == {1, 8, 32, 256}
    cpu = cases.select("cpu", ("models",))
    assert cpu
    assert all("huge" not in work.details.name and work.details.batch <= cases.CPU_IMAGES for work in cpu)
    assert not any("graphed" in work.suite for work in cpu)
    assert all(cases.fits(work, "cpu") for work in cases.select("cpu"))
    assert any(not cases.fits(work, "cpu") for work in cases.select("cuda"))


def test_a_short_run_has_something_of_each_suite() -> None:
    first = [work.kind for work in cases.select("cuda")[:8]]
    assert first.count("attention") >= 3
    assert {"attention", "patch_embed", "models"} <= set(first)
    tops = [work.label for work in cases.select("cuda", last_tier=0)]
    assert "attention backward B256 H12 N197 D64 bfloat16 packed" in tops
    assert sum(any(name in label for label in tops) for name in cases.COSTLY) >= 5


def test_selection_by_name() -> None:
    works = cases.select("cpu", words="N197 BFLOAT16 bias")
    assert works
    assert all("N197" in w.label and "bfloat16" in w.label and "bias" in w.label for w in works)
    assert not cases.select("cpu", words="no such case")
    quick = cases.select("cpu", quick=True)
    assert 2 <= len(quick) <= 20
    assert {work.kind for work in quick} >= {"attention", "patch_embed"}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_each_attention_contest_computes_the_same_on_both_sides(mode: str, bias: bool, layout: str) -> None:
    contest = suite_attention.contest(tiny_attention(mode, bias, layout), "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1
    assert [peer.name for peer in contest.peers] == ["SDPA", "SDPA math"]
    assert "FlexAttention compiled" in contest.absent
    same_on_both_sides(contest)


@pytest.mark.parametrize(
    "mode", ["forward", "forward channels_last", "backward", "forward + backward", "stem", "tubelet"]
)
def test_each_patch_embed_contest_computes_the_same_on_both_sides(mode: str) -> None:
    contest = suite_patch_embed.contest(tiny_patches(mode), "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1
    assert {peer.name for peer in contest.peers if peer.floor} <= {suite_patch_embed.FLOOR}
    same_on_both_sides(contest)


def same_on_both_sides(contest: Contest) -> None:
    ours = tensors(contest.ours[0].build()())
    for peer in contest.peers:
        for mine, theirs in zip(ours, tensors(peer.build()()), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_the_compiled_stem_is_compiled_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def keep(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", keep)
    contest = suite_patch_embed.contest(tiny_patches("stem compiled"), "cpu", ("cpu",))
    assert len(compiled) == 2
    assert [peer.name for peer in contest.peers] == ["Conv2d stem compiled", "Conv2d stem"]
    same_on_both_sides(contest)


@pytest.mark.parametrize("training", [False, True])
def test_the_model_contest_runs_our_ops_and_theirs_does_not(training: bool) -> None:
    from tests.swapping import ops_run

    contest = suite_models.contest(tiny_model(training=training), "cpu", ("cpu",))
    assert contest.rules["cpu"] <= 1
    assert ops_run(contest.ours[0].build())
    assert not ops_run(contest.peers[0].build())
    assert contest.flop == (3 if training else 1) * cases_flop()
    if not training:
        same_on_both_sides(contest)


def cases_flop() -> float:
    from benchmarks.formulas import vit_flop

    return vit_flop(TINY_VIT, 2)


def test_overhead_contests() -> None:
    for index, work in enumerate(cases.overhead("cpu")):
        contest = suite_overhead.contest(work, "cpu", ("cpu",))
        assert contest.rules["cpu"] <= 1
        if work.details == "eager call":
            same_on_both_sides(contest)
        # A process per sample; the others are made ones of this process.
        assert (contest.repeats > 0) == (index >= 2)
    program = suite_overhead._first_call("cpu", "cpu", torch.bfloat16)
    assert "dtype=torch.bfloat16" in program
    compile(program, "program", "exec")
    # Each first call is one that finds no compiled kernel.
    suite_overhead._process("import os; assert os.listdir(os.environ['TRITON_CACHE_DIR']) == []")()


def test_the_wheel_is_built_and_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def pip(command: list[str], **options: Any) -> Any:
        seen.append((command, options["env"].get("TORCH_CUDA_ARCH_LIST")))
        folder, tree = Path(command[command.index("--wheel-dir") + 1]), Path(command[-1])
        # A copy, without what an earlier build left: from that a build takes seconds.
        assert {"setup.py", "README.md", "csrc", "fastvit"} <= {path.name for path in tree.iterdir()}
        assert not (tree / "build").exists()
        assert not list(tree.rglob("*.so"))
        if len(seen) == 1:
            (folder / "x.whl").write_bytes(b"0" * 2**20)
        return SimpleNamespace(returncode=len(seen) - 1, stdout="", stderr="first\nno compiler")

    monkeypatch.setattr(suite_overhead.subprocess, "run", pip)
    built = suite_overhead.build_wheel("9.0a")
    assert (built["wheel_mib"], built["architectures"], seen[0][1]) == (1.0, "9.0a", "9.0a")
    assert "--no-index" in seen[0][0]
    assert suite_overhead.build_wheel()["why not"] == "pip wheel: exit status 1: no compiler"


def test_why_a_peer_is_absent() -> None:
    said = peers.availability("cuda")
    assert len(said) == 9
    assert "not importable: ModuleNotFoundError" in said["flash-attn 3"]
    assert said["SDPA flash"].startswith("torch ")
    chosen, absent = peers.attention_peers("cuda", torch.bfloat16, bias=True, backward=False, costly=True)
    assert absent["SDPA flash"] == "takes no additive bias"
    assert "SDPA cuDNN" in [peer.name for peer in chosen]
    _, absent = peers.attention_peers("cuda", torch.float32, bias=False, backward=False, costly=False)
    assert "float16 and bfloat16" in absent["SDPA cuDNN"]
    assert "compiles for each shape" in absent["FlexAttention compiled"]


def test_a_pinned_peer_is_pinned() -> None:
    q, k, v = (torch.randn(1, 1, 8, 8) for _ in range(3))
    with pytest.raises(RuntimeError):
        peers._pinned(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)()(q, k, v, None)


@pytest.mark.usefixtures("python_calls")
def test_a_wrong_kernel_yields_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, patches = native.attention_forward, native.patch_embed_forward

    def wrong(*args: Tensor, is_causal: bool, scale: float) -> None:
        forward(*args, is_causal=is_causal, scale=scale * 1.01)

    monkeypatch.setattr(native, "attention_forward", wrong)
    options = runner.Options(backends=("cpu",))
    for work in (tiny_attention(), tiny_attention("backward")):
        outcome = runner.measure_one(work, MACHINE, options, 1)
        assert not outcome.rows
        assert any("wrong" in note and "not timed" in note for note in outcome.notes)
    assert runner.measure_one(tiny_patches("forward"), MACHINE, options, 1).rows

    def wrong_patches(*args: Any, **options: Any) -> Any:
        result = patches(*args, **options)
        for arg in args:
            if isinstance(arg, Tensor) and arg.dim() == 3:
                arg.mul_(1.01)
        return result

    monkeypatch.setattr(native, "patch_embed_forward", wrong_patches)
    assert not runner.measure_one(tiny_patches("forward"), MACHINE, options, 1).rows
    nan = Contest("s", "c", torch.float32, (Entry("cpu", lambda: print),), (), {"cpu": float("nan")})
    assert not harness.run(nan, MACHINE, 1).rows


def test_the_faster_side_is_the_faster_side_and_rows_are_read_as_written(tmp_path: Path) -> None:
    fast, slow = Entry("cpu", lambda: lambda: None), Entry("slow", lambda: lambda: sum(range(50_000)))
    slower = Entry("slower", lambda: lambda: sum(range(200_000)))
    floor = Entry("less", lambda: lambda: None, floor=True)
    contest = Contest("suite", "case", torch.float32, (fast,), (slower, slow, floor), {"cpu": 0.5}, 1e6, 1e6)
    rows = harness.run(contest, MACHINE, 5).rows
    assert [row.peer for row in rows] == ["slower", "slow", "less (floor)"]
    (best,) = harness.best(rows)
    assert best.peer == "slow"
    assert best.ratio > 10
    assert best.ratio == pytest.approx(best.peer_p50 / best.ours_p50, rel=0.01)
    harness.write(rows, tmp_path / "rows.csv")
    assert harness.read(tmp_path / "rows.csv") == rows
    assert not list(tmp_path.glob("*.partial"))


def test_the_first_files_stay_readable() -> None:
    path = harness.RESULTS / "cpu-amd-epyc-2026-11-21.csv"
    with open(path, newline="") as file:
        raw = list(csv.DictReader(file))
    rows = harness.read(path)
    assert len(rows) == len(raw) == 160
    for row, record in zip(rows, raw, strict=True):
        assert row.suite == harness.EARLIER_NAMES.get(record["suite"], record["suite"])
        assert (row.case, row.ours_p50, row.peer) == (record["case"], float(record["ours_p50"]), record["peer"])
        assert row.samples == 0
    # What was called backward had the forward pass in it: the two names must not meet.
    assert "attention backward" not in {row.suite for row in rows}


def run(out: Path | None, words: str, **options: Any) -> tuple[runner.Report, str]:
    console = Console(file=io.StringIO(), width=200)
    settings: dict[str, Any] = {"threads": (1,), "repeats": 2, "last_tier": 1, "suites": ("attention",)}
    report = runner.run(runner.Options(out=out, words=words, **(settings | options)), console)
    return report, console.file.getvalue()  # type: ignore[attr-defined]


FEW = "H3 forward packed float32"


def test_fresh_rows_are_skipped_and_stale_ones_measured_again(tmp_path: Path) -> None:
    first, _ = run(tmp_path, FEW)
    assert first.new == len(first.rows) > 0
    assert first.path is not None
    assert first.path.parent == tmp_path
    second, printed = run(tmp_path, FEW)
    assert (second.new, len(second.rows)) == (0, len(first.rows))
    assert "have fresh rows and are skipped" in printed
    # Another kernel, another torch: not fresh. And a second run takes only what is missing.
    changed = [dataclasses.replace(row, sources="0" * 12) for row in first.rows if "N49" in row.case]
    changed += [row for row in first.rows if "N49" not in row.case]
    harness.write(changed, first.path)
    third, _ = run(tmp_path, FEW)
    assert third.new == sum("N49" in row.case for row in first.rows) > 0
    assert len(third.rows) == len(first.rows)
    harness.write([dataclasses.replace(row, torch="1.0") for row in third.rows], first.path)
    assert run(tmp_path, FEW)[0].new == len(first.rows)
    assert run(tmp_path, FEW, again=True)[0].new == len(first.rows)
    side = json.loads(first.path.with_suffix(".json").read_text())
    assert set(side) == {"facts", "peers", "not timed", "ended"}
    assert any("FlexAttention compiled" in note for note in side["not timed"])


def test_rows_of_an_earlier_day_that_are_fresh_are_taken_over(tmp_path: Path) -> None:
    first, _ = run(tmp_path, FEW)
    assert first.path is not None
    old = first.path.with_name(first.path.name.replace(first.path.stem[-10:], "2020-01-01"))
    rows = [*first.rows[:1], *(dataclasses.replace(row, sources="0" * 12) for row in first.rows[1:])]
    harness.write(rows, old)
    first.path.unlink()
    report, _ = run(tmp_path, FEW, budget=-1.0)
    assert report.rows == first.rows[:1]
    assert "budget" in report.ended


def test_an_interrupt_keeps_the_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, calls = runner.measure_one, []

    def interrupted(*args: Any) -> harness.Outcome:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(runner, "measure_one", interrupted)
    before = torch.get_num_threads()
    report, printed = run(tmp_path, FEW)
    assert report.ended == "interrupted"
    assert "interrupted" in printed
    assert report.path is not None
    assert harness.read(report.path) == report.rows != []
    assert torch.get_num_threads() == before


def test_a_failing_case_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    contest = runner.CONTESTS["attention"]

    def fail(work: Work, *args: Any) -> Contest:
        if "N49" in work.case:
            raise MemoryError("too large")
        return contest(work, *args)

    monkeypatch.setitem(runner.CONTESTS, "attention", fail)
    report, _ = run(None, FEW)
    assert report.rows
    assert any("N49" in note and "MemoryError: too large" in note for note in report.notes)


def test_the_entry_point(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert entry.main(["nonsense"]) == 2
    assert entry.main(["cpu", "--list", "-k", "N197 bias"]) == 0
    listed = capsys.readouterr().out
    assert "attention forward, bias B8 H12 N197 D64 float32 packed" in listed
    out = str(tmp_path / "x.csv")
    command = [
        "attention",
        "--device",
        "cpu",
        "--quick",
        "-k",
        "N49 forward",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--out",
        out,
    ]
    assert entry.main(command) == 0
    printed = capsys.readouterr().out
    assert "attention forward float32 cpu: geometric mean" in printed
    assert "not timed: attention forward B64 H3 N49 D32 float32 packed: FlexAttention" in printed
    assert "wrong" not in printed
    assert all(isinstance(row, Row) for row in harness.read(Path(out)))
    assert entry.main(["attention", "--device", "cpu", "-k", "no such case"]) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert entry.main(["attention", "--device", "cuda"]) == 3
