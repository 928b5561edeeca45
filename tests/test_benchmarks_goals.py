"""The CPU's goals: which cases they are about, and what rows of known ratios say of them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import __main__ as entry
from benchmarks import cases, goals, harness, report, runner
from benchmarks.goals import MET, MISSED, NOT_MEASURED, Goal, Line
from benchmarks.harness import Row

# As the goals were set: (batch, heads, seqlen, head_dim).
SHAPES = {
    (1, 12, 197, 64), (8, 12, 197, 64), (8, 3, 197, 64), (8, 6, 257, 64), (4, 12, 577, 64), (2, 16, 1025, 64),
    (2, 16, 257, 80), (1, 16, 1370, 64), (64, 3, 49, 32), (64, 3, 50, 32),
}  # fmt: skip
CASES = {"B{} H{} N{} D{}".format(*shape) for shape in SHAPES}
BEST_OF_TWO, CHANNELS_LAST = ("Conv2d", "unfold + Linear"), "Conv2d channels_last"
ATTENTION, PATCHES, SHARE = goals.GOALS[0], goals.GOALS[5], goals.GOALS[-1]


def row(goal: Goal, case: str, peer: str, ratio: float, **changes: Any) -> Row:
    """Return a row of one case of a goal; of the times only the ratio is looked at."""
    columns: dict[str, Any] = dict.fromkeys((field.name for field in dataclasses.fields(Row)), "")
    columns |= {field.name: 1.0 for field in dataclasses.fields(Row) if field.type == "float"}
    columns |= {
        "suite": goal.suite, "case": case, "dtype": goal.dtype, "layout": goal.layout, "threads": 1, "samples": 15,
        "backend": "cpu", "peer": peer, "ratio": ratio, "sources": harness.source_hash("cpu"), "ours_gflops": 100.0,
        "fma_gflops": 200.0, "disturbed": 0,
    }  # fmt: skip
    return Row(**columns | changes)


def rows(goal: Goal, ratio: float = 2.0, **changes: Any) -> list[Row]:
    """Return one row for each case and peer of a goal, all of one ratio."""
    return [row(goal, case, peer, ratio, **changes) for case in goal.cases for peer in goal.peers or ("SDPA",)]


def line(found: list[Row], goal: Goal) -> Line:
    (only,) = goals.lines(found, [goal])
    return only


def test_the_goals_are_the_ones_that_were_set() -> None:
    limits = [(goal.suite, goal.dtype, goal.peers, goal.mean, goal.least) for goal in goals.GOALS]
    assert limits == [
        ("attention forward", "float32", ("SDPA",), 1.6, 1.3),
        ("attention forward", "bfloat16", ("SDPA",), 1.6, 1.3),
        ("attention forward", "float16", ("SDPA",), 1.6, 1.3),
        ("attention forward + backward", "float32", ("SDPA",), 1.4, 1.1),
        ("attention forward, bias", "float32", ("SDPA",), 1.6, 1.3),
        ("patch_embed forward", "float32", BEST_OF_TWO, 1.3, 1.0),
        ("patch_embed forward", "bfloat16", BEST_OF_TWO, 2.5, 1.5),
        ("patch_embed forward + backward", "float32", BEST_OF_TWO, 1.2, 1.0),
        ("model inference, eager", "float32", ("timm",), 1.05, 1.0),
        ("attention forward", "float32", (), 0.0, 0.6),
    ]
    assert all(set(goal.cases) == CASES for goal in goals.GOALS[:5])
    assert {goal.layout for goal in goals.GOALS[:5]} == {"packed"}
    assert set(SHARE.cases) == {case for case in CASES if not {"N49", "N50"} & set(case.split())}
    sizes = ("base", "small", "tiny")
    assert goals.GOALS[8].cases == tuple(f"vit_{size}_patch16_224 B{batch}" for size in sizes for batch in (1, 8))


def test_every_case_of_a_goal_is_measured_first() -> None:
    listed = [work.key for work in cases.select("cpu", last_tier=0)]
    wanted = {(goal.suite, case, goal.dtype, goal.layout) for goal in goals.GOALS for case in goal.cases}
    assert wanted <= set(listed)
    assert {case for suite, case, dtype, _ in listed if (suite, dtype) == ("patch_embed forward", "float32")} == set(
        PATCHES.cases
    )
    # What is in no goal does not fill the time before them.
    others = [key for key in listed if key not in wanted]
    last = max(listed.index(key) for key in wanted)
    assert sum(listed.index(key) < last for key in others) <= 2


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: f"{goal.name} {goal.dtype}")
def test_a_goal_is_met_at_its_limits_and_missed_a_hair_below(goal: Goal) -> None:
    def judged(ratios: list[float]) -> Line:
        # A share is ours over the rate of multiply-adds: the same rows with 1000 GFLOP/s of it.
        shares = [{"ours_gflops": 1000 * ratio, "fma_gflops": 1000.0} for ratio in ratios]
        found = [
            row(goal, case, peer, ratio, **(share if goal.is_share else {}))
            for case, ratio, share in zip(goal.cases, ratios, shares, strict=True)
            for peer in goal.peers or ("SDPA",)
        ]
        return line(found, goal)

    count, limit = len(goal.cases), max(goal.mean, goal.least)
    assert judged([limit] * count).verdict == MET
    # One shape below the least, however high the others are.
    below = judged([goal.least - 0.001] + [9.0] * (count - 1))
    assert below.verdict == MISSED
    assert goals.cells(below)[6] == goal.cases[0]
    if goal.mean:
        assert judged([goal.mean - 0.001] * count).verdict == MISSED
        # The mean is geometric: 4, 1 and so on average 2.5, but 2.
        halves = judged([2 * goal.mean * (1 - 1e-6), goal.mean / 2] * (count // 2))
        assert halves.verdict == MISSED
        assert goals.geometric_mean(halves.values.values()) == pytest.approx(goal.mean)


def test_figures_are_those_of_the_rows() -> None:
    ratios = dict.fromkeys(ATTENTION.cases, 2.0) | {"B8 H3 N197 D64": 1.0, "B1 H12 N197 D64": 4.0}
    found = [row(ATTENTION, case, "SDPA", ratio) for case, ratio in ratios.items()]
    shown = dict(zip(goals.HEAD, goals.cells(line(found, ATTENTION)), strict=True))
    assert (shown["geometric mean (goal)"], shown["least (goal)"]) == ("2.000 (1.6)", "1.000 (1.3)")
    assert (shown["at"], shown["goal is"]) == ("B8 H3 N197 D64", MISSED)
    assert shown["with Conv2d channels_last"] == "–"


def test_other_rows_say_nothing_of_a_goal() -> None:
    good = rows(ATTENTION)
    for change in (
        {"peer": "SDPA math"}, {"dtype": "bfloat16"}, {"layout": "separate"}, {"backend": "reference"},
        {"suite": "attention backward"}, {"case": "B1 H24 N1370 D32"},
    ):  # fmt: skip
        assert line([*good, *(dataclasses.replace(r, ratio=0.1, **change) for r in good)], ATTENTION).verdict == MET
    slow = [dataclasses.replace(r, ratio=0.1, threads=2) for r in good]
    assert [(li.threads, li.verdict) for li in goals.lines([*slow, *good], [ATTENTION])] == [(1, MET), (2, MISSED)]


def test_a_line_with_a_missing_case_is_never_met() -> None:
    found = rows(ATTENTION)
    assert line(found, ATTENTION).verdict == MET
    short = line(found[1:], ATTENTION)
    assert short.verdict == NOT_MEASURED
    assert goals.cells(short)[-1] == "not measured, 9 of 10 cases"
    # What is missing cannot mend what was measured.
    missed = line([dataclasses.replace(found[1], ratio=1.2), *found[2:]], ATTENTION)
    assert goals.cells(missed)[-1] == "missed, 9 of 10 cases"
    nothing = line([row(PATCHES, "x", "y", 1.0)], ATTENTION)
    assert nothing.verdict == NOT_MEASURED
    assert goals.cells(nothing)[-1] == "not measured, 0 of 10 cases"


def test_the_fastest_of_the_named_peers_counts_and_a_missing_one_is_a_missing_case() -> None:
    found = rows(PATCHES)
    linear = [dataclasses.replace(r, ratio=1.1) if r.peer == "unfold + Linear" else r for r in found]
    assert line(linear, PATCHES).verdict == MISSED
    assert set(line(linear, PATCHES).values.values()) == {1.1}
    # Without that peer the case says nothing: it might have been the fastest.
    assert line([r for r in found if r.peer == "Conv2d"], PATCHES).values == {}


def test_channels_last_and_floors_are_shown_and_do_not_count() -> None:
    found = rows(PATCHES)
    strict = [row(PATCHES, case, CHANNELS_LAST, 0.5 if case == "B8 224² P16 D768" else 1.0) for case in PATCHES.cases]
    floors = [row(PATCHES, case, f"Linear on ready patches{harness.FLOOR}", 0.1) for case in PATCHES.cases]
    judged = line([*found, *strict, *floors], PATCHES)
    assert judged.verdict == MET
    assert set(judged.values.values()) == {2.0}
    assert len(PATCHES.cases) == 8
    # The eighth root of a half is 0.917.
    assert goals.cells(judged)[7] == "0.917, least 0.500"
    # It counts beside the others, and not instead of them.
    slower = [dataclasses.replace(r, ratio=3.0) for r in strict]
    assert goals.cells(line([*found, *slower], PATCHES))[7] == "2.000, least 2.000"


def test_a_share_of_the_fma_peak_below_60_percent_is_missed() -> None:
    found = rows(SHARE, ours_gflops=120.0, fma_gflops=200.0)
    assert line(found, SHARE).verdict == MET
    low = [dataclasses.replace(found[2], ours_gflops=119.9), *found[:2], *found[3:]]
    assert line(low, SHARE).verdict == MISSED
    # 59.95 % is not 60 %, and says which shape it is.
    assert goals.cells(line([dataclasses.replace(r, ours_gflops=119.8) for r in found], SHARE))[5] == "59.9 % (60 %)"
    assert line(low, SHARE).values[found[2].case] == pytest.approx(0.5995)
    # A rate that was not measured is no share, and of short sequences none is asked.
    assert line([dataclasses.replace(found[0], fma_gflops=0.0), *found[1:]], SHARE).verdict == NOT_MEASURED
    short = [row(SHARE, "B64 H3 N49 D32", "SDPA", 1.0, ours_gflops=20.0)]
    assert line([*found, *short], SHARE).verdict == MET


def printed(found: list[Row]) -> list[str]:
    console = Console(file=io.StringIO(), width=300)
    goals.show(found, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_stale_rows_are_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = [r for goal in goals.GOALS for r in rows(goal, 3.0, ours_gflops=150.0)]
    assert {li.verdict for li in goals.lines(fresh)} == {MET}
    assert not any("stale" in text for text in printed(fresh))
    stale = [dataclasses.replace(r, sources="0" * 12) if r.suite == "model inference, eager" else r for r in fresh]
    marked = [text for text in printed(stale) if "stale" in text]
    assert len(marked) == 1
    assert "model inference, eager" in marked[0]
    assert "met, stale" in marked[0]
    path = tmp_path / "cpu-some-2026-01-02.csv"
    harness.write(stale, path)
    section = report.full([path]).partition("### Goals\n\n")[2]
    assert section.startswith(report.MARK)
    harness.write(fresh, path)
    assert report.without_mark(section) == report.full([path]).partition("### Goals\n\n")[2]


def test_the_report_has_the_goals_of_a_cpu_at_its_head(tmp_path: Path) -> None:
    found = [*rows(ATTENTION, 1.7), *rows(ATTENTION, 1.2, threads=2)]
    for name in ("cpu-some-2026-01-02.csv", "gpu-some-2026-01-02.csv"):
        harness.write(found, tmp_path / name)
    text = report.full([tmp_path / "cpu-some-2026-01-02.csv"])
    assert text.index("## \n\n### Goals\n\n| work |") < text.index("| work | dtype | against | 1 thread |")
    first = ATTENTION.cases[0]
    assert f"| attention forward | float32 | SDPA | 1 | 1.700 (1.6) | 1.700 (1.3) | {first} | – | met |" in text
    assert f"| attention forward | float32 | SDPA | 2 | 1.200 (1.6) | 1.200 (1.3) | {first} | – | missed |" in text
    # The share is another line of the same rows: half of the rate.
    assert f"| 1 | 50.0 % | 50.0 % (60 %) | {first} | – | missed |" in text
    assert text.count("| not measured, 0 of ") == 16
    assert "Of 20 lines 1 are met." in text
    # A GPU has goals of its own.
    assert "| geometric mean (goal) |" in text
    assert "| geometric mean (goal) |" not in report.full([tmp_path / "gpu-some-2026-01-02.csv"])
    assert "### Goals" not in report.table(tmp_path / "cpu-some-2026-01-02.csv")


def test_a_run_on_the_cpu_ends_with_the_goals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[runner.Options] = []

    def run(options: runner.Options, *args: Any) -> runner.Report:
        asked.append(options)
        return runner.Report(rows=rows(ATTENTION)[:2])

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(entry, "NARROWEST", 300)
    assert entry.main(["cpu", "--quick"]) == 0
    assert asked[0].quick
    shown = capsys.readouterr().out
    last = shown.rpartition("Goals")[2]
    assert "geometric mean (goal)" in last
    assert "not measured, 2 of 10 cases" in last
    assert last.count("not measured, 0 of ") == 8
    # A suite by itself has no goals to speak of.
    assert entry.main(["attention", "--device", "cpu"]) == 0
    assert "Goals" not in capsys.readouterr().out
