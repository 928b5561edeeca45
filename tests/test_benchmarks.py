"""The benchmarks: formulas, the gate, the rows, and the README's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import cases, cpu, harness, report
from benchmarks.harness import Contest
from fastvit.kernels import native


def contest(rule: float, ours: Callable[[], object] = lambda: None) -> Contest:
    return Contest("suite", "case", torch.float32, ours, {"slow": lambda: sum(range(50_000))}, 1e6, rule)


def test_flop_formulas_against_hand_computed_cases() -> None:
    # 2 products of 197 × 197 × 64 multiply-adds for each of 12 heads.
    assert harness.attention_flop(1, 12, 197, 64) == 2 * 2 * 12 * 197 * 197 * 64
    # B=256, 224², P16, D768: 59.2 GFLOP.
    assert harness.patch_embed_flop(256, 196, 768, 768) == pytest.approx(59.2e9, rel=1e-3)


def test_a_wrong_kernel_yields_no_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = native.attention_forward

    def wrong(*args: torch.Tensor, is_causal: bool, scale: float) -> None:
        forward(*args, is_causal=is_causal, scale=scale * 1.01)

    monkeypatch.setattr(native, "attention_forward", wrong)
    (bad,) = cases.attention_contests(torch.float32, "forward", cases.ATTENTION_SHAPES[-1:])
    assert bad.rule > 1
    assert harness.run(bad, 1, "device") is None
    assert "wrong" in capsys.readouterr().out
    assert harness.run(contest(float("nan")), 1, "device") is None


def test_the_faster_side_is_the_faster_side(tmp_path: Path) -> None:
    row = harness.run(contest(0.5), 5, "device")
    assert row is not None
    assert row.ratio > 10
    assert row.ratio == pytest.approx(row.peer_p50 / row.ours_p50, rel=0.3)
    harness.write([row], tmp_path / "rows.csv")
    assert harness.read(tmp_path / "rows.csv") == [row]


def test_each_contest_computes_the_same_on_both_sides() -> None:
    shape, patches = cases.ATTENTION_SHAPES[-1:], ((1, 32, 16, 24),)
    contests = [
        *(c for mode in ("forward", "bias", "backward") for c in cases.attention_contests(torch.float32, mode, shape)),
        *(c for mode in ("forward", "backward") for c in cases.patch_embed_contests(torch.float32, mode, patches)),
    ]
    for each in contests:
        ours = each.ours()
        for peer in each.peers.values():
            for a, b in zip(_tensors(ours), _tensors(peer()), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def _tensors(result: object) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)  # type: ignore[call-overload]


def test_the_quick_suite_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Correctness and the printed table; CI does not fail on time.
    monkeypatch.setattr("sys.argv", ["cpu", "--quick", "--repeats", "1", "--threads", "1"])
    cpu.main()
    printed = capsys.readouterr().out
    assert "attention forward float32: geometric mean" in printed
    assert "wrong" not in printed


def test_the_readme_shows_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    path = report.newest()
    readme = report.README.read_text()
    assert report.updated(readme, report.table(path)) == readme
    if report.is_stale(harness.read(path)):
        with capsys.disabled():
            print(f"\nstale: the CPU kernels have changed since {path.name} was measured")


def test_a_changed_row_or_source_is_noticed(tmp_path: Path) -> None:
    rows = harness.read(report.newest())
    changed = [dataclasses.replace(rows[0], ratio=rows[0].ratio * 2), *rows[1:]]
    harness.write(changed, tmp_path / report.newest().name)
    assert report.table(tmp_path / report.newest().name) != report.table(report.newest())
    assert report.is_stale([dataclasses.replace(rows[0], sources="0" * 12)])


def test_without_a_gpu_the_gpu_suite_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu

    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 3
    assert capsys.readouterr().out.count("\n") == 1
