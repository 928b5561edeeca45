"""README's table and figures, and the report: drawn from committed rows, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import figures, formulas, harness, report, roofline
from benchmarks.harness import Contest, Row
from benchmarks.timers import Entry, Times

matplotlib = pytest.importorskip("matplotlib")


def test_the_readme_shows_the_committed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.differences() == []
    assert report.table(report.newest(), headlines=True) in report.README.read_text()
    for path in report.evidence():
        if report.is_stale(harness.read(path)):
            with capsys.disabled():
                print(f"\nstale: the kernels have changed since {path.name} was measured")


def test_a_changed_row_or_source_is_noticed(tmp_path: Path) -> None:
    rows = harness.read(report.newest())
    shown = harness.best(rows)[0]  # the first row may be a peer that is not the fastest of its case
    changed = [dataclasses.replace(row, ratio=row.ratio * 2) if row == shown else row for row in rows]
    harness.write(changed, tmp_path / report.newest().name)
    assert report.table(tmp_path / report.newest().name) != report.table(report.newest())
    assert report.is_stale([dataclasses.replace(rows[0], sources="0" * 12)])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the report a folder and a README of its own."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    harness.write([*grid("forward"), *grid("backward"), *models()], tmp_path / "gpu-some-2026-01-02.csv")
    return tmp_path


def grid(mode: str) -> list[Row]:
    first = harness.read(sorted((harness.ROOT / "benchmarks/results").glob("cpu-*.csv"))[0])[0]
    rows = []
    for index, (seqlen, dim) in enumerate(((49, 32), (197, 64), (197, 80), (257, 64), (1370, 64))):
        for backend in ("cuda", "triton"):
            for number, peer in enumerate(("SDPA cuDNN", "SDPA flash", "Linear (floor)")):
                ours, theirs = 1.0 + index + (backend == "triton"), 2.0 + index + number / 10
                rows.append(
                    dataclasses.replace(
                        first, suite=f"attention {mode}", case=f"B2 H3 N{seqlen} D{dim}", dtype="bfloat16", threads=0,
                        backend=backend, peer=peer, ours_p50=ours, peer_p50=theirs / (10 if number == 2 else 1),
                        ratio=round(theirs / ours, 3), sources=harness.source_hash(backend), layout="packed",
                        samples=30, bound="memory", share=0.5, ours_gflops=100.0 / ours, ours_gbs=10.0,
                        peak_gflops=800.0, peak_gbs=40.0, peer_version="torch 2.11",
                    )
                )  # fmt: skip
    return rows


def models() -> list[Row]:
    return [
        dataclasses.replace(
            row, suite="model inference, compiled", case=f"vit_{name}_patch16_224 B{batch}", peer="timm compiled",
            per_second=batch * 1e3, ours_mib=900.0, peer_mib=1000.0,
        )
        for name in ("tiny", "base")
        for batch in (1, 8, 256)
        for row in grid("forward")[:1]
    ]  # fmt: skip


def test_one_command_draws_everything_and_the_check_finds_what_differs(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    drawings = sorted(path.name for path in (results / "figures").iterdir())
    assert drawings == sorted(f"gpu-some-2026-01-02-{kind}.svg" for kind in figures.FIGURES)
    readme = (results / "README.md").read_text()
    # The floor is no rival, and the best of the two SDPA backends is: (2 · 3/2 · 4/3 · 5/4 · 6/5) to the power of 1/5.
    assert "| attention forward | bfloat16 | cuda | SDPA cuDNN | 1.43 × (1.20 – 2.00) | 50 % |" in readme
    assert "gpu-some-2026-01-02-models.svg" in readme
    full = (results / "REPORT.md").read_text()
    for what in ("Linear (floor)", "SDPA flash (torch 2.11)", "50 % memory", "900 (1000)"):
        assert what in full
    # The same rows give the same files.
    before = {path.name: path.read_text() for path in (results / "figures").iterdir()}
    report.main([])
    assert {path.name: path.read_text() for path in (results / "figures").iterdir()} == before
    # Other rows: README, report and every figure are found out.
    path = results / "gpu-some-2026-01-02.csv"
    rows = harness.read(path)
    harness.write([dataclasses.replace(rows[0], ratio=9.0), *rows[1:]], path)
    capsys.readouterr()
    assert report.main(["--check"]) == 1
    assert "shows other rows" in capsys.readouterr().out
    assert len(report.differences()) == 2 + len(figures.FIGURES)


def test_a_run_that_was_cut_short_does_not_take_the_place_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harness.read(report.newest())
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    harness.write(whole[:40], tmp_path / "cpu-b-2026-01-03.csv")
    assert report.newest().name == "cpu-b-2026-01-03.csv"
    harness.write(whole, tmp_path / "cpu-a-2026-01-02.csv")
    assert report.newest().name == "cpu-a-2026-01-02.csv"


def test_the_readme_has_the_headlines_in_their_order(results: Path) -> None:
    (row,) = grid("forward")[:1]
    suites = ("patch_embed stem", "overhead eager call", "attention forward", "model inference, eager")
    rows = [dataclasses.replace(row, suite=suite, disturbed=int(suite == "patch_embed stem")) for suite in suites]
    path = results / "cpu-some-2026-01-02.csv"
    harness.write(rows, path)

    def shown(**options: bool) -> list[str]:
        lines = report.table(path, **options).splitlines()
        return [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:]

    first = ["model inference, eager", "attention forward", "overhead eager call"]
    assert shown(headlines=True) == first
    assert shown() == [*first, "patch_embed stem"]
    assert "Others used the same processor during 1 of them." in report.table(path)
    # A file of other suites has a table all the same.
    harness.write(rows[:1], path)
    assert shown(headlines=True) == ["patch_embed stem"]


def test_costs_are_told_and_stand_under_no_roof(results: Path) -> None:
    (first, *_) = grid("forward")
    row = dataclasses.replace(
        first, suite="overhead eager call", peer="SDPA", ours_p50=0.0125, peer_p50=0.0084, bound="", share=0.0
    )
    path = results / "gpu-some-2026-01-02.csv"
    harness.write([*harness.read(path), row], path)
    facts = {
        "wheel": {"wheel_mib": 2.5, "build_seconds": 61.2, "architectures": "9.0a"},
        "build": {"architecture": "9.0a", "seconds": 99.0, "native_mib": 7.25, "error": "first\nno compiler\n"},
    }
    path.with_suffix(".json").write_text(json.dumps({"facts": facts}))
    costs = report.full([path]).partition("### Costs")[2]
    assert "- eager call, bfloat16, cuda: 0.0125 ms; SDPA: 0.0084 ms\n" in costs
    assert "- wheel (9.0a architectures): 2.5 MiB, built in 61 s\n" in costs
    assert "- build for 9.0a alone: 99 s, 7.25 MiB; failed: no compiler" in costs
    table = next(line for line in report.table(path).splitlines() if line.startswith("| overhead"))
    assert table.endswith("| – |")
    path.with_suffix(".json").unlink()
    assert "- wheel: not built in these runs" in report.full([path])


def test_readme_says_that_no_gpu_was_measured_until_one_was(results: Path) -> None:
    assert "not measured yet" not in report.content()
    (results / "gpu-some-2026-01-02.csv").rename(results / "cpu-some-2026-01-02.csv")
    assert report.content().endswith("Speed on a GPU: **not measured yet.** `make gpu` measures it.")
    # Nowhere else, where no run would take it away.
    readme = (harness.ROOT / "README.md").read_text()
    outside = readme.partition(report.BEGIN)[0] + readme.partition(report.END)[2]
    assert "Speed on a GPU" not in outside


def test_mfu_is_the_useful_rate_over_the_measured_peak(results: Path) -> None:
    # ViT-B/16 at 224, by hand: 12 blocks of 197 tokens; qkv and projection 8 · 768², MLP 16 · 768², attention
    # 4 · 197 · 768 multiply-adds times two; patches 2 · 196 · 768²; head 2 · 768 · 1000.
    block = 197 * (8 * 768**2 + 16 * 768**2 + 4 * 197 * 768)
    flop = 12 * block + 2 * 196 * 768 * 768 + 2 * 768 * 1000
    assert flop == pytest.approx(35.1e9, rel=0.01)
    vit = formulas.VitShape(224, 16, 768, 3072, 12)
    work = Contest(
        "model inference, eager", "vit B256", torch.bfloat16, (Entry("cpu", lambda: lambda: None),), (), {"cpu": 0.5},
        flop=formulas.vit_flop(vit, 256),
    )  # fmt: skip
    assert work.flop == pytest.approx(256 * flop, rel=1e-3)
    machine = roofline.Machine("cpu", "device", "x", 0, "d", {"bfloat16": 800e3}, 4000.0)
    # 256 images in 25 ms: 359.6 TFLOP/s of 800.
    row = harness._row(work, machine, work.ours[0], None, {"cpu": Times([0.025] * 3)})
    expected = 100 * 256 * flop / 0.025 / 800e12
    assert f"| {expected:.0f} % |" == "| 45 % |"
    assert "| 45 % |" in report._cases([row])
    assert "| 45 % |" not in report._cases([dataclasses.replace(row, suite="attention forward")])


def test_a_stale_mark_is_wherever_a_figure_is_shown(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main([])
    assert figures.STALE not in (results / "README.md").read_text()
    monkeypatch.setattr(harness, "source_hash", lambda backend="cpu": "f" * 12)
    # A changed kernel is told and makes no test fail: README still shows the rows.
    capsys.readouterr()
    assert report.main(["--check"]) == 0
    assert figures.STALE in capsys.readouterr().out
    report.main([])
    assert report.MARK in (results / "README.md").read_text()
    assert report.MARK in (results / "REPORT.md").read_text()
    for kind, function in figures.FIGURES.items():
        figure = function(harness.read(results / "gpu-some-2026-01-02.csv"))
        assert figure is not None, kind
        assert figure.get_suptitle() == figures.STALE.upper(), kind
    assert report.main(["--check"]) == 0


def test_figures_show_the_numbers_of_the_rows(results: Path) -> None:
    rows = harness.read(results / "gpu-some-2026-01-02.csv")
    heat = figures.heat_map(rows)
    assert heat is not None
    # The faster backend against the best rival, over d = 32, 64, 80 and N = 49, 197, 257, 1370.
    assert sorted(text.get_text() for text in heat.axes[0].texts) == ["1.20", "1.25", "1.33", "1.50", "2.00"]
    time = figures.time_against_seqlen(rows)
    assert time is not None
    lines = {line.get_label(): list(line.get_ydata()) for line in time.axes[0].lines}
    # µs of one of 2 · 3 heads and images: 2 ms, 4 ms and 5 ms.
    assert lines["fastvit cuda"] == pytest.approx([2e3 / 6, 4e3 / 6, 5e3 / 6])
    assert set(lines) == {"fastvit cuda", "fastvit triton", "SDPA cuDNN", "SDPA flash"}
    roof = figures.roofline(rows)
    assert roof is not None
    points = next(line for line in roof.axes[0].lines if line.get_label() == "attention forward")
    assert max(points.get_ydata()) == pytest.approx(0.1)
    bars = figures.models(rows)
    assert bars is not None
    assert len(bars.axes[0].get_yticklabels()) == 4
    assert figures.models(grid("forward")) is None
