"""Random cases, forward and backward, against float64 under the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given

from fastvit.testing import AttentionCase, Comparison, PatchEmbedCase, check_attention, check_patch_embed
from tests.strategies import attention_cases, fuzz, patch_embed_cases


@fuzz(200)
@given(attention_cases(min_elements=3072))
def test_attention_cpu(hold: Callable, case: AttentionCase) -> None:
    hold("attention, cpu, fuzz", check_attention(case, "cpu"), case)


@fuzz(300)
@given(patch_embed_cases())
def test_patch_embed_cpu(hold: Callable, case: PatchEmbedCase) -> None:
    hold("patch_embed, cpu, fuzz", check_patch_embed(case, "cpu"), case)


@fuzz(20)
@given(attention_cases(min_elements=3072))
def test_attention_reference(hold: Callable, case: AttentionCase) -> None:
    hold("attention, reference, fuzz", check_attention(case, "reference"), case)


@fuzz(60)
@given(patch_embed_cases())
def test_patch_embed_reference(hold: Callable, case: PatchEmbedCase) -> None:
    hold("patch_embed, reference, fuzz", check_patch_embed(case, "reference"), case)


# NumPy warns where the hardware does not, of -inf - -inf in rows that are masked; to record each takes longer than the
# case.
SILENT = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# The interpreter takes milliseconds per program: smaller cases of few heads (a handful of tokens would need hundreds of
# them for the rule's statistics; tests/test_kernels_triton.py has one token), and a failing one is reported as it is
# found. Each runs
# in a thread of its own: on hypothesis's deep stack every op of the interpreter crosses into another 16-KiB chunk of
# CPython 3.11's frames and back, which makes it four times as slow.
@SILENT
@fuzz(30, shrink=False)
@given(attention_cases(max_seqlen=70, most_heads=128, min_queries=8, keys=(8, 70)))
def test_attention_triton(hold: Callable, case: AttentionCase) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    comparisons = on_a_fresh_stack(lambda: check_attention(case, "triton", written_out=True))
    hold("attention, triton interpreter, fuzz", comparisons, case)


@SILENT
@fuzz(30, shrink=False)
@given(patch_embed_cases(max_grid=4, min_elements=512))
def test_patch_embed_triton(hold: Callable, case: PatchEmbedCase) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hold("patch_embed, triton interpreter, fuzz", on_a_fresh_stack(lambda: check_patch_embed(case, "triton")), case)


def on_a_fresh_stack(function: Callable[[], list[Comparison]]) -> list[Comparison]:
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(function).result()
