"""What is judged is what is timed: the launchers choose the same kernels for a gate's sizes and for the timed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks import cases, correctness, cuda_forms, cuda_planning, cuda_resources, device_cases, gates
from benchmarks.cases import AttentionShape, ModelShape, PatchShape, Work
from benchmarks.cuda_planning import Call, Device, Note, attention_calls, calls_of, planning
from benchmarks.gates import Judge
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, PatchEmbedCase
from tests.emulated import emulator, needs_emulator

__all__ = ["emulator"]

DEVICES = {device.name: device for device in cuda_planning.DEVICES}
MEMORY = {"A100": 80 << 30, "L40S": 48 << 30, "H200": 139 << 30}
HALVES = (torch.bfloat16, torch.float16)
Chosen = set[tuple[str, int, int]]
Planner = Callable[[Call], list[Note]]


def timed_case(shape: AttentionShape, dtype: torch.dtype, layout: str) -> AttentionCase:
    """Return the case that a suite times, as :func:`gates.attention` names the one that is judged."""
    bias = "additive" if shape.bias else None
    sizes = (shape.batch, shape.heads, shape.seqlen, shape.seqlen, shape.head_dim, shape.head_dim)
    return AttentionCase(*sizes, dtype, bias, layout="packed" if layout == "packed" else "bhnd")


def timed_patches(shape: PatchShape, dtype: torch.dtype, layout: str) -> PatchEmbedCase:
    tubes = shape.mode == "tubelet"
    batch = shape.batch * (gates.FRAMES // gates.TUBELET if tubes else 1)
    side = shape.image // shape.patch
    channels = 3 * (gates.TUBELET if tubes else 1)
    return PatchEmbedCase(
        batch, channels, (side, side), (shape.patch, shape.patch), shape.embed_dim, dtype, layout=layout
    )


def chosen(noted: Planner, case: AttentionCase | PatchEmbedCase, suite: str) -> Chosen:
    """Return kernel, threads and shared bytes of each launch of what a suite times of a case."""
    calls = calls_of(case)
    backward = "backward" in suite or "training" in suite
    # The suites' images are no leaves.
    wanted = {"forward", "backward", "backward weight"} if backward else {"forward"}
    return {
        (kernel, threads, shared) for name in wanted & set(calls) for kernel, _, threads, shared in noted(calls[name])
    }


Pair = tuple[AttentionCase | PatchEmbedCase, AttentionCase | PatchEmbedCase]


def pairs(work: Work, judge: Judge) -> Iterator[Pair]:
    """Yield what is judged and what is timed of a work."""
    shape = work.details
    layout = "nhwc" if "channels_last" in work.suite else "nchw"
    if isinstance(shape, AttentionShape):
        yield gates.attention(shape, work.dtype, work.layout, judge), timed_case(shape, work.dtype, work.layout)
    elif isinstance(shape, PatchShape):
        yield gates.patch_embed(shape, work.dtype, layout, judge), timed_patches(shape, work.dtype, layout)
    elif isinstance(shape, ModelShape):
        attention, patches = gates.parts(shape)
        batch = gates.model_batch(shape, judge)
        yield (
            timed_case(replace(attention, batch=batch), work.dtype, "packed"),
            timed_case(attention, work.dtype, "packed"),
        )
        yield (
            timed_patches(replace(patches, batch=batch), work.dtype, layout),
            timed_patches(patches, work.dtype, layout),
        )


@functools.cache
def works() -> list[Work]:
    return [work for work in cases.select("cuda") if work.dtype in HALVES and work.kind != "overhead"]


def judge_of(device: Device) -> Judge:
    return Judge(device.multiprocessors, MEMORY[device.name])


@needs_emulator
@pytest.mark.parametrize("name", list(DEVICES))
def test_the_gate_judges_the_kernel_that_is_timed(name: str, emulator: ModuleType) -> None:
    device, other = DEVICES[name], []
    with planning(device) as noted:
        for work in works():
            for gate, timed in pairs(work, judge_of(device)):
                judged, meant = chosen(noted, gate, work.suite), chosen(noted, timed, work.suite)
                if not meant <= judged or not meant:
                    other.append((work.label, gate, sorted(meant - judged), sorted(judged)))
    assert other == []


def reached(noted: Planner, listed: list[AttentionCase | PatchEmbedCase]) -> dict[str, list[Note]]:
    """Return, by kernel, its launches in cases of 16 bits, whose patches tile the images."""
    found: dict[str, list[Note]] = {}
    for case in listed:
        tiles = isinstance(case, AttentionCase) or case.stride in (None, case.patch)
        if case.dtype in HALVES and tiles:
            for call in calls_of(case).values():
                for note in noted(call):
                    found.setdefault(note[0], []).append(note)
    return found


def correctness_cases() -> list[AttentionCase | PatchEmbedCase]:
    return [check.args[0] for *_, check in correctness.cases()]  # type: ignore[attr-defined]


@needs_emulator
@pytest.mark.parametrize("name", list(DEVICES))
def test_correctness_on_a_device_reaches_every_kernel_that_is_built(name: str, emulator: ModuleType) -> None:
    with planning(DEVICES[name]) as noted:
        kernels = reached(noted, correctness_cases())
        timed = {
            kernel
            for work in works()
            for _, case in pairs(work, Judge())
            for kernel, *_ in chosen(noted, case, work.suite)
        }
    assert timed - set(kernels) == set()
    built = {cuda_planning.demangle(kernel) for kernel in cuda.built_kernels()}
    if not built:
        pytest.skip("fastvit._C was built without CUDA: nvcc was not found, or FASTVIT_BUILD_CUDA=0")
    assert {kernel for kernel in built - set(kernels) if "sm90" not in kernel} == set()


@needs_emulator
def test_the_forms_for_hopper_are_all_judged_by_their_own_program(emulator: ModuleType) -> None:
    kernels = set()
    with planning(DEVICES["H200"]) as noted, cuda.form("sm90"):
        for case in cuda_forms.cases():
            kernels |= {note[0] for note in noted(attention_calls(case)["forward"])}
    assert kernels == {row.kernel for row in cuda_resources.read() if "sm90" in row.kernel}


@needs_emulator
def test_a_gate_of_two_images_would_judge_another_kernel(emulator: ModuleType) -> None:
    shape = AttentionShape(64, 12, 197, 64, "backward")
    images = PatchShape(256, 224, 16, 768)
    with planning(DEVICES["H200"]) as noted:
        few = chosen(noted, timed_case(replace(shape, batch=2), torch.bfloat16, "packed"), "attention backward")
        many = chosen(noted, timed_case(shape, torch.bfloat16, "packed"), "attention backward")
        small = chosen(noted, timed_patches(replace(images, batch=2), torch.bfloat16, "nchw"), "patch_embed forward")
        large = chosen(noted, timed_patches(images, torch.bfloat16, "nchw"), "patch_embed forward")
    assert {kernel.split("<")[0] for kernel, *_ in few - many} == {
        "attention_forward_resident", "attention_backward_streaming",
    }  # fmt: skip
    assert {kernel for kernel, *_ in many} >= {"attention_backward_resident<BFloat16, 64, false>"}
    assert small.isdisjoint(large)


@needs_emulator
@pytest.mark.parametrize("name", list(DEVICES))
def test_the_telling_cases_give_a_block_several_heads(name: str, emulator: ModuleType) -> None:
    # What a block prefetches is then another head, and what it leaves in shared memory is read by none.
    device = DEVICES[name]
    with planning(device) as noted:
        for case in device_cases.telling(torch.bfloat16):
            if not isinstance(case, AttentionCase) or case.seqlen_q > 300:
                continue
            assert case.batch * case.num_heads > 2 * device.multiprocessors
            for what, call in attention_calls(case).items():
                for kernel, blocks, *_ in noted(call):
                    assert blocks < case.batch * case.num_heads or "streaming" in kernel, (what, kernel, case)


@needs_emulator
def test_the_sanitizers_see_each_kind_of_kernel(emulator: ModuleType) -> None:
    listed = list(device_cases.sanitized())
    with planning(DEVICES["H200"]) as noted:
        kernels = reached(noted, listed)
        with cuda.form("sm90"):
            for case in device_cases.sanitized_sm90():
                for note in noted(attention_calls(case)["forward"]):
                    kernels.setdefault(note[0], []).append(note)
        late = [
            note
            for case in listed
            if isinstance(case, AttentionCase)
            for note in noted(attention_calls(case)["forward"])
        ]
    kinds = {(kernel.split("<")[0], kernel.split("<")[1].split(",")[0].strip(">")) for kernel in kernels}
    table = {
        (row.kernel.split("<")[0], row.kernel.split("<")[1].split(",")[0].strip(">")) for row in cuda_resources.read()
    }
    assert kinds == table
    # Both tiles of patch embedding; bias or causal, and neither; whole rows of scores, and not, of the form for sm_90a.
    ends = {f"{kernel.split('<')[0]} {kernel.split(', ')[-1]}" for kernel in kernels if "reduce" not in kernel}
    for kind in ("attention_forward_resident", "attention_forward_streaming", "attention_backward_resident"):
        assert {f"{kind} true>", f"{kind} false>"} <= ends
    assert {"BFloat16, 2, 4, 4, 4", "BFloat16, 2, 2, 2, 4"} <= {
        kernel.split("<")[1][:-1] for kernel in kernels if "patch" in kernel
    }
    assert {kernel.split(", ")[3] for kernel in kernels if "sm90" in kernel} == {"true", "false"}
    assert sum(note[1] for note in late) < 3000


def test_a_sanitized_case_is_the_call_that_it_names() -> None:
    small = [case for case in device_cases.sanitized() if case.batch == 1 and "1025" not in str(case)]
    assert len(small) == 12
    for case in small:
        ours, truth = (device_cases.run(case, backend, "cpu") for backend in ("cpu", "reference"))
        assert len(ours) == 4
        for mine, true in zip(ours, truth, strict=True):
            assert not mine.isnan().any()
            assert (mine.double() - true.double()).abs().max() <= 0.05 * true.double().abs().max(), case


def test_sanitized_cases_run_smallest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tool that runs out of its time has then seen the most kernels.
    ran: list[AttentionCase | PatchEmbedCase] = []
    monkeypatch.setattr(device_cases, "run", lambda case, *_, **__: ran.append(case))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device_cases.run_sanitized()
    assert len(ran) == len(list(device_cases.sanitized()))
    assert set(map(str, ran)) == set(map(str, device_cases.sanitized()))
    small, large = "1, num_heads=2, seqlen_q=50", "6, num_heads=16, seqlen_q=197"
    places = [[place for place, case in enumerate(ran) if part in str(case)] for part in (small, large)]
    assert len(places[0]) == len(places[1]) == 2
    assert max(places[0]) < min(places[1])
    assert ran[-1] in device_cases.LARGE_IN.values()


def test_a_gate_fits_the_device() -> None:
    for memory in (8 << 30, 24 << 30, 139 << 30):
        judge = Judge(132, memory)
        for work in cases.select("cuda"):
            if isinstance(work.details, AttentionShape):
                case = gates.attention(work.details, work.dtype, work.layout, judge)
                elements = case.batch * case.num_heads * case.seqlen_q**2
                assert elements <= max(judge.most_elements(), case.seqlen_q**2), work.label
                assert case.batch * case.num_heads * case.seqlen_q * case.head_dim <= 1 << 23, work.label
                assert 1 <= case.batch <= work.details.batch
                assert 1 <= case.num_heads <= work.details.heads
            elif isinstance(work.details, ModelShape):
                assert 1 <= gates.model_batch(work.details, judge) <= work.details.batch


def test_a_cpu_judges_as_few_as_it_did() -> None:
    judge = Judge.of("cpu")
    assert judge == Judge(0, 0)
    for work in cases.select("cpu"):
        shape = work.details
        if isinstance(shape, AttentionShape):
            case = gates.attention(shape, work.dtype, work.layout, judge)
            assert case.batch <= 2
            assert case.batch * case.num_heads * case.seqlen_q**2 <= max(gates.CPU_ELEMENTS, case.seqlen_q**2)
        elif isinstance(shape, PatchShape):
            assert gates.patch_embed(shape, work.dtype, "nchw", judge).batch <= 2
        elif isinstance(shape, ModelShape):
            assert gates.model_batch(shape, judge) <= 2


def test_correctness_on_a_device_is_affordable() -> None:
    # Drawing takes 20 to 50 ns for an element of Q, K, V or dO; the truth in float64 has eight matrices of N × N.
    listed = correctness_cases()
    assert len({str(case) for case in listed}) == len(listed)
    attention = [case for case in listed if isinstance(case, AttentionCase)]
    drawn = sum(4 * case.batch * case.num_heads * case.seqlen_q * case.head_dim for case in attention)
    assert drawn < 1.6e9
    assert max(case.batch * case.num_heads * case.seqlen_q * case.seqlen_k for case in attention) < 1 << 26
    # The first are those of the goals, in bfloat16.
    assert [(case.seqlen_q, case.head_dim, case.dtype) for case in attention[:2]] == [
        (197, 64, torch.bfloat16), (257, 64, torch.bfloat16),
    ]  # fmt: skip
