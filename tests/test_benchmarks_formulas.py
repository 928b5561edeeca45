"""FLOP and byte formulas and the roofline, against cases worked out by hand."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import cases, formulas, harness, roofline, suite_models, tables, timers
from benchmarks.formulas import VitShape
from benchmarks.harness import Contest
from benchmarks.roofline import Machine
from benchmarks.timers import Entry, Times


def test_attention_flop() -> None:
    # One head, 3 queries, 3 keys, 2 dimensions: QKᵀ has 9 dot products of 2 multiply-adds, PV has 6 of 3.
    assert formulas.attention_flop(1, 1, 3, 2) == 2 * (9 * 2 + 6 * 3)
    assert formulas.attention_flop(2, 12, 197, 64) == 2 * 2 * 2 * 12 * 197 * 197 * 64
    # Backward: S again, dV = Pᵀ dO, dP = dO Vᵀ, dQ = dS K, dK = dSᵀ Q: 3 · 3 · 2 multiply-adds each.
    assert formulas.attention_backward_flop(1, 1, 3, 2) == 5 * 2 * 3 * 3 * 2


def test_attention_bytes() -> None:
    # Q, K, V and O of 1 · 1 · 3 · 2 elements of 2 bytes; 9 elements of bias.
    assert formulas.attention_bytes(1, 1, 3, 2, 2) == 4 * 6 * 2
    assert formulas.attention_bytes(1, 1, 3, 2, 2, bias=9) == 4 * 6 * 2 + 18
    # Q, K, V, O, dO, dQ, dK, dV and three float32 of LSE.
    assert formulas.attention_backward_bytes(1, 1, 3, 2, 2) == 8 * 6 * 2 + 3 * 4
    # At d = 64 in 16 bits the intensity is N / 2 FLOP per byte.
    intensity = formulas.attention_flop(1, 1, 197, 64) / formulas.attention_bytes(1, 1, 197, 64, 2)
    assert intensity == pytest.approx(197 / 2)


def test_patch_embed_formulas() -> None:
    # 4 patches of 12 numbers to 5 channels.
    assert formulas.patch_embed_flop(1, 4, 5, 12) == 2 * 4 * 5 * 12
    # 48 pixels, 60 weights, 5 biases, 20 outputs, 4 bytes each.
    assert formulas.patch_embed_bytes(1, 4, 5, 12, 4) == 4 * (48 + 60 + 5 + 20)
    assert formulas.patch_embed_backward_bytes(1, 4, 5, 12, 4) == 4 * (48 + 20 + 60 + 5)
    # A class token more in the output (5), the token itself (5), and five positions of 5.
    assert formulas.stem_bytes(1, 4, 5, 12, 4) == 4 * (48 + 60 + 5 + 20 + 5 + 5 + 25)
    # B=256, 224², P16, D768: 59.2 GFLOP.
    assert formulas.patch_embed_flop(256, 196, 768, 768) == pytest.approx(59.2e9, rel=1e-3)


def test_vit_flop() -> None:
    # One block of width 2 and MLP 3, an image of 4 × 4 in patches of 2: 4 patches and a class token, 7 classes.
    shape = VitShape(4, 2, 2, 3, 1, classes=7)
    patches = 2 * 4 * 2 * 12
    projections = 5 * 2 * (2 * 6 + 2 * 2 + 2 * 3 + 3 * 2)
    attention = 2 * (5 * 5 * 2 + 5 * 5 * 2)
    assert formulas.vit_flop(shape, 3) == 3 * (patches + projections + attention + 2 * 2 * 7)
    # ViT-B/16 at 224: 17.6 G multiply-adds (Dosovitskiy et al. 2021 and timm's table: 17.58).
    assert formulas.vit_flop(VitShape(224, 16, 768, 3072, 12), 1) / 2 == pytest.approx(17.58e9, rel=2e-3)
    assert formulas.vit_bytes(shape, 2, 4, parameters=100) == 4 * (100 + 2 * (48 + 7))


@pytest.mark.parametrize(("name", "shape"), cases.MODELS, ids=[name for name, _ in cases.MODELS])
def test_vit_flop_against_torchs_counter(name: str, shape: VitShape) -> None:
    pytest.importorskip("timm")
    from torch.utils.flop_counter import FlopCounterMode

    # Without weights: on the meta device shapes alone are computed.
    model = suite_models.create.__wrapped__(name, shape, False, torch.float32, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(3, 3, shape.image, shape.image, device="meta"))
    assert counter.get_total_flops() == formulas.vit_flop(shape, 3)


def test_bound() -> None:
    # 100 GFLOP/s and 10 GB/s: below 10 FLOP per byte memory is the roof.
    assert formulas.bound(1e9, 1e9, 100, 10) == ("memory", pytest.approx(0.1))
    assert formulas.bound(1e11, 1e9, 100, 10) == ("arithmetic", pytest.approx(1.0))
    assert formulas.bound(1e9, 1e9, 0, 10) == ("", 0.0)
    assert formulas.bound(0, 0, 100, 10) == ("", 0.0)


def test_a_row_says_its_roof_and_its_share() -> None:
    machine = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0}, 10.0)
    entry, peer = Entry("cpu", lambda: lambda: None), Entry("peer", lambda: lambda: None, "peer 1.0")
    contest = Contest("suite", "B2 N8", torch.float32, (entry,), (peer,), {"cpu": 0.5}, flop=1e9, moved=2e8, items=2)
    times = {"cpu": Times([0.04] * 5), "peer": Times([0.08] * 5)}
    row = harness._row(contest, machine, entry, peer, times)
    # 1e9 FLOP take 10 ms at the peak, 2e8 bytes 20 ms at the bandwidth: half of the 40 ms that were needed.
    assert (row.bound, row.share) == ("memory", 0.5)
    assert (row.ours_gflops, row.peer_gflops, row.ours_gbs) == (25.0, 12.5, 5.0)
    assert (row.ratio, row.per_second, row.samples) == (2.0, 50.0, 5)
    assert (row.peak_gflops, row.peak_gbs, row.peer_version) == (100.0, 10.0, "peer 1.0")


def test_the_roofs_are_measured_with_the_right_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def second(call: object, repeats: int, device: str, patience: float) -> float:
        call()  # type: ignore[operator]
        calls.append((repeats, device))
        return 2.0

    monkeypatch.setattr(roofline, "median_seconds", second)
    # A copy of 1000 bytes reads as many and writes as many.
    assert roofline.copy_bandwidth("cpu", 1000) == pytest.approx(2 * 1000 / 2.0 / 1e9)
    assert roofline.matrix_rate("cpu", torch.float32, (8, 16)) == pytest.approx(2 * 16**3 / 2.0 / 1e9)
    assert calls == [(roofline.REPEATS, "cpu")] * 3


def test_a_row_says_its_share_of_the_fma_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("cpu", "device", "avx2", 1, "driver", {"float32": 100.0}, 10.0, fma_gflops=125.0)
    entry = Entry("cpu", lambda: lambda: None)

    def measure(entries: list[Entry], *_: object) -> tuple[dict[str, Times], dict[str, str]]:
        # The clock was lower than when the roofs were measured.
        return {one.name: Times([100.0] * 5 if one.gauge else [0.04] * 5) for one in entries}, {}

    monkeypatch.setattr(harness.timers, "measure", measure)
    for dtype, flop, share in ((torch.float32, 1e9, 0.25), (torch.bfloat16, 1e9, 0.0), (torch.float32, 0.0, 0.0)):
        contest = Contest("suite", "B2 N8", dtype, (entry,), (), {"cpu": 0.5}, flop=flop, moved=2e8, items=2)
        (row,) = harness.run(contest, machine, 5).rows
        # 25 of 100 GFLOP/s; 16-bit rows have other instructions, so no share.
        assert row.fma_share == pytest.approx(share)
        assert tables.fma(row) == ("25 %" if share else "–")
    assert "FMA in registers 0.125" in machine.describe()
    # What is read between the samples is a rate of this machine.
    assert 1 < float(harness.FMA.build()()) < 640 * torch.get_num_threads()  # type: ignore[arg-type]
    assert roofline.fma_rate("cuda") == 0.0
    monkeypatch.setattr(roofline, "FMA_SECONDS", 0.02)
    assert harness.capability()
    rate = roofline.fma_rate("cpu")
    # No processor has fewer than 4 lanes at 0.25 GHz, nor one more than 2 units of 16 lanes at 10 GHz, per thread.
    assert 1 < rate < 640 * torch.get_num_threads()


def test_a_measured_machine_is_plausible() -> None:
    machine = roofline.measure("cpu", (torch.float32,), size=8 << 20, sizes=(128,))
    # Any machine of this century copies more than 0.1 and less than 10,000 GB/s.
    assert 0.1 < machine.gbs < 1e4
    assert 0.01 < machine.peak(torch.float32) < 1e6
    assert machine.peak(torch.float16) == 0.0
    assert str(machine.threads) in machine.describe()


def test_a_peer_that_does_something_else_is_not_timed() -> None:
    x = torch.randn(64)
    entries = [
        Entry("a", lambda: lambda: (x, x)),
        Entry("b", lambda: lambda: (x * 1.001, x)),
        Entry("c", lambda: lambda: (x, 2 * x)),
    ]
    entries += [Entry("d", lambda: lambda: x[:3]), Entry("e", lambda: lambda: (x, x * torch.nan))]
    times, absent = timers.measure(entries, 2, "cpu")
    assert set(times) == {"a", "b"}
    assert set(absent) == {"c", "d", "e"}
    assert all("differs" in reason for reason in absent.values())


def test_nobody_always_comes_after_the_same_other() -> None:
    seen: list[str] = []
    names = "abc"
    # Long enough that a sample is one call, and that the calls before them, to find that out, are few.
    entries = [
        Entry(name, lambda name=name: lambda: (seen.append(name), time.sleep(timers.SHORTEST_SAMPLE))) for name in names
    ]
    timers.measure(entries, 24, "cpu")
    rounds = ["".join(seen[-72:][i : i + 3]) for i in range(0, 72, 3)]
    assert all(sorted(order) == list(names) for order in rounds)
    for name in names:
        before = {seen[i - 1] for i in range(len(seen) - 71, len(seen)) if seen[i] == name}
        assert before >= set(names) - {name}


def test_a_call_that_follows_itself_in_use_does_so_before_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def entry(name: str, follows_itself: bool) -> Entry:
        call = lambda: (seen.append(name), time.sleep(timers.SHORTEST_SAMPLE))  # noqa: E731
        return Entry(name, lambda: call, follows_itself=follows_itself)

    times, _ = timers.measure([entry("a", True), entry("b", True), entry("c", False)], 20, "cpu")
    rounds = ["".join(seen[-100:][i : i + 5]) for i in range(0, 100, 5)]
    assert all("aa" in order and "bb" in order and order.count("c") == 1 for order in rounds), rounds
    assert all(len(value.samples) == 20 for value in times.values())
    # A long call is its own warm-up.
    monkeypatch.setattr(timers, "LONGEST_TWICE", timers.SHORTEST_SAMPLE)
    seen.clear()
    timers.measure([entry("a", True)], 20, "cpu")
    assert len(seen) == timers.WARM_UPS + 1 + 20


def test_what_a_peer_raises_is_its_reason() -> None:
    def fail() -> None:
        raise LookupError("no kernel\nsecond line")

    times, absent = timers.measure([Entry("a", lambda: lambda: None), Entry("b", lambda: fail)], 3, "cpu")
    assert absent == {"b": "LookupError: no kernel"}
    assert len(times["a"].samples) == 3
