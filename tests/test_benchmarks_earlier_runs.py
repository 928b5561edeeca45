"""What several runs on one device add up to, how long each may take, and what a run leaves that is cut short."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import correctness, earlier_runs, gpu, harness, processes, roofline, runner, timers
from benchmarks.roofline import Machine

MACHINE = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0}, 10.0)
FIRST, SECOND = "B1 H2 N17 D16", "B1 H2 N33 D16"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "measure", lambda *args, **kwargs: MACHINE)
    # With everything imported that other tests import it takes a second, in each case.
    monkeypatch.setattr(timers, "gc", SimpleNamespace(collect=lambda: 0))
    count = iter(range(100))
    monkeypatch.setattr(
        roofline,
        "environment",
        lambda machines: {
            "commit": harness.commit(), "measured": f"run {next(count)}", "collect_env": {"torch": "2"},
            "sources": {name: harness.source_hash(name) for name in harness.SOURCES},
        },
    )  # fmt: skip
    monkeypatch.setattr(runner.cases, "TELLING", {"cpu": ((1, 2, 17, 16, False), (1, 2, 33, 16, False))})


def run(out: Path, words: str, **settings: Any) -> runner.Report:
    options = runner.Options(
        out=out, words=f"attention forward float32 packed {words}", threads=(1,), repeats=1, last_tier=0,
        suites=("attention",), **settings,
    )  # fmt: skip
    return runner.run(options, Console(file=io.StringIO()))


def side(report: runner.Report) -> dict[str, Any]:
    assert report.path is not None
    content: dict[str, Any] = json.loads(report.path.with_suffix(".json").read_text())
    return content


def test_what_was_not_timed_is_kept_until_its_case_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = runner.CONTESTS["attention"]

    def fail(*args: Any) -> Any:
        raise MemoryError("too large")

    monkeypatch.setitem(runner.CONTESTS, "attention", fail)
    first = run(tmp_path, FIRST)
    # Nothing was timed at all, and the reason is on disk.
    assert first.path is not None
    assert not first.path.exists()
    assert any("MemoryError: too large" in note for note in side(first)["not timed"])
    monkeypatch.setitem(runner.CONTESTS, "attention", contest)
    harness.write([], first.path.with_name(first.path.name.replace(first.path.stem[-10:], "2020-01-01")))
    second = run(tmp_path, SECOND)
    assert any(FIRST in note and "MemoryError" in note for note in side(second)["not timed"])
    third = run(tmp_path, FIRST)
    notes = side(third)["not timed"]
    assert not any("MemoryError" in note for note in notes)
    assert {FIRST, SECOND} <= {name for name in (FIRST, SECOND) if any(name in note for note in notes)}


def test_each_run_leaves_its_own_environment(tmp_path: Path) -> None:
    run(tmp_path, FIRST)
    # It measures nothing, and has no environment.
    run(tmp_path, FIRST)
    environments = side(run(tmp_path, SECOND))["facts"]["environment"]
    assert len(environments) == 2
    assert environments[0]["collect_env"] == {"torch": "2"}
    assert environments[1]["collect_env"] == f"as in the run of {environments[0]['measured']}"
    assert all("processors busy elsewhere" in environment for environment in environments)


def test_an_environment_of_the_first_files_becomes_the_first_of_the_list(tmp_path: Path) -> None:
    first = run(tmp_path, FIRST)
    content = side(first)
    content["facts"]["environment"] = content["facts"]["environment"][0]
    assert first.path is not None
    first.path.with_suffix(".json").write_text(json.dumps(content))
    assert len(side(run(tmp_path, SECOND))["facts"]["environment"]) == 2


def test_committed_rows_that_are_fresh_count_in_another_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed, out = tmp_path / "committed", tmp_path / "out"
    monkeypatch.setattr(harness, "RESULTS", committed)
    first = run(committed, FIRST)
    second = run(out, "")
    assert {row.case for row in second.rows} == {FIRST, SECOND}
    assert second.new == sum(row.case == SECOND for row in second.rows)
    assert [row for row in second.rows if row.case == FIRST] == first.rows
    assert {path.parent for path in committed.rglob("*.csv")} == {committed}
    # Of two rows of one work the newer counts, and a stale one never does.
    assert second.path is not None
    assert first.path is not None
    older = first.path.with_name(first.path.name.replace(first.path.stem[-10:], "2020-01-01"))
    harness.write([dataclasses.replace(row, ours_p50=9.0) for row in first.rows], older)
    second.path.unlink()
    assert 9.0 not in {row.ours_p50 for row in run(out, "").rows}
    harness.write([dataclasses.replace(row, sources="0" * 12) for row in first.rows], first.path)
    second.path.unlink()
    assert 9.0 in {row.ours_p50 for row in run(out, "").rows}


def test_a_reason_of_other_kernels_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = ["case A: cpu: cannot", "case A: SDPA: cannot", "case B: failed: MemoryError", "case A: triton: cannot"]
    before = [{"sources": {"cpu": "0" * 12, "triton": harness.source_hash("triton")}}]
    assert earlier_runs._standing(notes, before) == notes[1:]
    assert earlier_runs.merged(notes, {"case A"}, ["case A: cuda: no"]) == [
        "case A: cuda: no",
        "case B: failed: MemoryError",
    ]


def test_a_tree_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inside somebody else's repository, whose commit says nothing.
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(harness, "ROOT", tmp_path / "copy")
    monkeypatch.delenv("FASTVIT_COMMIT", raising=False)
    commit = harness.commit.__wrapped__
    assert commit() == "unknown"
    (tmp_path / "copy" / "COMMIT").write_text("abc1234+\n")
    assert commit() == "abc1234+"
    monkeypatch.setenv("FASTVIT_COMMIT", "def5678")
    assert commit() == "def5678"


def test_a_run_that_writes_its_results_leaves_the_commit_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "kernel.cu").write_text("one\n")
    git("add", "kernel.cu")
    git("commit", "-qm", "one")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.delenv("FASTVIT_COMMIT", raising=False)
    commit = harness.commit.__wrapped__
    clean = commit()
    assert len(clean) >= 7
    assert not clean.endswith("+")
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/cpu.csv").write_text("a row\n")
    (tmp_path / "README.md").write_text("a table\n")
    assert commit() == clean
    (tmp_path / "kernel.cu").write_text("two\n")
    assert commit() == clean + "+"


def test_known_faults_are_of_these_kernels_on_this_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, committed = tmp_path / "out", tmp_path / "committed"
    for folder in (out, committed):
        folder.mkdir()
    monkeypatch.setattr(harness, "RESULTS", committed)
    known = earlier_runs.Known.load(committed, "cpu")
    known.faults["case"] = "hangs"
    known.save()
    assert earlier_runs.Known.load(out, "cpu").faults == {"case": "hangs"}
    monkeypatch.setattr(roofline, "device_name", lambda device: "another")
    assert not earlier_runs.Known.load(out, "cpu").faults


# The suites' own process, with tiny cases, one of which never ends.
SUITES = f"""
import sys, time
from benchmarks import gpu, peers, roofline, runner
from benchmarks.roofline import Machine
runner.cases.TELLING = {{"cpu": ((1, 2, 17, 16, False), (1, 2, 33, 16, False))}}
runner.cases.QUICK = {{"cpu": ("{FIRST}", "{SECOND}")}}
roofline.measure = lambda *args, **options: Machine("cpu", "device", "avx2", 1, "driver", {{"float32": 100.0}}, 10.0)
roofline.environment = lambda machines: {{}}
peers.PEERS = {{"cpu": peers.PEERS["cpu"][:1]}}
contest = runner.CONTESTS["attention"]
runner.CONTESTS["attention"] = lambda work, *args: (
    time.sleep(600) if work.label.startswith("attention forward {FIRST}") else contest(work, *args)
)
sys.exit(gpu.main(sys.argv[1:]))
"""


def test_a_case_that_waits_for_ever_costs_its_patience_and_no_other_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def logged(command: list[str], *args: Any) -> int:
        return processes.logged([sys.executable, "-c", SUITES, *command[3:]], *args)

    monkeypatch.setattr(gpu, "logged", logged)
    monkeypatch.setattr(
        gpu, "patience", lambda label, all_peers: 1.0 if label.startswith(f"attention forward {FIRST}") else 300.0
    )
    command = ["--device", "cpu", "--quick", "--no-correctness", "--out", str(tmp_path), "--repeats", "1"]
    command += ["-k", "attention forward float32 packed B1"]
    assert gpu.main(command) == 1
    printed = capsys.readouterr().out
    assert printed.count("does a kernel wait for ever?; the suites go on without it") == 1
    (path,) = tmp_path.glob("cpu-*.csv")
    rows = harness.read(path)
    assert {row.case for row in rows if row.suite == "attention forward"} == {SECOND}
    # It was the first of all, and the others have their rows.
    assert {row.case for row in rows} == {FIRST, SECOND}
    (known,) = tmp_path.glob("*-known.json")
    assert [label for label in json.loads(known.read_text())["faults"] if FIRST in label]
    assert any(FIRST in note for note in json.loads(path.with_suffix(".json").read_text())["not timed"])
    assert "the suites go on" in (tmp_path / "gpu.log").read_text()


# Stands for a process of the suites: it begins a case, which goes on for longer than there is.
LAST_CASE = """
import json, sys, time
path = sys.argv[sys.argv.index("--suites") + 1]
content = json.load(open(path))
open(path, "w").write(json.dumps(content | {"running": "the last case"}))
time.sleep(60)
"""


def test_the_last_case_is_ended_with_the_budget_and_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    budgets = []

    def logged(command: list[str], seconds: float, *args: Any) -> int:
        budgets.append((float(command[command.index("--budget") + 1]), seconds))
        return processes.logged([sys.executable, "-c", LAST_CASE, *command[3:]], seconds, *args)

    monkeypatch.setattr(gpu, "logged", logged)
    start = time.monotonic()
    assert gpu.main(["--device", "cpu", "--no-correctness", "--out", str(tmp_path), "--budget", "2"]) == 0
    assert 1.5 < time.monotonic() - start < 10
    assert "the budget was spent in the last case: it is for the next run" in capsys.readouterr().out
    assert not earlier_runs.Known.load(tmp_path, "cpu").faults
    # No case is begun so late that it is sure to be ended.
    assert all(begin < end for begin, end in budgets)


def test_everything_together_keeps_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = [1000.0], {}

    def take(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + seconds
        now[0] += seconds

    def logged(command: list[str], seconds: float, *args: Any) -> int:
        take(command[2], seconds)
        return processes.TOO_LONG

    def captured(command: list[str], seconds: float, *args: Any) -> tuple[int, str]:
        built = "setup.py" in command
        take("build" if built else "sanitizer", 100.0 if built else seconds)
        return (0 if built else processes.TOO_LONG), ""

    def check(backend: str, device: str, path: Path, seconds: float, log: Path) -> Any:
        take("correctness", seconds)
        return set(), {"cases": 0, "cannot": 0, "not reached": 9, "misses": [], "red": []}

    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "logged", logged)
    monkeypatch.setattr(processes, "captured", captured)
    monkeypatch.setattr(correctness, "run", check)
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: name)
    monkeypatch.setattr(roofline, "device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert gpu.main(["--out", str(tmp_path), "--budget", "480"]) == 0
    assert now[0] - 1000.0 <= 480.0 + 1e-6
    # Whatever comes before, most of what the build leaves is for speed; the forms come where there is time for them.
    assert spent["benchmarks.gpu"] > 0.4 * (480 - spent["build"])
    assert "benchmarks.cuda_forms" not in spent
    assert gpu.main(["--out", str(tmp_path), "--budget", "900"]) == 0
    assert spent["benchmarks.cuda_forms"] > gpu.FORMS_LEAST


def test_a_correctness_case_in_which_the_time_is_up_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.jsonl"
    base = correctness.stamp("cpu", "cpu") | {"op": "attention", "dtype": "float32", "state": "began"}

    def process(ended: int) -> Any:
        def logged(*args: Any, **options: Any) -> int:
            with open(path, "a") as file:
                file.write(json.dumps(base | {"case": f"case {ended}"}) + "\n")
            return ended

        return logged

    monkeypatch.setattr(correctness.processes, "logged", process(processes.TOO_LONG))
    red, figures = correctness.run("cpu", "cpu", path, 60.0, tmp_path / "log")
    assert not red
    assert figures["cases"] == 0
    monkeypatch.setattr(correctness.processes, "logged", process(processes.STUCK))
    red, figures = correctness.run("cpu", "cpu", path, 60.0, tmp_path / "log")
    assert ("cpu", "attention forward", "float32") in red
    assert figures["cases"] == 1


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    program = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep({})"
    for seconds, ended in ((0, 0), (600, processes.TOO_LONG)):
        log = tmp_path / f"{seconds}.log"
        begin = time.monotonic()
        assert processes.logged([sys.executable, "-c", program.format(seconds)], 5.0, log, quiet=True) == ended
        assert time.monotonic() - begin < 15
        status = Path(f"/proc/{log.read_text().strip()}/stat")
        end = time.monotonic() + 10
        # A signal takes a moment; without a parent that reaps it, it stays listed.
        while status.exists() and status.read_text().split(") ")[1][0] != "Z":
            assert time.monotonic() < end
            time.sleep(0.01)
    assert processes.logged(["sleep", "600"], 60.0, tmp_path / "log", stuck=lambda: True) == processes.STUCK


def test_an_interrupt_is_passed_on_and_the_process_writes_its_last_words(tmp_path: Path) -> None:
    child = (
        "import time\ntry:\n    print('up', flush=True); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('last')"
    )
    # A shell's background job ignores the interrupt, and so would all that it starts.
    parent = (
        "import signal, sys; from pathlib import Path; from benchmarks.processes import logged\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"try:\n    logged([sys.executable, '-c', {child!r}], 60.0, Path({str(tmp_path / 'log')!r}))\n"
        "except KeyboardInterrupt:\n    sys.exit(130)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=harness.ROOT, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(harness.ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(2)
        assert process.wait(timeout=60) == 130
        assert process.stdout.read() == "last\n"
