"""fastvit demo: what it measures, shows, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastvit.commands.demo as demo
import fastvit.commands.subject as subjects
from fastvit.cli import _parser, main
from fastvit.commands import quiet, timing
from fastvit.commands.timing import Clock, _own_seconds, race
from fastvit.kernels import native
from fastvit.ops import backends
from tests.commands import CONTROL, assert_finite, error_line, plain_terminal, plant_wrong_attention

timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("skimage")
needs_cpu_kernels = pytest.mark.skipif(native.load_error() is not None, reason="fastvit._C is not built")

MODEL = "vit_tiny_patch16_224"
BACKENDS = list(backends.BACKENDS)


@pytest.fixture(autouse=True)
def plain_output(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_terminal(monkeypatch)


def run_demo(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    file = out / "figures.json"
    given = ["demo", "--model", MODEL, "--device", "cpu", "--threads", "1", "--repeats", "3", "--out", str(out)]
    status = main([*given, "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("demo")
    return *run_demo(out, "--batch", "2"), out


class TestDemo:
    def test_figures(self, shown: tuple[int, dict[str, Any], Path]) -> None:
        status, figures, _ = shown
        assert status == 0
        assert_finite(figures)
        assert [race["name"].split(" (")[0] for race in figures["times"]] == [
            "whole model", "attention layer", "attention core", "patch embedding",
        ]  # fmt: skip
        for one in figures["times"]:
            assert one["ratio"] == pytest.approx(one["pytorch_ms"]["p50"] / one["fastvit_ms"]["p50"])
            for times in (one["pytorch_ms"], one["fastvit_ms"]):
                assert 0 < times["p20"] <= times["p50"] <= times["p80"]
                assert times["rounds"] == 3
        assert figures["images"] == [2, 3, 224, 224]
        assert figures["weights"] == "random (seed 0)"
        assert figures["threads"] == 1
        assert figures["versions"]["torch"] == torch.__version__.split("+")[0]

    def test_errors_follow_the_rule(self, shown: tuple[int, dict[str, Any], Path]) -> None:
        errors = {error["name"]: error for error in shown[1]["errors"]}
        assert list(errors) == ["logits", "attention core, last layer", "patch embedding"]
        for error in errors.values():
            assert 0 < error["torch_error"] < 1e-4
            assert error["passed"] == (error["ratio"] <= 1)
            # One rounding is at most half an ulp of the expected value, and the worst coordinate need not be the
            # largest error, so the ratio lies between these two.
            assert error["ratio"] <= error["error"] / (2 * error["torch_error"]) * (1 + 1e-6)
            assert error["error"] > 0

    def test_swap_and_backends(self, shown: tuple[int, dict[str, Any], Path]) -> None:
        figures = shown[1]
        assert [row["action"] for row in figures["swap"]] == ["fused"] * 13
        for op in ("attention", "patch_embed"):
            lines = {line["backend"]: line for line in figures["backends"][op]["explanations"]}
            assert list(lines) == BACKENDS
            assert lines[figures["backends"][op]["ran"]]["can_run"]
            assert all(line["why_not"] for line in lines.values() if not line["can_run"])
        assert figures["backends"]["attention"]["spec"][:6] == ["2", "3", "197", "197", "64", "64"]

    @pytest.mark.parametrize("name", ["attention", "times"])
    def test_pictures(self, shown: tuple[int, dict[str, Any], Path], name: str) -> None:
        _, figures, out = shown
        assert figures["pictures"][name] == str(out / f"{name}.png")
        with Image.open(out / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(float)
        assert min(pixels.shape[:2]) > 600
        assert pixels.std() > 20
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50

    def test_text_in_a_pipe(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_demo(tmp_path)[0] == 0
        output, error = capsys.readouterr()
        assert "random (seed 0)" in output
        assert "no prediction is shown" in output
        assert "…" not in output
        assert not CONTROL.search(output)
        assert error == ""
        for phrase in ("blocks.*.attn ×12", "whole model", "attention core", "logits", "only CUDA tensors"):
            assert phrase in output

    def test_checkpoint_image_file_and_backend(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        torch.manual_seed(3)
        model = timm.create_model(MODEL)
        safetensors.save_file(model.state_dict(), tmp_path / "weights.safetensors")
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 260, 4), np.uint8)).save(tmp_path / "photo.png")
        files = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--image", str(tmp_path / "photo.png")]
        status, figures = run_demo(tmp_path, *files, "--backend", "reference", "--dtype", "bfloat16")
        assert status == 0
        assert figures["dtype"] == "bfloat16"
        assert figures["weights"].endswith("weights.safetensors")
        assert {op["ran"] for op in figures["backends"].values()} == {"reference"}
        assert "random" not in capsys.readouterr().out

    def test_a_checkpoint_is_really_loaded(self, tmp_path: Path) -> None:
        model = timm.create_model(MODEL)
        torch.save(
            {"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pt"
        )
        loaded = timm.create_model(MODEL)
        subjects._load_checkpoint(loaded, str(tmp_path / "w.pt"), MODEL)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))

    def test_a_zero_head_is_drawn_anew(self) -> None:
        model = timm.create_model(MODEL)
        assert subjects._wake_head(model) == []
        nn.init.zeros_(model.head.weight)
        with torch.no_grad():
            assert "all zero" in subjects._wake_head(model)[0]
        assert model.head.weight.std().item() == pytest.approx(192**-0.5, rel=0.05)

    def test_a_wrong_kernel_is_a_miss(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        plant_wrong_attention(monkeypatch)
        status, figures = run_demo(tmp_path, "--backend", "reference")
        assert status == 1
        assert [error["passed"] for error in figures["errors"]] == [False, False, True]
        assert "MISS" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("model", "prefix", "whose"),
        [
            (MODEL, 1, "CLS"),
            ("deit_tiny_distilled_patch16_224", 2, "CLS"),
            ("vit_medium_patch16_gap_240", 0, "mean query"),
        ],
    )
    def test_attention_map_is_a_row_of_the_matrix(self, model: str, prefix: int, whose: str) -> None:
        arguments = demo_arguments(model)
        with torch.no_grad():
            subject = subjects.prepare(arguments, torch.device("cpu"), torch.float32)
            subjects.receive(subject)
            mapped = demo._attention_map(subject)
            assert subject.qkv is not None
            query, key, _ = subject.qkv[:1].permute(2, 0, 3, 1, 4).unbind(0)
            row = query[:, :, :1] if prefix else query.mean(dim=2, keepdim=True)
            expected = torch.softmax(row @ key.transpose(-2, -1) / key.shape[-1] ** 0.5, dim=-1)[0, :, 0, prefix:]
        assert mapped is not None
        assert mapped[1].startswith(whose)
        assert mapped[0].shape[1:] == subject.original.patch_embed.grid_size
        torch.testing.assert_close(mapped[0].flatten(1), expected * key.shape[2], rtol=1e-4, atol=1e-5)

    def test_a_model_without_known_attention(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "attention.png").write_bytes(b"of an earlier run")
        status, figures = run_demo(tmp_path, "--model", "swin_tiny_patch4_window7_224", "--repeats", "1")
        assert status == 0
        assert figures["pictures"]["attention"] is None
        assert not (tmp_path / "attention.png").exists()
        assert [one["name"] for one in figures["times"]] == ["whole model", "patch embedding"]
        assert "no picture of the attention" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("model", "core"),
        [
            ("eva02_tiny_patch14_224", False),  # reads the weights of its projection
            ("convit_tiny", True),  # has no head_dim
            ("vit_small_patch16_dinov3", True),  # rotates query and key
        ],
    )
    def test_layers_that_do_more_than_the_picture_knows(
        self, model: str, core: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        status, figures = run_demo(tmp_path, "--model", model, "--repeats", "1")
        assert status == 0
        names = [one["name"] for one in figures["times"]]
        assert ("attention core (no projections)" in names) == core
        assert "attention layer (with projections)" in names
        is_drawn = figures["pictures"]["attention"] is not None
        assert is_drawn == (model == "convit_tiny")
        assert is_drawn or "no picture of the attention: the layer does more" in capsys.readouterr().out

    def test_a_model_with_a_bare_patch_convolution(self, tmp_path: Path) -> None:
        status, figures = run_demo(tmp_path, "--model", "convnext_atto", "--repeats", "1")
        assert status == 0
        assert [(row["name"], row["action"]) for row in figures["swap"]] == [("stem.0", "fused")]
        assert [one["name"] for one in figures["times"]] == ["whole model", "patch embedding"]


def demo_arguments(model: str) -> Any:
    return _parser().parse_args(["demo", "--model", model])


class TestDemoBadInput:
    @pytest.fixture(autouse=True)
    def no_kernel_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backends, "_select", lambda *_: pytest.fail("a kernel was chosen"))
        monkeypatch.setattr(demo, "race", lambda *_: pytest.fail("something was timed"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--backend", "tritn"], "--backend: got 'tritn'; accepted are cpu, triton, cuda, reference"),
            (["--backend", "cuda"], "--backend: got 'cuda', which cannot run attention on cpu"),
            (["--model", "vit_tiny_patch16_244"], "close to it: vit_tiny_patch16_224"),
            (["--model", "resnet18"], "--model: got 'resnet18', in which fastvit finds no layer to swap"),
            (["--image", "nowhere.png"], "--image: got 'nowhere.png', which is no file; accepted are astronaut"),
            (["--image", __file__], "which is no image that Pillow reads; accepted are astronaut"),
            (["--checkpoint", "nowhere.pt"], "--checkpoint: got 'nowhere.pt', which is no file"),
            (["--checkpoint", __file__], "which cannot be read"),
            (["--batch", "0"], "--batch: got '0'; accepted are whole numbers from 1 up"),
            (["--threads", "many"], "--threads: got 'many'; accepted are whole numbers from 1 up"),
            (["--dtype", "float64"], "--dtype: got 'float64'; accepted are float32, float16, bfloat16"),
            (["--device", "tpu"], "--device: got 'tpu'; accepted are cpu, cuda and cuda:N"),
            (["--device", "meta"], "--device: got 'meta'; accepted are cpu, cuda and cuda:N"),
            (["--device", "cuda:99"], "--device: got 'cuda:99'"),
            (["--json", "/nowhere/at/all.json"], "--json: got '/nowhere/at/all.json'; accepted is a file"),
            (["--out", __file__], "which cannot be made (File exists); accepted is a folder"),
            (["--colour"], "unrecognized arguments: --colour"),
        ],
        ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
    )
    def test_one_line(
        self, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        line = error_line(
            capsys, "demo", "--model", MODEL, "--device", "cpu", "--out", str(tmp_path / "out"), *arguments
        )
        assert line.startswith("fastvit demo: ")
        assert message in line

    def test_an_image_cut_short(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "cut.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:2000])
        assert "which cannot be read" in error_line(capsys, "demo", "--image", str(path))

    def test_a_checkpoint_that_does_not_fit(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        state = timm.create_model(MODEL, num_classes=10).state_dict()
        state["extra"] = state.pop("cls_token")
        torch.save(state, tmp_path / "ten.pt")
        line = error_line(capsys, "demo", "--model", MODEL, "--checkpoint", str(tmp_path / "ten.pt"))
        for phrase in ("misses 1 (cls_token)", "has besides 1 (extra)", "head.weight [10, 192] for [1000, 192]"):
            assert phrase in line

    def test_a_missing_extra(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        assert error_line(capsys, "demo") == "fastvit demo: demo needs timm: pip install 'fastvit[models,viz]'"


def test_other_processes_are_noticed() -> None:
    cpu, processors = torch.device("cpu"), os.cpu_count() or 1
    assert 0 <= Clock().processors_busy_elsewhere() <= processors
    # What this process starts is no other's, while it lives and afterwards: here a child of a child.
    spin = "import time; end = time.process_time() + 0.4\nwhile time.process_time() < end: pass"
    before = _own_seconds()
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}]); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alive = _own_seconds()
        child.communicate("\n")
    assert alive - before >= 0.4
    assert _own_seconds() - before >= 0.4
    assert demo._company(torch.device("cuda"), 99.0) == []
    assert demo._company(cpu, processors - torch.get_num_threads() + 0.1) == []
    assert "so the times say little" in demo._company(cpu, processors - torch.get_num_threads() + 0.9)[0]


@pytest.mark.parametrize(
    ("calm", "rounds", "counted", "disturbed"),
    # Of five rounds two are quiet, or one; of a number that was asked for all count.
    [((1, 4), None, 2, 0), ((4,), None, 5, 4), ((1, 4), 5, 5, 0), ((), 5, 5, 5)],
)
def test_rounds_that_others_work_ran_through_do_not_count(
    calm: tuple[int, ...], rounds: int | None, counted: int, disturbed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked before and after each of five rounds.
    answers = iter([index // 2 in calm for index in range(10)])
    monkeypatch.setattr(quiet, "of_threads", lambda threads: lambda: next(answers))
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 5)
    result = race("x", int, int, torch.device("cpu"), -1.0, rounds)
    assert (result.pytorch.rounds, result.fastvit.rounds, result.disturbed) == (counted, counted, disturbed)
    notes = demo._neighbours([result])
    assert bool(notes) == bool(disturbed)
    assert not notes or "in most rounds of: x" in notes[0]


def test_race_is_taken_in_turn() -> None:
    order: list[str] = []
    result = race("x", lambda: order.append("torch"), lambda: order.append("ours"), torch.device("cpu"), 1.0, 4)
    assert order == ["torch", "ours"] * (len(order) // 2)
    assert result.pytorch.rounds == result.fastvit.rounds == 4
    assert result.ratio == result.pytorch.p50 / result.fastvit.p50
