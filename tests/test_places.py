"""The automatic order by device family and class of shapes, with invented rows: no GPU has been measured yet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, places
from benchmarks.harness import Row
from fastvit.cli import main
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec
from fastvit.ops import backends
from fastvit.ops.backends import SPECIFICATION, Measured, Place

ROOT = Path(__file__).parent.parent
EVIDENCE = "benchmarks/results/gpu-invented.csv"
GPU = torch.device("cuda", 0)
SPEC = AttentionSpec(64, 12, 197, 197, 64, 64, torch.bfloat16, None, False, GPU)
ROW = Row(
    "attention forward", "B64 H12 N197 D64", "bfloat16", 0, "cuda", "SDPA flash", 1.0, 1.0, 1.0, 1.3, 1.3, 1.3, 1.3,
    1.0, 1.0, 0.5, "NVIDIA Invented", "sm_90", "2.12", "0", "0", "0", clock="graph",
)  # fmt: skip


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Measured, tuple[Place, ...]]]:
    """An invented table: on sm_90, cuda first for medium lengths, triton first for long ones and for many patches."""
    cuda, triton = Place("cuda", EVIDENCE), Place("triton", EVIDENCE)
    invented = {
        Measured("sm_90", "attention", "medium"): (cuda, triton),
        Measured("sm_90", "attention", "long"): (triton,),
        Measured("sm_90", "patch_embed", "many"): (triton, cuda),
    }
    monkeypatch.setattr(backends, "MEASURED_ORDER", invented)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    backends.device_family.cache_clear()
    backends.reset_selection()
    yield invented
    backends.device_family.cache_clear()
    backends.reset_selection()


def order(spec: backends.Spec) -> list[str]:
    return [place.backend for place in backends.automatic_order_of(spec)]


@pytest.mark.usefixtures("table")
def test_the_order_is_that_of_the_family_and_of_the_shapes() -> None:
    assert order(SPEC) == ["cuda", "triton", "reference"]
    assert order(SPEC._replace(seqlen_q=1, seqlen_k=4096)) == ["triton", "reference"]
    # Nobody measured windows: the device type's order holds.
    assert order(SPEC._replace(seqlen_q=49, seqlen_k=49)) == ["reference"]
    patches = PatchEmbedSpec(64, 3, 224, 224, 16, 16, 768, torch.bfloat16, GPU)
    assert order(patches) == ["triton", "cuda", "reference"]
    assert order(patches._replace(batch=1)) == ["reference"]
    assert order(SPEC._replace(device=torch.device("cpu"))) == ["cpu", "reference"]


@pytest.mark.usefixtures("table")
def test_another_family_keeps_the_order_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index == 1 else (9, 0))
    assert backends.device_family(torch.device("cuda", 1)) == "sm_80"
    assert order(SPEC._replace(device=torch.device("cuda", 1))) == ["reference"]
    monkeypatch.setitem(backends.AUTOMATIC_ORDER, "cuda", (Place("triton", EVIDENCE), SPECIFICATION))
    assert order(SPEC._replace(device=torch.device("cuda", 1))) == ["triton", "reference"]
    # A measured place comes first, and once.
    assert order(SPEC) == ["cuda", "triton", "reference"]


@pytest.mark.usefixtures("table")
def test_the_first_that_can_run_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.Backend, "why_not", lambda self, spec: ["no"] * (self.name == "cpu"))
    assert backends.select(SPEC).__name__ == "fastvit.kernels.cuda"
    (chosen,) = [row for row in backends.explain(SPEC) if row.automatic]
    assert (chosen.backend, chosen.evidence) == ("cuda", EVIDENCE)
    backends.reset_selection()
    monkeypatch.setattr(backends.Backend, "why_not", lambda self, spec: ["no"] * (self.name != "triton"))
    assert backends.select(SPEC).__name__ == "fastvit.kernels.triton"


@pytest.mark.parametrize(
    ("seqlen", "name"), [(1, "short"), (64, "short"), (65, "medium"), (577, "medium"), (600, "medium"), (601, "long")]
)
def test_a_length_has_its_class(seqlen: int, name: str) -> None:
    assert backends.shape_class(SPEC._replace(seqlen_q=1, seqlen_k=seqlen)) == name
    assert backends.shape_class(SPEC._replace(seqlen_q=seqlen, seqlen_k=1)) == name


def test_without_a_gpu_the_family_is_the_type() -> None:
    assert backends.device_family(torch.device("cpu")) == "cpu"
    assert backends.device_family(torch.device("meta")) == "meta"
    if not torch.cuda.is_available():
        assert backends.device_family(torch.device("cuda")) == "cuda"


def test_the_quick_way_of_the_cpu_asks_no_table() -> None:
    # runs_natively() answers from the device type alone.
    assert not any(where.family == "cpu" for where in backends.MEASURED_ORDER)


def test_fastvit_env_prints_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"][0]["measured_order"] == []
    invented = {Measured("cpu", "attention", "long"): (Place("reference", EVIDENCE),)}
    monkeypatch.setattr("fastvit.commands.env.MEASURED_ORDER", invented)
    assert main(["env", "--json"]) == 0
    output, printed = capsys.readouterr()
    place = {"backend": "reference", "evidence": EVIDENCE}
    assert json.loads(output)["backends"][0]["measured_order"] == [
        {"op": "attention", "shapes": "long", "places": [place]}
    ]
    assert "long" in printed
    assert "measured" in printed


def row(case: str, backend: str, time: float, suite: str = "attention forward", **changes: object) -> Row:
    return replace(ROW, suite=suite, case=case, backend=backend, ours_p50=time, **changes)  # type: ignore[arg-type]


ROWS = [
    row("B64 H12 N197 D64", "cuda", 1.0), row("B64 H12 N197 D64", "triton", 2.0),
    row("B64 H12 N257 D64", "cuda", 1.2), row("B64 H12 N257 D64", "triton", 1.0),
    row("B4 H12 N1025 D64", "cuda", 3.0), row("B4 H12 N1025 D64", "triton", 1.5),
    row("B256 224² P16 D768", "triton", 1.0, "patch_embed forward"),
    row("B256 224² P16 D768", "cuda", 1.1, "patch_embed forward"),
    row("B1 224² P16 D768", "cuda", 1.0, "patch_embed forward"),
    row("vit_base_patch16_224 B256", "cuda", 1.0, "model inference, eager"),
    # Wrong results, another family, and times of a host earn nothing here.
    row("B9 H12 N197 D64", "triton", 0.1, rule=1.1),
    row("B9 H12 N197 D64", "triton", 0.1, capability="sm_80"),
    row("B9 H12 N197 D64", "cpu", 0.1, clock="host"),
]  # fmt: skip


def test_rows_earn_the_order() -> None:
    earned = places.earned(ROWS)
    assert {tuple(where): [name for name, _ in means] for where, means in earned.items()} == {
        ("sm_90", "attention", "medium"): ["cuda", "triton"],
        ("sm_90", "attention", "long"): ["triton", "cuda"],
        ("sm_90", "patch_embed", "many"): ["triton", "cuda"],
        ("sm_90", "patch_embed", "few"): ["cuda"],
        ("sm_80", "attention", "medium"): ["triton"],
    }
    means = dict(earned[Measured("sm_90", "attention", "medium")])
    assert means == pytest.approx({"cuda": 1.2**0.5, "triton": 2.0**0.5})


def test_a_table_that_says_otherwise_is_seen(table: dict[Measured, tuple[Place, ...]]) -> None:
    assert places.misplaced(table, {EVIDENCE: ROWS}) == [
        "sm_90 attention long: ['triton'], measured ['triton', 'cuda']",
    ]
    turned = {where: own[::-1] for where, own in table.items()}
    assert len(places.misplaced(turned, {EVIDENCE: ROWS})) == 3
    assert places.misplaced(table, {EVIDENCE: []})


def test_the_committed_table_is_what_its_evidence_says() -> None:
    files = {place.evidence for own in backends.MEASURED_ORDER.values() for place in own if place != SPECIFICATION}
    rows = {file: harness.read(ROOT / file) for file in files}
    assert places.misplaced(backends.MEASURED_ORDER, rows) == []
    # No GPU has been measured: nothing may have a place on one.
    if not list((ROOT / "benchmarks/results").glob("gpu-*.csv")):
        assert backends.MEASURED_ORDER == {}
        assert "cuda" not in backends.AUTOMATIC_ORDER
