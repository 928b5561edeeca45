"""Attention forward of csrc/cuda, executed by the emulator: every form, head dim and feature, against float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given

import fastvit
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, check_attention
from tests.emulated import A100, H100, RTX, STREAMING, emulator, in_range, needs_emulator
from tests.kernel_cases import DTYPES, HEAD_DIMS, families
from tests.strategies import attention_cases, fuzz

__all__ = ["emulator"]
pytestmark = needs_emulator

SEQLENS = (1, 7, 49, 50, 64, 196, 197, 256, 257, 577, 1025)
LABEL = "attention forward, cuda in the emulator"


def check(hold: Callable, case: AttentionCase, label: str = LABEL) -> None:
    hold(label, check_attention(case, "cuda", backward=False, written_out=True), case)


def run(case: AttentionCase) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = case.tensors()
    return fastvit.attention(
        tensors["query"], tensors["key"], tensors["value"], bias=tensors["bias"], is_causal=case.is_causal,
        scale=case.scale, return_lse=True, backend="cuda",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", SEQLENS)
def test_seqlens(hold: Callable, emulator: ModuleType, seqlen: int, dtype: torch.dtype) -> None:
    batch = 2 if seqlen < 500 else 1
    check(hold, AttentionCase(batch, 2, seqlen, seqlen, dtype=dtype, sharpness=4.0, seed=seqlen))
    assert emulator.statistics()["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 3, 40, 65, 127])
def test_head_dims(hold: Callable, emulator: ModuleType, head_dim: int, dtype: torch.dtype) -> None:
    for seqlen in (50, 197, 300):
        check(hold, AttentionCase(1, 2, seqlen, seqlen, head_dim, head_dim, dtype, seed=head_dim))
    assert emulator.statistics()["bank_conflicts"] == 0


@pytest.mark.parametrize("head_dims", [(64, 32), (32, 64), (8, 128), (128, 8), (72, 40), (33, 17)])
def test_value_heads_of_another_size(hold: Callable, emulator: ModuleType, head_dims: tuple[int, int]) -> None:
    for seqlen in (33, 197):
        check(hold, AttentionCase(1, 2, seqlen, seqlen, *head_dims, torch.bfloat16))


@pytest.mark.parametrize("seqlens", [(1, 257), (257, 1), (16, 64), (50, 197), (197, 50), (70, 600), (600, 70)])
def test_cross_attention(hold: Callable, emulator: ModuleType, seqlens: tuple[int, int]) -> None:
    for layout, dtype in (("bnhd", torch.float16), ("bhnd", torch.float16), ("bnhd", torch.bfloat16)):
        check(hold, AttentionCase(2, 2, *seqlens, dtype=dtype, layout=layout))


@pytest.mark.parametrize("bias", ["bool", "additive", "float32"])
@pytest.mark.parametrize("broadcast", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)])
def test_biases(hold: Callable, emulator: ModuleType, bias: str, broadcast: tuple[int, ...]) -> None:
    for seqlen, dtype in ((49, torch.float16), (197, torch.bfloat16)):
        shape = tuple(1 if flag else size for flag, size in zip(broadcast, (2, 2, seqlen, seqlen), strict=True))
        check(hold, AttentionCase(2, 2, seqlen, seqlen, 32, 32, dtype, bias=bias, bias_shape=shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("shared_bytes", [H100, STREAMING])
@pytest.mark.parametrize("seqlens", [(77, 77), (197, 197), (130, 300), (300, 130)])
def test_causal(hold: Callable, emulator: ModuleType, seqlens: tuple[int, int], shared_bytes: int) -> None:
    emulator.configure(shared_bytes=shared_bytes)
    check(hold, AttentionCase(1, 2, *seqlens, dtype=torch.bfloat16, is_causal=True, layout="bnhd"))
    bias_shape = (1, 1, 1, seqlens[1])
    check(hold, AttentionCase(1, 2, *seqlens, 32, 32, is_causal=True, bias="bool", bias_shape=bias_shape,
                              dtype=torch.float16, layout="bnhd"))  # fmt: skip


@pytest.mark.parametrize("shared_bytes", [A100, RTX])
def test_smaller_devices_take_other_forms(hold: Callable, emulator: ModuleType, shared_bytes: int) -> None:
    emulator.configure(shared_bytes=shared_bytes)
    for seqlen, head_dim in ((50, 64), (197, 64), (257, 64), (257, 80), (577, 64), (197, 104)):
        check(hold, AttentionCase(1, 2, seqlen, seqlen, head_dim, head_dim, torch.float16))
    check(hold, AttentionCase(1, 2, 257, 257, bias="additive", dtype=torch.float16))


def test_which_form_a_shape_takes(emulator: ModuleType) -> None:
    def launched(seqlen: int, heads: int = 8) -> tuple[int, int]:
        emulator.reset_statistics()
        run(AttentionCase(1, heads, seqlen, seqlen, dtype=torch.float16))
        statistics = emulator.statistics()
        assert statistics["launches"] == 1
        return statistics["blocks"], statistics["largest_shared_bytes"]

    row = 64 * 2  # bytes
    # Resident with two stages, persistent: as many blocks as fit beside each other on three multiprocessors.
    assert launched(197) == (3, 2 * 2 * 208 * row + 7 * 16 * row)
    # One head only: its tiles of queries are shared by several blocks.
    assert launched(197, heads=1) == (2, 2 * 208 * row + 7 * 16 * row)
    # Too long for shared memory: streaming, 128 queries to a block.
    assert launched(1025, heads=1) == (9, 4 * 64 * row + 128 * row)
    # By shared memory five blocks of a short sequence share a multiprocessor; registers may have room for two.
    assert launched(50, heads=30)[0] == 15
    asked = []

    def occupancy(kernel: str, threads: int, shared_bytes: int) -> int:
        asked.append((kernel, threads, shared_bytes))
        return 2

    emulator.configure(occupancy=occupancy)
    assert launched(50, heads=30)[0] == 6
    ((kernel, threads, shared_bytes),) = asked
    assert "attention_forward_resident" in kernel
    assert (threads, shared_bytes) == emulator.launches()[0][2:]


def test_persistent_blocks_take_many_heads_and_a_part_of_one(hold: Callable, emulator: ModuleType) -> None:
    for multiprocessors in (1, 2, 16):
        emulator.configure(multiprocessors=multiprocessors)
        check(hold, AttentionCase(3, 5, 50, 50, 32, 32, torch.float16))
        check(hold, AttentionCase(1, 1, 197, 197, dtype=torch.float16))
        check(hold, AttentionCase(1, 3, 300, 70, dtype=torch.bfloat16, layout="bnhd"))


def test_the_order_of_warps_and_runs_does_not_matter(emulator: ModuleType) -> None:
    for seqlen, shared_bytes in ((197, H100), (300, H100), (300, STREAMING)):
        results = []
        for seed in (0, 0, 1, 2):
            emulator.configure(seed=seed, shared_bytes=shared_bytes)
            results.append(run(AttentionCase(1, 2, seqlen, seqlen, dtype=torch.bfloat16, bias="additive")))
        for output, lse in results[1:]:
            assert torch.equal(output, results[0][0])
            assert torch.equal(lse, results[0][1])


@pytest.mark.parametrize("shared_bytes", [H100, STREAMING])
def test_fully_masked_rows_are_zero(emulator: ModuleType, shared_bytes: int) -> None:
    emulator.configure(shared_bytes=shared_bytes)
    query, key, value = (torch.randn(1, 2, 200, 64, dtype=torch.float16) for _ in range(3))
    mask = torch.rand(200, 200) > 0.3
    mask[[3, 17, 199]] = False
    output, lse = fastvit.attention(query, key, value, bias=mask, return_lse=True, backend="cuda")
    empty = torch.zeros(200, dtype=torch.bool)
    empty[[3, 17, 199]] = True
    assert (output[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -torch.inf).all()
    assert output.isfinite().all()
    assert lse[:, :, ~empty].isfinite().all()


@pytest.mark.parametrize("seqlen", [50, 197, 300])
def test_a_scale_of_zero_is_the_mean(emulator: ModuleType, seqlen: int) -> None:
    query, key, value = (torch.randn(1, 2, seqlen, 64, dtype=torch.float16, requires_grad=True) for _ in range(3))
    output = fastvit.attention(query, key, value, scale=0.0, backend="cuda")
    mean = value.mean(dim=2, keepdim=True, dtype=torch.float32).expand_as(output)
    torch.testing.assert_close(output.float(), mean, rtol=2e-3, atol=1e-4)
    gradients = torch.autograd.grad(output.sum(), (query, key, value))
    assert (gradients[0] == 0).all()
    assert (gradients[1] == 0).all()
    torch.testing.assert_close(gradients[2].float(), torch.ones(1, 2, seqlen, 64), rtol=2e-3, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_and_inf_arrive_where_torch_has_them(emulator: ModuleType, where: int, value: float) -> None:
    tensors = [torch.randn(2, 3, 40, 16, dtype=torch.bfloat16) for _ in range(3)]
    tensors[where][1, 2, 5, 3] = value
    result = fastvit.attention(*tensors, backend="cuda")
    # In float32: torch's bfloat16 path on the CPU loses an infinity.
    expected = torch.nn.functional.scaled_dot_product_attention(*(tensor.float() for tensor in tensors))
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.isfinite(), expected.isfinite())


def test_views_that_no_vector_load_can_take(hold: Callable, emulator: ModuleType) -> None:
    wide = torch.randn(2, 60, 3, 37 * 2, dtype=torch.float16)
    query, key, value = (wide[..., i : i + 33].transpose(1, 2) for i in (1, 2, 5))
    assert query.data_ptr() % 16
    plain = [tensor.contiguous() for tensor in (query, key, value)]
    assert torch.equal(fastvit.attention(query, key, value, backend="cuda"), fastvit.attention(*plain, backend="cuda"))
    expanded = key[:1, :1].expand(2, 3, 60, 33)
    assert torch.equal(
        fastvit.attention(query, expanded, value, backend="cuda"),
        fastvit.attention(query, expanded.contiguous(), value, backend="cuda"),
    )


def test_more_heads_than_a_grid_dimension_holds(emulator: ModuleType) -> None:
    emulator.configure(multiprocessors=100_000)  # as many blocks as heads
    query, key, value = (torch.randn(66_000, 1, 2, 8, dtype=torch.float16) for _ in range(3))
    few = slice(65_990, 66_000)
    result = fastvit.attention(query, key, value, backend="cuda")
    assert torch.equal(result[few], fastvit.attention(query[few], key[few], value[few], backend="cuda"))


def test_addresses_past_2_to_the_31(emulator: ModuleType) -> None:
    # A view whose heads lie 2^31 elements apart: virtual memory, of which a few pages are touched.
    torch.use_deterministic_algorithms(False)  # which fills memory: see conftest
    far = torch.empty(2**31 + 2**20, dtype=torch.float16)
    query = far.as_strided((1, 2, 20, 64), (0, 2**31, 64, 1))
    query.copy_(torch.randn(1, 2, 20, 64))
    key, value = (torch.randn(1, 2, 20, 64, dtype=torch.float16) for _ in range(2))
    assert torch.equal(
        fastvit.attention(query, key, value, backend="cuda"),
        fastvit.attention(query.contiguous(), key, value, backend="cuda"),
    )


def test_what_the_kernels_cannot_do_is_said() -> None:
    query = torch.randn(1, 1, 4, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="cuda: cannot: device cpu: only CUDA tensors"):
        fastvit.attention(query, query, query, backend="cuda")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "message"),
    [
        (torch.float32, 8, "dtype torch.float32: only float16 and bfloat16"),
        (torch.float16, 129, "head_dim 129: at most"),
    ],
)
def test_what_the_emulated_kernels_cannot_do_is_said(
    emulator: ModuleType, dtype: torch.dtype, head_dim: int, message: str
) -> None:
    query = torch.randn(1, 1, 4, head_dim, dtype=dtype)
    with pytest.raises(RuntimeError, match=message):
        fastvit.attention(query, query, query, backend="cuda")


def test_positions_end_at_thirty_two_bits(emulator: ModuleType) -> None:
    query = torch.randn(1, 1, 1, 8, dtype=torch.float16)
    key = query.expand(1, 1, 2**30 + 1, 8)
    with pytest.raises(RuntimeError, match=r"seqlen 1073741825: at most 2\^30"):
        fastvit.attention(query, key, key, backend="cuda")
    key = query.expand(2**6, 2**6, 2**23, 8)
    with pytest.raises(RuntimeError, match=r"batch · heads · seqlen / 16 is over 2\^30"):
        fastvit.attention(query.expand(2**6, 2**6, 1, 8), key, key, backend="cuda")
    key = query.expand(1, 1, 2**30 + 1, 8)
    output, lse = torch.empty_like(query), torch.empty(1, 1, 1)
    with pytest.raises(RuntimeError, match="seqlen and batch · heads · seqlen / 16 are counted to 2"):
        cuda.attention_forward(query, key, key, None, output, lse, is_causal=False, scale=1.0)
    assert not emulator.launches()


@fuzz(100, shrink=False)
@given(attention_cases(max_seqlen=150))
def test_fuzz_resident(hold: Callable, emulator: ModuleType, case: AttentionCase) -> None:
    check(hold, in_range(case), "attention forward, cuda in the emulator, fuzz, resident")
    assert families(emulator.launches()) == {"attention_forward_resident"}


# From 193 keys on those of a head do not fit into the memory that the streaming form takes.
@fuzz(100, shrink=False)
@given(attention_cases(max_seqlen=80, min_elements=256, most_heads=16, min_queries=16, keys=(193, 280)))
def test_fuzz_streaming(hold: Callable, emulator: ModuleType, case: AttentionCase) -> None:
    case = in_range(case)
    head_dim = next(dim for dim in HEAD_DIMS if dim >= max(case.head_dim, case.head_dim_v))
    emulator.configure(shared_bytes=768 * head_dim, multiprocessors=1 + case.seed % 5, seed=case.seed)
    check(hold, case, "attention forward, cuda in the emulator, fuzz, streaming")
    assert families(emulator.launches()) == {"attention_forward_streaming"}
