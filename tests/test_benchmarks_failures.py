"""What goes wrong on a device costs the case that it went wrong in, and no other: errors, hangs, wrong settings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import cases, correctness, runner, suite_attention, suite_models, suite_patch_embed, timers
from benchmarks.cases import AttentionShape, ModelShape, PatchShape
from benchmarks.formulas import VitShape
from benchmarks.roofline import Machine
from benchmarks.timers import Entry

MACHINE = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0}, 10.0)


class OutOfResources(Exception):  # noqa: N818 - the name that Triton's has.
    """As Triton's errors are: below Exception, and no RuntimeError."""


def raising(function: Any, backend: str = "cpu") -> Any:
    """Have ``function`` fail as Triton does when it is asked for ``backend``, and work for any other."""

    def call(*args: Any, **options: Any) -> Any:
        if (args[1:2] or (options["backend"],))[0] == backend:
            raise OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448.")
        return function(*args, **options)

    return call


def gates(backends: tuple[str, ...]) -> dict[str, tuple[dict[str, float], dict[str, str]]]:
    model = ModelShape("vit_tiny_patch16_224", VitShape(32, 16, 192, 768, 12), 2)
    timm = suite_models.create(model.name, model.vit, False, torch.float32, "cpu")
    return {
        "attention": suite_attention.gate(AttentionShape(1, 2, 17, 16), torch.float32, "packed", "cpu", backends),
        "patch_embed": suite_patch_embed.gate(PatchShape(1, 32, 16, 24), torch.float32, "cpu", backends),
        "models": suite_models.gate(timm, model, torch.float32, "cpu", backends),
    }


def test_an_error_of_triton_in_a_gate_costs_its_backend_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_attention, "check_attention", raising(suite_attention.check_attention))
    monkeypatch.setattr(suite_patch_embed, "check_patch_embed", raising(suite_patch_embed.check_patch_embed))
    monkeypatch.setattr(suite_models.fastvit, "swap", raising(suite_models.fastvit.swap))
    for kind, (rules, absent) in gates(("cpu", "reference")).items():
        assert set(rules) == {"reference"}, kind
        assert absent["cpu"].startswith("OutOfResources: out of resource: shared memory"), kind


def test_an_error_of_triton_is_written_down_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(backend: str, device: str) -> Any:
        raise OutOfResources("out of resource: shared memory")

    listed = [("attention", "D64", name, torch.float32, check) for name in "ab"]
    monkeypatch.setattr(correctness, "cases", lambda: listed)
    path = tmp_path / "c.jsonl"
    # The device is not lost by it, so that one process goes through all cases.
    correctness.work_off("cpu", "cpu", path, 60.0)
    states = [json.loads(line)["state"] for line in path.read_text().splitlines()]
    assert states == ["began", "failed"] * 2
    red, figures = correctness.judge(correctness.finished(path, "cpu", "cpu"), "cpu")
    assert red == {("cpu", "attention forward D64", "float32"), ("cpu", "attention backward D64", "float32")}
    assert figures["misses"][0] == "a: OutOfResources: out of resource: shared memory"
    monkeypatch.setattr(timers, "is_lost", lambda device: True)
    with pytest.raises(SystemExit):
        correctness.work_off("cpu", "cpu", tmp_path / "lost.jsonl", 60.0)


def test_a_device_is_lost_when_it_answers_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(timers.torch, "cuda", SimpleNamespace(synchronize=broken))
    assert timers.is_lost("cuda")
    assert not timers.is_lost("cpu")
    monkeypatch.setattr(timers.torch, "cuda", SimpleNamespace(synchronize=lambda: None))
    assert not timers.is_lost("cuda")


def test_gates_and_times_are_of_full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def contest(*args: Any) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)
        raise MemoryError

    monkeypatch.setitem(runner.CONTESTS, "attention", contest)
    work = cases.attention_work(AttentionShape(1, 2, 17, 16), torch.float32, "packed", 0)
    assert "MemoryError" in runner.measure_one(work, MACHINE, runner.Options(backends=("cpu",)), 1).notes[0]
    timers.measure([Entry("a", lambda: lambda: seen.append(torch.backends.cudnn.allow_tf32))], 1, "cpu")
    assert len(seen) > 2
    assert set(seen) == {False}
    assert torch.backends.cudnn.allow_tf32
