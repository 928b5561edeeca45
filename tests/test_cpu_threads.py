"""The CPU kernels' threads and memory: the same bits however heads are cut, and nothing that grows with N²."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastvit
from fastvit.commands.env import patch_embed_scratch
from fastvit.kernels import native
from fastvit.testing import AttentionCase, check_attention

if error := native.load_error():
    pytest.skip(error, allow_module_level=True)
_C = import_module("fastvit._C")
ROOT = Path(__file__).parent.parent
THREADS = (1, 2, 3, 4, 7)
CASES = (
    AttentionCase(1, 1, 197, 197),
    AttentionCase(1, 3, 300, 300, 32, 32, sharpness=4.0),
    AttentionCase(1, 5, 65, 65, 24, 24, is_causal=True),
    AttentionCase(1, 1, 577, 33, 40, 72, layout="bnhd"),
    AttentionCase(1, 1, 197, 20, 32, 32, layout="bnhd"),
    AttentionCase(3, 1, 50, 50, 32, 32, bias="additive"),
    AttentionCase(1, 3, 197, 197, 64, 64, torch.bfloat16, bias="bool", bias_shape=(1, 1, 1, 197)),
    AttentionCase(1, 1, 131, 130, 17, 17, torch.float16, layout="bhnd"),
    AttentionCase(1, 3, 70, 70, 16, 16, torch.float64),
)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gradients(case: AttentionCase) -> list[Tensor]:
    tensors = case.tensors()
    leaves = [tensors[name].detach().requires_grad_() for name in ("query", "key", "value")]
    output, lse = fastvit.attention(
        *leaves, bias=tensors["bias"], is_causal=case.is_causal, return_lse=True, backend="cpu"
    )
    grads = torch.autograd.grad((output, lse), leaves, (tensors["grad_output"], tensors["grad_lse"]))
    return [output.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(case: AttentionCase) -> None:
    with threads(1):
        alone = gradients(case)
    assert all(tensor.isfinite().all() for tensor in alone)
    for count in THREADS[1:]:
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(gradients(case), alone, strict=True)), count


def test_heads_in_a_larger_batch_have_the_bits_that_they_have_alone() -> None:
    packed = torch.randn(3, 197, 3, 2, 64, requires_grad=True)
    grad = torch.randn(3, 197, 2, 64)
    with threads(4):
        together = torch.autograd.grad(fastvit.attention_qkvpacked(packed, backend="cpu"), packed, grad)[0]
        for i in range(3):
            one = packed[i : i + 1].detach().requires_grad_()
            alone = torch.autograd.grad(fastvit.attention_qkvpacked(one, backend="cpu"), one, grad[i : i + 1])[0]
            assert torch.equal(alone, together[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_in_parts_hold_the_rule(hold: Callable, dtype: torch.dtype) -> None:
    for case in (
        AttentionCase(1, 3, 197, 197, dtype=dtype, sharpness=4.0),
        AttentionCase(1, 1, 785, 785, dtype=dtype),
        AttentionCase(1, 3, 130, 130, 72, 72, dtype, is_causal=True),
    ):
        with threads(4):
            hold(f"attention, cpu, heads in parts, {dtype}", check_attention(case, "cpu"), case)


def test_without_a_query_the_gradients_of_key_and_value_are_zero() -> None:
    for count in (1, 3):
        query, key, value = (torch.randn(1, 1, n, 8, requires_grad=True) for n in (0, 5, 5))
        with threads(count):
            grads = torch.autograd.grad(fastvit.attention(query, key, value, backend="cpu").sum(), (key, value))
        assert all((grad == 0).all() for grad in grads)


def test_the_leaves_of_a_head() -> None:
    # What one head gives to threads: more leaves with more queries, up to eight.
    leaves = [_C.attention_scratch(n, n, 64, 64)[2] for n in (1, 197, 1025, 4100)]
    assert leaves[0] == 1
    assert leaves == sorted(leaves)
    assert leaves[1] >= 4
    assert leaves[-1] == 8


def test_scratch_is_linear_in_the_lengths() -> None:
    for dtype in ("float32", "bfloat16", "float64"):
        for bias in (False, True):
            forward, backward, _, part = _C.attention_scratch(4096, 4096, 64, 64, dtype, bias)
            twice = _C.attention_scratch(8192, 8192, 64, 64, dtype, bias)
            # Doubled, but for the arrays whose size does not depend on N.
            assert forward <= twice[0] <= 2 * forward
            assert 1.8 * backward < twice[1] <= 2 * backward
            assert twice[3] == 2 * part
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        _C.attention_scratch(1, 1, 1, 1, "int8")
    with pytest.raises(ValueError, match="accepted are sizes of at least 1"):
        _C.attention_scratch(1, 0, 1, 1)


def test_scratch_of_patch_embedding_does_not_grow_with_images_or_patches() -> None:
    forward, both = patch_embed_scratch(batch=2)
    # No less than a patch and a row of the weight, no more than a task: a part of the second-level cache, and its sums.
    assert 2 * 3 * 16 * 16 * 4 < forward <= both < 16 << 20
    assert patch_embed_scratch(batch=8) == (forward, both)
    # Tokens are dealt out evenly over tasks, so that a task may have one more of them.
    assert patch_embed_scratch(batch=2, side=384) == pytest.approx((forward, both), rel=0.01)
    small = patch_embed_scratch(embed_dim=32, patch=4)
    assert small[0] < forward
    assert small[1] < both


# Prints the rise of the peak of resident memory over what the process held before the call, which the kernel of Linux
# lets a process reset; and the scratch that the calling thread holds afterwards.
MEASURE = """
import json, re, sys
import torch, fastvit
from fastvit import _C
from fastvit.commands.env import patch_embed_scratch

backend, threads, lengths = sys.argv[1], int(sys.argv[2]), [int(n) for n in sys.argv[3:]]
torch.set_num_threads(threads)

def resident(field):
    with open("/proc/self/status") as file:
        return int(re.search(field + r":\\s+(\\d+) kB", file.read())[1]) * 1024

def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

def work(n):
    tensors = [torch.randn(1, 2, n, 64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 2, n, 64)
    rises = []
    def rise(call):
        reset()
        before = resident("VmRSS")
        result = call()
        rises.append(resident("VmHWM") - before)
        return result
    output = rise(lambda: fastvit.attention(*tensors, backend=backend))
    held = _C.held_scratch()
    rise(lambda: torch.autograd.grad(output, tensors, grad))
    return {"forward": rises[0], "backward": rises[1], "held": [held, _C.held_scratch()]}

work(64)
print(json.dumps([work(n) for n in lengths]))
"""


def measure(backend: str, count: int, *lengths: int) -> list[dict]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(count)}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, backend, str(count), *map(str, lengths)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=ROOT,
    )
    if "clear_refs" in result.stderr:
        pytest.skip(f"this system does not let a process reset its peak of memory: {result.stderr[-200:]}")
    assert result.returncode == 0, result.stderr
    measured: list[dict] = json.loads(result.stdout)
    return measured


SHORT, LONG = 1025, 4100
# Allocator, stacks, pages in part; N² floats of both heads are 134 MB at 4100.
SLACK = 4 << 20


def test_memory_grows_with_n_and_not_with_its_square() -> None:
    rows = dict(zip((SHORT, LONG), measure("cpu", 1, SHORT, LONG), strict=True))
    tensor = {n: 2 * n * 64 * 4 for n in rows}
    for n, row in rows.items():
        forward, backward, *_ = _C.attention_scratch(n, n, 64, 64)
        print(f"N = {n}: forward {row['forward'] / 2**20:.1f} MiB, backward {row['backward'] / 2**20:.1f} MiB")
        # The stated scratch is what is held: nothing beside it.
        assert row["held"] == [max(forward, row["held"][0]), backward]
        assert row["forward"] <= forward + 2 * tensor[n] + SLACK
        assert row["backward"] <= backward + 5 * tensor[n] + SLACK
    for name in ("forward", "backward"):
        assert rows[LONG][name] <= 4 * rows[SHORT][name] + SLACK
        assert rows[LONG][name] < 2 * LONG * LONG * 4 / 4


def test_the_measurement_sees_a_square() -> None:
    short, long = measure("reference", 1, SHORT, LONG)
    for name in ("forward", "backward"):
        assert long[name] > 2 * LONG * LONG * 4
        assert long[name] > 8 * short[name]


def test_partial_sums_are_bounded_by_the_threads() -> None:
    count = 3
    (row,) = measure("cpu", count, LONG)
    _, backward, _, part = _C.attention_scratch(LONG, LONG, 64, 64)
    assert backward < row["held"][1] <= backward + 8 * count * part
    assert row["backward"] <= count * backward + 8 * count * part + 5 * 2 * LONG * 64 * 4 + 2 * SLACK


def test_heads_in_leaves_whose_sums_would_take_too_much_come_in_turns() -> None:
    lengths, heads, limit = (512, 16384), 7, 256 << 20
    _, backward, leaves, part = _C.attention_scratch(*lengths, 64, 64)
    assert leaves * part < limit < heads * leaves * part / 1.5
    sizes = (lengths[0], lengths[1], lengths[1])
    tensors = [torch.randn(1, heads, n, 64, requires_grad=True) for n in sizes]
    grad, results, held = torch.randn(1, heads, lengths[0], 64), [], []

    def run() -> None:
        output = fastvit.attention(*tensors, backend="cpu")
        results.append(torch.autograd.grad(output, tensors, grad))
        held.append(_C.held_scratch())

    for count in (1, 8):
        with threads(count):
            # Scratch is a thread's own.
            worker = threading.Thread(target=run)
            worker.start()
            worker.join()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert held[0] == backward
    assert backward < held[1] <= backward + limit
