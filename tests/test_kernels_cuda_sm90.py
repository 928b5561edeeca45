"""The CUDA C++ attention kernel for sm_90a, run in the emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given

import fastvit.ops as ops
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, Comparison, check_attention
from tests.emulated import emulator, needs_emulator
from tests.kernel_cases import DTYPES, SM90_SEQLENS, families, on_device, sm90_case
from tests.strategies import attention_cases, fuzz

HEAD_DIMS = tuple(SM90_SEQLENS)
Hold = Callable[[str, Iterable[Comparison], object], None]


__all__ = ["emulator"]
pytestmark = needs_emulator


@pytest.fixture(autouse=True)
def sm90(emulator: ModuleType) -> Iterator[None]:
    """Every attention call of a test takes the form for sm_90a or raises."""
    ops.backends.reset_selection()
    with cuda.form("sm90"):
        yield
    ops.backends.reset_selection()


def check(case: AttentionCase) -> list[Comparison]:
    return check_attention(case, "cuda", backward=False, written_out=True)


def case_of(seqlen: int, head_dim: int, dtype: torch.dtype, **fields: object) -> AttentionCase:
    small = {"batch": 1, "num_heads": 2} if seqlen > 300 else {"batch": 2, "num_heads": 2}
    sizes = {"seqlen_q": seqlen, "seqlen_k": seqlen, "head_dim": head_dim, "head_dim_v": head_dim, "dtype": dtype}
    return AttentionCase(**{**small, **sizes, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "seqlen"), [(dim, n) for dim, lengths in SM90_SEQLENS.items() for n in lengths])
def test_the_lengths_of_vision_transformers(
    head_dim: int, seqlen: int, dtype: torch.dtype, hold: Hold, emulator: ModuleType
) -> None:
    case = sm90_case(seqlen, head_dim, dtype)
    assert isinstance(case.case, AttentionCase)
    with on_device(emulator, case):
        hold("sm90", check(case.case), case)
    assert emulator.statistics()["warpgroup_products"] > 0
    assert emulator.statistics()["matrix_products"] == 0


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 197), (197, 50), (65, 264), (64, 65), (130, 300), (50, 1025)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention(seqlen_q: int, seqlen_k: int, head_dim: int, dtype: torch.dtype, hold: Hold) -> None:
    case = case_of(seqlen_q, head_dim, dtype, seqlen_k=seqlen_k, layout="bhnd", batch=1)
    hold("sm90 cross", check(case), case)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_that_pass_through_a_short_ring(head_dim: int, hold: Hold, emulator: ModuleType) -> None:
    emulator.configure(shared_bytes=(140 if head_dim == 64 else 227) * 1024, multiprocessors=2)
    case = case_of(450, head_dim, torch.bfloat16, layout="bnhd")
    hold("sm90 streamed", check(case), case)


@pytest.mark.parametrize(("batch", "heads", "seqlen"), [(3, 7, 50), (1, 5, 197), (2, 3, 257)])
def test_several_heads_of_a_persistent_block(
    batch: int, heads: int, seqlen: int, hold: Hold, emulator: ModuleType
) -> None:
    emulator.configure(multiprocessors=1)
    case = case_of(seqlen, 64, torch.float16, batch=batch, num_heads=heads)
    hold("sm90 heads", check(case), case)
    assert emulator.statistics()["blocks"] == 1


def test_several_blocks_of_one_head(hold: Hold, emulator: ModuleType) -> None:
    emulator.configure(multiprocessors=4)
    case = case_of(257, 64, torch.float16, batch=1, num_heads=1)
    hold("sm90 heads", check(case), case)
    assert emulator.statistics()["blocks"] == 3  # 2, 2 and 1 of its five tiles


@pytest.mark.parametrize("layout", ["packed", "bnhd", "bhnd"])
def test_layouts(layout: str, hold: Hold) -> None:
    case = case_of(50, 64, torch.float16, num_heads=3, layout=layout)
    hold("sm90 layouts", check(case), case)


def test_what_the_form_cannot_run_raises_and_says_why(emulator: ModuleType) -> None:
    def run(query: torch.Tensor, scale: float | None = None, is_causal: bool = False) -> None:
        ops.attention(query, query, query, scale=scale, is_causal=is_causal, backend="cuda")

    good = torch.randn(1, 2, 50, 64, dtype=torch.float16)
    run(good)
    with pytest.raises(RuntimeError, match="accepted are head dims 64 and 128"):
        run(good[..., :32])
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        run(torch.randn(1, 2, 50, 72, dtype=torch.float16)[..., 4:68])
    with pytest.raises(RuntimeError, match="with no dimension expanded"):
        run(good[:, :1].expand(-1, 2, -1, -1))
    # The second is zero in float32.
    for scale in (0.0, 1e-46):
        with pytest.raises(RuntimeError, match="scales > 0"):
            run(good, scale=scale)
    with pytest.raises(RuntimeError, match="without bias, not causal"):
        run(good, is_causal=True)
    emulator.configure(compute_capability=80)
    with pytest.raises(RuntimeError, match="compute capability 80, accepted is 90"):
        run(good)
    with pytest.raises(ValueError, match="accepted are 'automatic' and 'sm90'"), cuda.form("sm100"):
        pass


def test_the_automatic_form_is_the_one_for_sm_80_until_this_one_is_measured(emulator: ModuleType) -> None:
    query = torch.randn(1, 1, 50, 64, dtype=torch.float16)
    with cuda.form("automatic"):
        ops.attention(query, query, query, backend="cuda")
    assert emulator.statistics()["tensor_loads"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_values_that_are_not_finite(which: str, value: float) -> None:
    query, key, values = torch.randn(3, 1, 2, 197, 64, dtype=torch.float16)
    {"query": query, "key": key, "value": values}[which][0, 1, 3, 5] = value
    output, lse = ops.attention(query, key, values, return_lse=True, backend="cuda")
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), values.double())
    with cuda.form("automatic"):
        _, lse_sm80 = ops.attention(query, key, values, return_lse=True, backend="cuda")
    torch.testing.assert_close(output.double(), expected, equal_nan=True, rtol=5e-3, atol=2e-3)
    torch.testing.assert_close(lse, lse_sm80, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_every_order_of_warps_gives_the_same_bits(emulator: ModuleType) -> None:
    query, key, value = torch.randn(3, 2, 3, 257, 64, dtype=torch.bfloat16)
    results = []
    for seed in (0, 0, 1, 2, 3):
        emulator.configure(seed=seed, multiprocessors=2)
        results.append(ops.attention(query, key, value, return_lse=True, backend="cuda"))
    for output, lse in results[1:]:
        assert output.equal(results[0][0])
        assert lse.equal(results[0][1])


@fuzz(100, shrink=False)
@given(attention_cases(max_seqlen=100, min_elements=256, most_heads=12, min_queries=16, keys=(1, 300)))
def test_fuzz(hold: Hold, emulator: ModuleType, case: AttentionCase) -> None:
    head_dim = HEAD_DIMS[case.seed % 2]
    dtype = case.dtype if case.dtype in DTYPES else DTYPES[case.seed // 2 % 2]
    case = replace(case, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype, bias=None, is_causal=False)
    emulator.configure(multiprocessors=1 + case.seed % 5, seed=case.seed)
    hold("sm90 fuzz", check(case), case)
    assert families(emulator.launches()) == {"attention_forward_sm90"}
