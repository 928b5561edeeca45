"""``make gpu`` without a GPU: what it says, and everything of it that can be rehearsed on a CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, correctness, gpu, harness, roofline, runner, timers
from benchmarks.earlier_runs import Known
from benchmarks.roofline import Machine
from benchmarks.timers import Entry
from fastvit.testing import AttentionCase, PatchEmbedCase, check_attention, check_patch_embed
from tests.faked_cuda import fake_cuda

MACHINE = Machine("cpu", "device", "avx2", 2, "driver", {"float32": 100.0}, 10.0)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    # As from a shell, also where make runs this test, with arguments of its own.
    of_make = ("MAKELEVEL", "MAKEFLAGS", "MFLAGS", "ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    result = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", f"VENV={tmp_path}", f"OUT={tmp_path / 'out'}"],
        cwd=harness.ROOT, capture_output=True, text=True, check=False,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "LC_ALL": "C"},
    )  # fmt: skip
    assert result.stdout == "make gpu: torch finds no CUDA device on this machine; nothing was run\n"
    # GNU make cannot exit 3: it says that the command did, and exits 2.
    assert re.fullmatch(r"make: \*\*\* \[.*gpu\] Error 3\n", result.stderr)
    assert result.returncode == 2
    assert not (tmp_path / "out").exists()


def test_the_build_is_for_this_architecture_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [gpu.architecture(pair) for pair in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["8.0", "8.9", "9.0a", "10.0"]
    seen: dict[str, Any] = {}

    def fake(command: list[str], seconds: float, log: Path, variables: dict[str, str]) -> Any:
        seen.update(command=command, variables=variables)
        return 1, "no nvcc"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu.processes, "captured", fake)
    assert gpu.build(60.0, tmp_path / "log")["error"] == "no nvcc"
    assert seen["variables"]["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    assert "build_ext" in seen["command"]


def test_a_build_without_nvcc_is_no_build_for_the_cpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    before = sorted((path, path.stat().st_mtime_ns) for path in (harness.ROOT / "fastvit").glob("_C.*"))
    figures = gpu.build(120.0, tmp_path / "log")
    assert "nvcc was not found" in figures["error"]
    assert "nvcc was not found" in (tmp_path / "log").read_text()
    assert sorted((path, path.stat().st_mtime_ns) for path in (harness.ROOT / "fastvit").glob("_C.*")) == before


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo '========= ERROR SUMMARY: 0 errors'; exit 0", "clean: ERROR SUMMARY: 0 errors"),
        ("echo '========= ERROR SUMMARY: 1 error'; exit 9", "FOUND: ERROR SUMMARY: 1 error"),
        ("echo 'Device not supported'; exit 9", "could not run here"),
        ("exit 1", "could not run here: exit status 1"),
        # What the tool has started keeps its pipe: it has to end as well.
        ("sleep 60 & wait", "not finished after 0"),
    ],
)
def test_only_a_finding_of_the_sanitizer_is_a_finding(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu.sanitize(0.4 if "sleep" in script else 60.0, tmp_path / "log", Known(tmp_path / "known.json", {}))
    assert set(found) == {"memcheck", "racecheck"}
    assert all(text.startswith(said) for text in found.values()), found


def test_what_a_sanitizer_has_said_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, calls = tmp_path / "compute-sanitizer", tmp_path / "calls"
    # The caching allocator would hide a byte past the end of a tensor.
    script = f'echo "$2 $PYTORCH_NO_CUDA_MEMORY_CACHING" >> {calls}; echo "ERROR SUMMARY: 0 errors"; [ $2 = memcheck ]'
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for _ in range(2):
        found = gpu.sanitize(60.0, tmp_path / "log", Known.load(tmp_path, "cpu"))
        assert found["memcheck"] == "clean: ERROR SUMMARY: 0 errors"
        assert found["racecheck"].startswith("could not run here")
    # Only what was finished is remembered, and only for these kernels.
    assert calls.read_text().split("\n")[:-1] == ["memcheck 1", "racecheck 1", "racecheck 1"]
    monkeypatch.setattr(harness, "source_hash", lambda backend="cpu": "0" * 12)
    gpu.sanitize(60.0, tmp_path / "log", Known.load(tmp_path, "cpu"))
    assert calls.read_text().count("memcheck") == 2


def test_what_comes_behind_the_suites_is_kept_beside_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gpu._parse(["--device", "cpu", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu.roofline, "device_name", lambda device: "Some Device")
    gpu.add_fact(options, "sanitizer", {"memcheck": "clean"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "cpu-some-device-2026-01-02.csv").touch()
    side = tmp_path / "cpu-some-device-2026-01-02.json"
    side.write_text(json.dumps({"facts": {"build": 1}, "ended": "finished"}))
    gpu.add_fact(options, "sanitizer", {"memcheck": "clean"})
    assert json.loads(side.read_text()) == {
        "facts": {"build": 1, "sanitizer": {"memcheck": "clean"}},
        "ended": "finished",
    }


def test_the_sanitizer_may_be_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path: None)
    assert gpu.unsanitized(Known(tmp_path / "known.json", {})) == []
    assert gpu.sanitize(1.0, tmp_path / "log", Known(tmp_path / "known.json", {})) == {
        "compute-sanitizer": "was found neither on PATH nor in the toolkit"
    }
    compile(gpu.SANITIZED, "program", "exec")


def test_the_sanitizer_of_the_toolkit_is_found_without_it_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/compute-sanitizer"
    program.write_text('#!/bin/sh\necho "ERROR SUMMARY: 0 errors"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = gpu.sanitize(60.0, tmp_path / "log", Known(tmp_path / "known.json", {}))
    assert found == dict.fromkeys(("memcheck", "racecheck"), "clean: ERROR SUMMARY: 0 errors")
    known = Known(tmp_path / "known.json", {})
    assert gpu.unsanitized(known) == ["memcheck", "racecheck"]
    known.checks[gpu.sanitizer_check("racecheck")] = "clean"
    assert gpu.unsanitized(known) == ["memcheck"]


def few_cases() -> list[correctness.Case]:
    attention = AttentionCase(1, 1, 9, 9, 8, 8, torch.float32)
    patches = PatchEmbedCase(1, 3, (2, 2), (4, 4), 8)
    return [
        ("attention", "D8", "a", torch.float32, lambda backend, device: check_attention(attention, backend, device)),
        ("patch_embed", "", "b", torch.float32, lambda backend, device: check_patch_embed(patches, backend, device)),
    ]


def test_correctness_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    monkeypatch.setattr(correctness, "cases", few_cases)
    correctness.work_off("cpu", "cpu", path, -1.0)
    assert not correctness.finished(path, "cpu", "cpu")
    correctness.work_off("cpu", "cpu", path, 60.0)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["began", "ran"] * 2
    correctness.work_off("cpu", "cpu", path, 60.0)
    assert path.read_text().splitlines() == lines
    # Other sources: nothing of it counts.
    monkeypatch.setattr(harness, "source_hash", lambda backend="cpu": "0" * 12)
    assert not correctness.finished(path, "cpu", "cpu")


def test_a_backend_that_is_not_built_leaves_no_case_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.jsonl"
    monkeypatch.setattr(correctness, "cases", few_cases)
    correctness.work_off("cuda", "cpu", path, 60.0)
    assert not path.exists()
    assert "cuda cannot run here: device cpu: only CUDA tensors" in capsys.readouterr().out


def test_faults_are_tried_again_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    states: list[dict[str, Any]] = [
        {"state": "began"},
        {"state": "ran", "ratios": {"output": 0.5}},
        {"state": "ran", "ratios": {"output": 1.5}},
        {"state": "ran", "ratios": {"output": float("nan")}},
        {"state": "failed"},
        {"state": "died"},
    ]
    path.write_text("".join(json.dumps(state) + "\n" for state in states) + '{"cut o')
    correctness.forget_faults(path)
    assert path.read_text() == json.dumps(states[1]) + "\n"


def test_red_kernels_are_named_one_by_one() -> None:
    common: dict[str, Any] = {"op": "attention", "dtype": "bfloat16"}
    entries: dict[str, dict[str, Any]] = {
        "good": common | {"state": "ran", "ratios": {"output": 0.5, "lse": 1.0, "grad_query": 0.9}},
        "backward is wrong": common | {"state": "ran", "ratios": {"output": 0.5, "grad_query": 1.01}},
        "cannot": common | {"state": "cannot", "dtype": "float32"},
        "died": {"op": "patch_embed", "dtype": "float16", "state": "began"},
    }
    red, figures = correctness.judge(entries, "cuda")
    assert red == {
        ("cuda", "attention backward", "bfloat16"),
        ("cuda", "patch_embed forward", "float16"),
        ("cuda", "patch_embed backward", "float16"),
    }
    assert figures["cannot"] == 1
    assert len(figures["misses"]) == 2
    nan = {"x": common | {"state": "ran", "ratios": {"output": float("nan")}}}
    assert correctness.judge(nan, "cuda")[0] == {("cuda", "attention forward", "bfloat16")}


def test_a_process_that_dies_leaves_its_case_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.jsonl"
    stamp, states = correctness.stamp("cpu", "cpu"), iter((["a", "ran"], ["b", ""], ["c", "ran"]))

    def process(*args: Any, **options: Any) -> int:
        name, state = next(states, ("", ""))
        if not name:
            return 0
        base = stamp | {"case": name, "op": "attention", "dtype": "float32"}
        with open(path, "a") as file:
            file.write(json.dumps(base | {"state": "began"}) + "\n")
            if state:
                file.write(json.dumps(base | {"state": state, "ratios": {"output": 0.5}}) + "\n")
            # What a process leaves that is ended while it writes.
            file.write("" if state else '{"case": "b", "sta\n')
        return -11

    monkeypatch.setattr(correctness.processes, "logged", process)
    red, figures = correctness.run("cpu", "cpu", path, 60.0, tmp_path / "log")
    assert red == {("cpu", "attention forward", "float32"), ("cpu", "attention backward", "float32")}
    assert figures["cases"] == 3
    assert "died" in figures["misses"][0]


def work(suite: str, kind: str, dtype: torch.dtype = torch.bfloat16) -> cases.Work:
    return cases.Work(suite, "case", dtype, 0, kind, None)


def test_a_red_kernel_stops_its_own_speed_alone() -> None:
    red = {("cuda", "attention backward", "bfloat16"), ("triton", "patch_embed forward", "float16")}
    assert runner.is_red("cuda", work("attention backward", "attention"), red)
    assert runner.is_red("cuda", work("attention forward + backward, bias", "attention"), red)
    assert runner.is_red("cuda", work("model training step, eager", "models"), red)
    assert runner.is_red("triton", work("model inference, eager", "models", torch.float16), red)
    assert not runner.is_red("cuda", work("attention forward", "attention"), red)
    assert not runner.is_red("cuda", work("attention backward", "attention", torch.float16), red)
    assert not runner.is_red("triton", work("attention backward", "attention"), red)
    assert not runner.is_red("cuda", work("model inference, eager", "models"), red)


def test_what_a_backend_could_not_do_comes_last_and_not_what_a_peer_could_not() -> None:
    first, *_ = cases.select("cuda", words="attention forward")
    for name, last in (("triton", True), ("cuda", True), ("FlexAttention", False), ("SDPA flash", False)):
        notes = ["another case: cuda: out of memory", f"{first.label}: {name}: out of memory"]
        assert runner._has_failed(first, notes, runner.BACKENDS["cuda"]) is last
    # It was not built then.
    notes = [f"{first.label}: cuda: RuntimeError: backend 'cuda' cannot run this call."]
    assert not runner._has_failed(first, notes, runner.BACKENDS["cuda"])


def test_a_miss_at_one_head_dim_is_about_its_kernels_alone() -> None:
    ran = {"state": "ran", "ratios": {"output": 1.5}, "op": "attention", "dtype": "bfloat16", "part": "D104"}
    red, _ = correctness.judge({"a": ran, "b": ran | {"part": "D80"}}, "cuda")
    assert red == {("cuda", "attention forward D104", "bfloat16"), ("cuda", "attention forward D80", "bfloat16")}
    stopped = [work.label for work in cases.select("cuda", last_tier=2) if runner.is_red("cuda", work, red)]
    assert any("vit_huge" in label for label in stopped)
    assert all(" D80 bfloat16" in label or "vit_huge" in label for label in stopped), stopped
    died, _ = correctness.judge({"a": ran | {"state": "died"}}, "cuda")
    assert runner.is_red("cuda", work("attention forward", "attention"), died)


@pytest.fixture
def rehearsal(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Have the processes of ``make gpu`` run in this one, and return their arguments."""
    started: list[list[str]] = []

    def process(command: list[str], seconds: float, log: Path, stuck: Any = None) -> int:
        assert command[:3] == [sys.executable, "-m", "benchmarks.gpu"]
        started.append(command[3:])
        return gpu.main(command[3:])

    monkeypatch.setattr(gpu, "logged", process)
    monkeypatch.setattr(timers, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(
        roofline, "measure", lambda *args, **kwargs: dataclasses.replace(MACHINE, threads=torch.get_num_threads())
    )
    monkeypatch.setattr(runner.cases, "PATCHES", {"cpu": ((1, 32, 16, 24),)})
    monkeypatch.setattr(runner, "REPEATS", {"cpu": 1})
    telling = {"cpu": ((1, 2, 17, 16, False), (1, 2, 33, 16, False))}
    monkeypatch.setattr(runner.cases, "TELLING", telling)
    monkeypatch.setattr(runner.cases, "QUICK", {"cpu": ("B1 H2 N17 D16", "B1 H2 N33 D16", "B1 32² P16 D24")})
    return started


def test_a_rehearsal_leaves_rows_environment_and_what_was_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rehearsal: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    red = {("cpu", "attention forward", "float32")}
    monkeypatch.setattr(
        correctness,
        "run",
        lambda backend, *args: (red, {"cases": 1, "cannot": 0, "not reached": 0, "misses": ["x"], "red": []}),
    )
    command = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--budget", "100"]
    # A red kernel makes the status 1, and the others are measured all the same.
    assert gpu.main(command) == 1
    (path,) = tmp_path.glob("cpu-*.csv")
    rows = harness.read(path)
    # Of attention in float32 there is nothing; the other kernels have their rows.
    others = {"patch_embed forward", "patch_embed forward + backward"}
    assert {row.suite for row in rows if row.dtype == "float32"} == others
    assert {row.dtype for row in rows if row.suite == "attention forward"} == {"bfloat16", "float16"}
    side = json.loads(path.with_suffix(".json").read_text())
    assert side["facts"]["correctness"]["cpu"]["misses"] == ["x"]
    assert side["facts"]["environment"][0]["collect_env"]["torch_version"] == torch.__version__
    assert any("missed the rule on this device" in note for note in side["not timed"])
    assert "red, so its speed is not measured: cpu attention forward float32" in capsys.readouterr().out
    # Mended: the next run measures what is missing, and nothing twice.
    red.clear()
    assert gpu.main(command) == 0
    again = harness.read(path)
    assert {row.suite for row in again if row.dtype == "float32"} >= {"patch_embed forward", "attention forward"}
    assert [row for row in again if row in rows] == rows
    assert not (tmp_path / "gpu-state.json").exists()


def test_the_suites_go_on_behind_a_case_that_lost_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rehearsal: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    running: list[str] = []
    measure = runner.measure_one

    def one(work: cases.Work, *args: Any) -> harness.Outcome:
        running.append(work.label)
        return measure(work, *args)

    monkeypatch.setattr(runner, "measure_one", one)
    monkeypatch.setattr(runner, "is_lost", lambda device: "N33" in running[-1])
    command = ["--device", "cpu", "--quick", "--no-correctness", "--out", str(tmp_path), "-k", "attention float32"]
    assert gpu.main(command) == 1
    lost = [label for label in running if "N33" in label]
    assert len(rehearsal) == len(lost) + 1
    assert len(set(lost)) == len(lost) > 0
    (path,) = tmp_path.glob("cpu-*.csv")
    rows = harness.read(path)
    assert rows
    assert not any("N33" in row.case for row in rows)
    assert "the suites go on without it" in capsys.readouterr().out
    # The next run knows them, and says so; --again tries them.
    running.clear()
    monkeypatch.setattr(runner, "is_lost", lambda device: False)
    assert gpu.main(command) == 1
    assert not running
    assert f"{lost[0]}: its process was lost in it (exit status 4), so it is skipped" in capsys.readouterr().out
    notes = json.loads(path.with_suffix(".json").read_text())["not timed"]
    assert [note for note in notes if "its process was lost" in note and note.startswith(lost[0])]
    assert gpu.main([*command, "--again"]) == 0
    assert set(running) > set(lost)
    assert gpu.main(command) == 0
    seen: list[runner.Options] = []
    monkeypatch.setattr(runner, "run", lambda options, facts: seen.append(options) or runner.Report())
    gpu.main([*command, "--all-peers"])
    gpu.main(command)
    assert [options.all_peers for options in seen] == [True, False]


def test_a_process_is_logged_and_one_that_waits_for_ever_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    program = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    assert gpu.logged([sys.executable, "-c", program], 60.0, log) == 7
    assert sorted(log.read_text().split()) == ["err", "out"]
    assert sorted(capsys.readouterr().out.split()) == ["err", "out"]
    start = time.monotonic()
    assert gpu.logged(["sleep", "60"], 0.2, log) == gpu.TOO_LONG
    assert time.monotonic() - start < 30


def test_on_a_device_each_replay_has_a_cold_cache_and_entries_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    fake_cuda(monkeypatch, log)

    def call(name: str) -> Any:
        return lambda: lambda: log.append(name)

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    entries = [
        Entry("a", call("a")),
        Entry("b", call("b")),
        Entry("c", lambda: too_large),
        Entry("d", call("d"), graph=False),
    ]
    times, absent = timers.measure(entries, 4, "cuda")
    assert absent == {"c": "OutOfMemoryError: CUDA out of memory"}
    timed = log[log.index("flush") :]
    # Sample by sample: a's graph (and its eager call in each third sample), then b's, then d without a graph. An eager
    # call begins when the flush has ended, or the host would be ahead of the device.
    both = [
        *("flush", "replay a", "flush", "idle", "a", "flush", "replay b", "flush", "idle", "b", "flush", "idle", "d")
    ]
    graphs = ["flush", "replay a", "flush", "replay b", "flush", "idle", "d"]
    assert timed == [*both, *graphs * 2, *both, "idle"]
    assert [(times[name].clock, len(times[name].samples), len(times[name].eager)) for name in "abd"] == [
        ("graph", 4, 2), ("graph", 4, 2), ("events", 4, 4),
    ]  # fmt: skip
    assert times["a"].mib == 3.0
