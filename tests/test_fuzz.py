"""Random cases, forward and backward, against float64 under the tolerance rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given

from fastvit.testing import AttentionCase, PatchEmbedCase, check_attention, check_patch_embed
from tests.strategies import attention_cases, fuzz, patch_embed_cases


@fuzz(500)
@given(attention_cases())
def test_attention_cpu(hold: Callable, case: AttentionCase) -> None:
    hold("attention, cpu, fuzz", check_attention(case, "cpu"), case)


@fuzz(500)
@given(patch_embed_cases())
def test_patch_embed_cpu(hold: Callable, case: PatchEmbedCase) -> None:
    hold("patch_embed, cpu, fuzz", check_patch_embed(case, "cpu"), case)


@fuzz(100)
@given(attention_cases())
def test_attention_reference(hold: Callable, case: AttentionCase) -> None:
    hold("attention, reference, fuzz", check_attention(case, "reference"), case)


@fuzz(100)
@given(patch_embed_cases())
def test_patch_embed_reference(hold: Callable, case: PatchEmbedCase) -> None:
    hold("patch_embed, reference, fuzz", check_patch_embed(case, "reference"), case)


# NumPy warns where the hardware does not, of -inf - -inf in rows that are masked; to record each takes longer than the
# case.
SILENT = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# The interpreter takes milliseconds per program: smaller cases, and a failing one is reported as it is found.
@SILENT
@pytest.mark.xfail(reason="float32 LSE at N = 5: 1.18 of what is allowed (CONTRIBUTING.md)", strict=False)
@fuzz(60, shrink=False)
@given(attention_cases(max_seqlen=70, min_elements=512))
def test_attention_triton(hold: Callable, case: AttentionCase) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hold("attention, triton interpreter, fuzz", check_attention(case, "triton", written_out=True), case)


@SILENT
@fuzz(60, shrink=False)
@given(patch_embed_cases(max_grid=4, min_elements=512))
def test_patch_embed_triton(hold: Callable, case: PatchEmbedCase) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    hold("patch_embed, triton interpreter, fuzz", check_patch_embed(case, "triton"), case)
