"""benchmarks/quiet.py, and what a round of samples is worth that others' work ran through."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import harness, quiet, timers
from benchmarks.roofline import Machine
from benchmarks.timers import Entry


def test_a_yardstick_that_takes_longer_than_its_best_has_company(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = quiet.Quiet(1)
    assert 0 < yardstick.best < 1
    monkeypatch.setattr(yardstick, "best", 1e-3)
    for seconds, is_quiet in ((1e-3, True), (1.2e-3, True), (1.3e-3, False), (0.5e-3, True), (0.7e-3, False)):
        monkeypatch.setattr(yardstick, "_seconds", lambda seconds=seconds: seconds)
        assert yardstick() is is_quiet, seconds
    assert yardstick.best == 0.5e-3
    # Of two the better: an interrupt is nobody's work.
    times = iter((1.0, 0.5e-3))
    monkeypatch.setattr(yardstick, "_seconds", lambda: next(times))
    assert yardstick()


def test_it_may_be_made_in_one_mode_and_asked_in_another() -> None:
    with torch.inference_mode():
        yardstick = quiet.Quiet(1)
    yardstick()
    with torch.no_grad():
        yardstick()


def test_waiting_ends_with_the_patience_or_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = quiet.Quiet(1)
    monkeypatch.setattr(yardstick, "_seconds", lambda: 1.0)
    monkeypatch.setattr(yardstick, "best", 0.1)
    assert 0.05 <= yardstick.wait(0.05) < 2
    answers = iter([False, False, True])
    monkeypatch.setattr(quiet.Quiet, "__call__", lambda self: next(answers))
    assert yardstick.wait(60) < 30
    assert next(answers, None) is None


class Neighbour:
    """A yardstick that says what it is told, and waits for nobody."""

    def __init__(self, after_rounds: list[bool]) -> None:
        self.answers = iter(after_rounds)

    def __call__(self) -> bool:
        return next(self.answers)

    def wait(self, patience: float) -> float:
        return 0.0


def measured(monkeypatch: pytest.MonkeyPatch, answers: list[bool], patience: float) -> tuple[timers.Times, int]:
    """Return three samples of a call that sleeps, and how often it was called for them."""
    monkeypatch.setattr(quiet, "of_threads", lambda threads: Neighbour(answers))
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(2 * timers.SHORTEST_SAMPLE)

    times, _ = timers.measure([Entry("a", lambda: call)], 3, "cpu", patience)
    return times["a"], calls - timers.WARM_UPS - 1


def test_rounds_that_others_ran_through_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = measured(monkeypatch, [True, False, False, True, True], 60.0)
    assert (len(times.samples), times.disturbed, calls) == (3, 0, 5)


def test_patience_ends_and_what_was_taken_then_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = measured(monkeypatch, [True, False, False, False], 1e-6)
    # The second round spends the patience; it is taken again, and from then on all count.
    assert (len(times.samples), times.disturbed, calls) == (3, 2, 4)
    times, _ = measured(monkeypatch, [], 0.0)
    assert (len(times.samples), times.disturbed) == (3, 0)


def test_a_case_that_was_disturbed_for_the_most_part_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("cpu", "a", "b", 1, "", {}, 1.0)
    contest = harness.Contest(
        "suite", "case", torch.float32, (Entry("cpu", lambda: lambda: None),), (Entry("peer", lambda: lambda: None),),
        {"cpu": 0.5},
    )  # fmt: skip
    for disturbed, noted in ((5, False), (6, True)):

        def measure(entries: list[Entry], *_: object, disturbed: int = disturbed) -> tuple[dict, dict]:
            return {entry.name: timers.Times([1.0] * 10, disturbed=disturbed) for entry in entries}, {}

        monkeypatch.setattr(timers, "measure", measure)
        notes = harness.run(contest, machine, 10).notes
        assert any("6 of 10 samples others used the processor" in note for note in notes) is noted
