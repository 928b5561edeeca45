"""fastvit check and env, and what all commands share: what they print, write and refuse."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cuda_resources
from fastvit.cli import main
from fastvit.commands import DTYPES, check, make_console, write_json
from fastvit.kernels import cuda, native
from fastvit.ops import backends
from tests.commands import CONTROL, assert_finite, error_line, plain_terminal, plant_wrong_attention

needs_cpu_kernels = pytest.mark.skipif(native.load_error() is not None, reason="fastvit._C is not built")
BACKENDS = list(backends.BACKENDS)


@pytest.fixture(autouse=True)
def plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_terminal(monkeypatch)


class TestCheck:
    @needs_cpu_kernels
    def test_quick_passes(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "--quick", "--device", "cpu", "--json", str(tmp_path / "check.json")]) == 0
        output = capsys.readouterr().out
        figures = json.loads((tmp_path / "check.json").read_text())
        assert_finite(figures)
        rows = figures["rows"]
        assert {row["backend"] for row in rows} == {"cpu", "reference"}
        assert {row["dtype"] for row in rows} == set(DTYPES)
        assert {row["op"] for row in rows} == {"attention", "patch_embed"}
        assert {row["verdict"] for row in rows} == {"pass"}
        assert figures["summary"]["worst_ratio"] == max(row["ratio"] for row in rows)
        assert any(row["tensor"].startswith("grad_") for row in rows)
        assert {line["backend"] for line in figures["not_run"]} == {"triton", "cuda"}
        assert re.search(rf"^{len(rows)} cases, worst ratio 0\.\d\d of what is allowed: pass", output, re.MULTILINE)
        assert not CONTROL.search(output)
        assert "only CUDA tensors" in output

    def test_a_backend_is_asked_about_the_dtypes_that_are_checked(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        # As on a GPU: what is left are its reasons against float32.
        monkeypatch.setattr(cuda, "_device_why_not", lambda device: [])
        device, all_dtypes = torch.device("cpu"), list(DTYPES.values())
        for dtypes in (all_dtypes, [torch.bfloat16]):
            assert check._who_runs("cuda", [device], dtypes) == ([("cuda", device)], [])
            assert ("cuda", device) in check._who_runs(None, [device], dtypes)[0]
        line = error_line(capsys, "check", "--backend", "cuda", "--dtype", "float32", "--device", "cpu")
        assert "dtype torch.float32: only float16 and bfloat16" in line

    def test_a_planted_wrong_kernel_misses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant_wrong_attention(monkeypatch)
        arguments = ["check", "--quick", "--backend", "reference", "--dtype", "float32", "--device", "cpu"]
        assert main([*arguments, "--json", str(tmp_path / "check.json")]) == 1
        figures = json.loads((tmp_path / "check.json").read_text())
        verdicts = {(row["op"], row["verdict"]) for row in figures["rows"]}
        assert verdicts == {("attention", "MISS"), ("patch_embed", "pass")}
        assert not figures["summary"]["passed"]
        assert "of what is allowed: MISS" in capsys.readouterr().out

    def test_a_kernel_that_raises_is_reported(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from fastvit.kernels import reference

        def broken(*_: Any) -> None:
            raise RuntimeError("no such\ninstruction")

        monkeypatch.setattr(reference, "patch_embed_forward", broken)
        assert main(["check", "--quick", "--backend", "reference", "--dtype", "bfloat16", "--device", "cpu"]) == 1
        assert "errors, worst ratio" in " ".join(capsys.readouterr().out.split())

    def test_what_one_case_cannot_run_is_skipped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fastvit.kernels import reference

        monkeypatch.setattr(reference, "attention_why_not", lambda spec: ["head_dim 64: at most 32"])
        case = check._cases([torch.float32], quick=True)[0]
        row = check._run_one(case, "reference", torch.device("cpu"))
        assert (row.verdict, row.reason, row.ratio) == ("skipped", "head_dim 64: at most 32", None)

    def test_nothing_measured_is_no_pass(self) -> None:
        assert not check._summary([])["passed"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--backend", "cuda"], "--backend: got 'cuda', which cannot run here (on cpu: "),
            (["--backend", "tpu"], "--backend: got 'tpu'; accepted are cpu, triton, cuda, reference"),
            (["--dtype", "int8"], "--dtype: got 'int8'; accepted are float32, float16, bfloat16"),
            (["--json", "/nowhere/at/all.json"], "--json: got '/nowhere/at/all.json'"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        line = error_line(capsys, "check", "--device", "cpu", *arguments)
        assert line.startswith("fastvit check: ")
        assert message in line


class TestEnv:
    def test_json_on_stdout(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env", "--json"]) == 0
        output, error = capsys.readouterr()
        figures = json.loads(output)
        assert_finite(figures)
        assert figures["versions"]["torch"]
        assert figures["backends"][0]["device"] == "cpu"
        assert [line["backend"] for line in figures["backends"][0]["ops"]["attention"]] == BACKENDS
        assert [place["backend"] for place in figures["backends"][0]["automatic_order"]][-1] == "reference"
        assert "Backends on cpu" in error

    @needs_cpu_kernels
    def test_how_many_cuda_kernels_were_built(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["env", "--json"]) == 0
        built = json.loads(capsys.readouterr().out)["built"]
        count, words = built["cuda kernels"].split(maxsplit=1)
        assert int(count) == len(cuda.built_kernels())
        if built["cuda architectures"].startswith("none"):
            assert (count, words) == ("0", "instantiations, by nvcc (none)")
            return
        assert int(count) == len({row.kernel for row in cuda_resources.read()})
        assert re.fullmatch(r"instantiations, by nvcc \d+\.\d+\.\d+", words)

    @pytest.mark.parametrize("absent", ["fastvit._C", "triton", "timm"])
    def test_without(self, absent: str) -> None:
        code = f"import sys; sys.modules[{absent!r}] = None; from fastvit.cli import main; main(['env', '--json'])"
        given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, check=False)
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        lines = {line["backend"]: line for line in figures["backends"][0]["ops"]["attention"]}
        assert lines["reference"]["can_run"]
        if absent == "fastvit._C":
            assert figures["built"]["fastvit._C"].startswith("not usable: fastvit._C cannot be imported")
            assert lines["cpu"]["why_not"][0].startswith("fastvit._C cannot be imported")
            assert lines["reference"]["automatic"]
        if absent == "triton":
            assert lines["triton"]["why_not"][0].startswith("triton cannot be imported")


class TestCommand:
    @pytest.mark.parametrize(("arguments", "given"), [([], "nothing"), (["demmo"], "'demmo'")])
    def test_no_such_command(self, arguments: list[str], given: str, capsys: pytest.CaptureFixture[str]) -> None:
        expected = f"fastvit: command: got {given}; accepted are demo, check, env (fastvit --help)"
        assert error_line(capsys, *arguments) == expected

    def test_module_and_help(self) -> None:
        done = subprocess.run([sys.executable, "-m", "fastvit", "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        for command in ("demo", "check", "env"):
            assert command in done.stdout

    def test_nothing_heavy_is_imported_for_help(self) -> None:
        code = (
            "import sys; from fastvit.cli import _parser; _parser().format_help(); "
            "print([m for m in ('timm', 'matplotlib', 'skimage', 'rich.table', 'triton') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from fastvit.commands import env

        def interrupt() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(env, "environment", interrupt)
        assert main(["env"]) == 130
        assert capsys.readouterr() == ("", "")

    def test_figures_that_are_not_finite_stay_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        write_json({"ratio": math.inf, "rows": [(math.nan, 1.0)]}, "-")
        assert json.loads(capsys.readouterr().out) == {"ratio": "inf", "rows": [["nan", 1.0]]}

    @pytest.mark.parametrize(("columns", "width"), [("80", 120), ("150", 150)])
    def test_a_pipe_is_wide(self, columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        assert make_console(None).width == width
