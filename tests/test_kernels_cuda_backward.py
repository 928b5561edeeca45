"""Attention backward in CUDA C++, executed by the emulator of csrc/emulator, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from torch import Tensor

import fastvit.ops as ops
from fastvit.kernels import cuda as kernels
from fastvit.ops.backends import reset_selection
from fastvit.testing import AttentionCase, Comparison, check_attention, compare
from tests.emulated import in_range
from tests.kernel_cases import HEAD_DIMS, families
from tests.strategies import attention_cases, fuzz

emulator = pytest.importorskip(
    "fastvit._emulator", reason="fastvit._emulator is not built (FASTVIT_BUILD_EMULATOR=1)", exc_type=ImportError
)

F16, BF16 = torch.float16, torch.bfloat16
NAN = float("nan")
# Which form runs follows from the device: where heads are few for its multiprocessors, or too long for its shared
# memory, it is the streaming one.
RESIDENT = {"multiprocessors": 3}
STREAMING = {"multiprocessors": 1000}
SMALL = {"multiprocessors": 3, "shared_bytes": 99 * 1024}
LAUNCHES = {"resident": 1, "streaming": 2}
FORMS = {"resident": RESIDENT, "streaming": STREAMING}

Hold = Callable[..., None]


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTVIT_EMULATE_CUDA", "1")
    reset_selection()
    emulator.configure(**RESIDENT)
    emulator.reset_statistics()
    yield
    assert emulator.statistics()["bank_conflicts"] == 0
    emulator.configure()
    reset_selection()


def normal(*shape: int, dtype: torch.dtype = F16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(
    seqlen_q: int = 70,
    seqlen_k: int = 70,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    dtype: torch.dtype = F16,
    batch: int = 1,
    heads: int = 2,
) -> dict:
    def tensor(seqlen: int, dim: int, seed: int) -> Tensor:
        return normal(batch, seqlen, heads, dim, dtype=dtype, seed=seed).transpose(1, 2)

    head_dim_v = head_dim_v or head_dim
    return {
        "query": tensor(seqlen_q, head_dim, 1),
        "key": tensor(seqlen_k, head_dim, 2),
        "value": tensor(seqlen_k, head_dim_v, 3),
        "grad_output": tensor(seqlen_q, head_dim_v, 4),
        "grad_lse": None,
        "bias": None,
        "is_causal": False,
        "scale": head_dim**-0.5,
    }


def gradients(function: Callable[..., tuple[Tensor, Tensor]], given: dict, dtype: torch.dtype | None) -> list[Tensor]:
    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or tensor.dtype == torch.bool else tensor.to(dtype)

    leaves = [cast(given[name]).detach().requires_grad_() for name in ("query", "key", "value")]
    bias = None if given["bias"] is None else cast(given["bias"])
    output, lse = function(*leaves, bias, given["is_causal"], given["scale"])
    outputs, grads = [output], [cast(given["grad_output"])]
    if given["grad_lse"] is not None:
        outputs, grads = [output, lse], [*grads, given["grad_lse"].to(lse.dtype)]
    return list(torch.autograd.grad(outputs, leaves, grads))


def plain(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ)V operation by operation, in the dtype of its arguments."""
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias.to(scores.dtype)
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores if scores.dtype == torch.float64 else scores.float(), dim=-1)
    return probabilities @ value, lse


def ours(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return ops.attention(
        query, key, value, bias=bias, is_causal=is_causal, scale=scale, return_lse=True, backend="cuda"
    )


def check(given: dict, form: str) -> list[Comparison]:
    """Run ``given`` in one form and apply the rule to the three gradients."""
    emulator.configure(**FORMS[form])
    before = emulator.statistics()["launches"]
    actual = gradients(ours, given, None)
    assert emulator.statistics()["launches"] - before == 1 + LAUNCHES[form]
    results = (actual, gradients(plain, given, torch.float64), gradients(plain, given, None))
    return [compare(*tensors, name) for *tensors, name in zip(*results, ("dQ", "dK", "dV"), strict=True)]


def backward(given: dict, output: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor]) -> None:
    names = ("grad_output", "grad_lse", "query", "key", "value", "bias")
    kernels.attention_backward(
        *(given[name] for name in names), output, lse, *grads, is_causal=given["is_causal"], scale=given["scale"]
    )


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("seqlen", [1, 7, 49, 50, 64, 196, 197, 256, 257])
def test_lengths(seqlen: int, dtype: torch.dtype, hold: Hold) -> None:
    case = AttentionCase(1, 2, seqlen, seqlen, dtype=dtype, sharpness=1.0 if seqlen < 8 else 4.0, seed=seqlen)
    hold("cuda attention backward, resident", check_attention(case, "cuda", written_out=True), case)
    assert emulator.statistics()["launches"] == 2


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "head_dim", "form"),
    [
        (577, 577, 32, "resident"),
        (1025, 100, 32, "resident"),
        (577, 577, 64, "streaming"),
        (1025, 1025, 64, "streaming"),
        (1, 1025, 64, "streaming"),
        (1025, 3, 64, "streaming"),
    ],
)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_long(seqlen_q: int, seqlen_k: int, head_dim: int, form: str, dtype: torch.dtype, hold: Hold) -> None:
    given = arguments(seqlen_q, seqlen_k, head_dim, dtype=dtype, heads=2 if form == "resident" else 1)
    hold(f"cuda attention backward, {form}", check(given, form), (seqlen_q, seqlen_k))


@pytest.mark.parametrize("head_dim", [1, 40, 65, 127, *HEAD_DIMS])
@pytest.mark.parametrize("form", FORMS)
def test_head_dims(head_dim: int, form: str, hold: Hold) -> None:
    label = f"cuda attention backward, {form}"
    hold(label, check(arguments(70, 50, head_dim), form), head_dim)
    masked = arguments(66, 90, head_dim, max(1, head_dim - 9), dtype=BF16)
    masked["bias"] = normal(1, 1, 66, 90, dtype=BF16, seed=9)
    hold(label, check(masked, form), head_dim)


@pytest.mark.parametrize("head_dim_v", [8, 33, 128])
@pytest.mark.parametrize("form", FORMS)
def test_head_dim_of_values(head_dim_v: int, form: str, hold: Hold) -> None:
    hold(f"cuda attention backward, {form}", check(arguments(head_dim_v=head_dim_v), form), head_dim_v)


@pytest.mark.parametrize("shape", [(2, 2, 70, 83), (1, 2, 70, 83), (2, 1, 1, 83), (1, 1, 70, 1)])
@pytest.mark.parametrize("bias", [torch.bool, torch.float32, F16])
@pytest.mark.parametrize("form", FORMS)
def test_bias(shape: tuple[int, ...], bias: torch.dtype, form: str, hold: Hold) -> None:
    given = arguments(70, 83, 32, batch=2)
    values = normal(*shape, seed=7)
    given["bias"] = values > -0.5 if bias == torch.bool else values.to(bias)
    hold(f"cuda attention backward with bias, {form}", check(given, form), (shape, bias))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias_dtype", [torch.float64, BF16])
def test_bias_of_another_dtype(bias_dtype: torch.dtype, form: str) -> None:
    """The kernel reads every type of bias as it is: the same values give the same bits."""
    given = arguments(70, 70, 32)
    values = normal(1, 2, 70, 70, dtype=BF16, seed=7)
    results = []
    emulator.configure(**FORMS[form])
    for dtype in (torch.float32, bias_dtype):
        given["bias"] = values.to(dtype)
        output, lse = torch.empty_like(given["query"]), torch.empty(1, 2, 70)
        kernels.attention_forward(
            *(given[name] for name in ("query", "key", "value", "bias")), output, lse, is_causal=False, scale=0.2
        )
        grads = tuple(torch.empty_like(given[name]) for name in ("query", "key", "value"))
        backward(given, output, lse, grads)
        results.append(grads)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
def test_fully_masked_rows(form: str, hold: Hold) -> None:
    given = arguments(70, 83, 32)
    given["bias"] = normal(1, 2, 70, 83, seed=5) > 0
    given["bias"][:, :, 5] = False
    given["bias"][:, 1, 64:] = False
    given["bias"][:, 0, :, 17] = False
    given["grad_lse"] = normal(1, 2, 70, dtype=torch.float32, seed=6).masked_fill(~given["bias"].any(-1), 0.0)
    emulator.configure(**FORMS[form])
    grad_query, grad_key, grad_value = gradients(ours, given, None)
    assert torch.count_nonzero(grad_query[:, :, 5]) == torch.count_nonzero(grad_query[:, 1, 64:]) == 0
    assert torch.count_nonzero(grad_key[:, 0, 17]) == torch.count_nonzero(grad_value[:, 0, 17]) == 0
    given["grad_lse"] = None
    hold(f"cuda attention backward with bias, {form}", check(given, form), "fully masked rows")


@pytest.mark.parametrize("form", FORMS)
def test_all_masked(form: str) -> None:
    given = arguments(70, 70, 32)
    given["bias"] = torch.zeros(1, 1, 70, 70, dtype=torch.bool)
    emulator.configure(**FORMS[form])
    for grad in gradients(ours, given, None):
        assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("lengths", [(77, 77), (40, 200), (200, 70), (230, 230)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
def test_causal(lengths: tuple[int, int], form: str, bias: bool, hold: Hold) -> None:
    given = arguments(*lengths, 32, dtype=BF16)
    given["is_causal"] = True
    given["bias"] = normal(1, 1, *lengths, dtype=BF16, seed=3) if bias else None
    hold(f"cuda attention backward causal, {form}", check(given, form), lengths)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_grad_lse(form: str, dtype: torch.dtype, hold: Hold) -> None:
    given = arguments(197, 90, dtype=dtype)
    given["grad_lse"] = normal(1, 2, 197, dtype=torch.float32, seed=5)
    hold(f"cuda attention backward with grad_lse, {form}", check(given, form), dtype)
    given["grad_output"] = torch.zeros_like(given["grad_output"])
    hold(f"cuda attention backward with grad_lse, {form}", check(given, form), dtype)


def oddly(tensor: Tensor, offset: int) -> Tensor:
    """The same values with odd strides, where no row begins at a multiple of 16 bytes, between NaN."""
    batch, heads, rows, columns = tensor.shape
    storage = torch.full((batch * rows * heads * (columns + 3) + offset,), NAN, dtype=tensor.dtype)
    view = storage[offset:].view(batch, rows, heads, columns + 3)[..., :columns].transpose(1, 2)
    return view.copy_(tensor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [40, 65])
def test_odd_strides(form: str, head_dim: int) -> None:
    """Whatever the strides, the same bits, and nothing is written between the rows of the results."""
    given = arguments(70, 83, head_dim, dtype=BF16)
    emulator.configure(**FORMS[form])
    names = ("query", "key", "value")
    output, lse = torch.empty_like(given["query"]), torch.empty(1, 2, 70)
    kernels.attention_forward(*(given[n] for n in names), None, output, lse, is_causal=False, scale=given["scale"])
    expected = tuple(torch.empty_like(given[name]) for name in names)
    backward(given, output, lse, expected)
    odd = given | {name: oddly(given[name], 1) for name in (*names, "grad_output")}
    grads = tuple(oddly(torch.zeros_like(given[name]), 5) for name in names)
    backward(odd, oddly(output, 3), lse, grads)
    for grad, other in zip(grads, expected, strict=True):
        assert torch.equal(grad, other)
        batch, heads, rows, columns = grad.shape
        whole = grad.as_strided((batch, rows, heads, columns + 3), (1, heads * (columns + 3), columns + 3, 1))
        assert whole[:, : rows - 1, :, columns:].isnan().all()


@pytest.mark.parametrize("form", FORMS)
def test_repeats_bit_for_bit(form: str) -> None:
    given = arguments(197, 130)
    results = []
    for seed in (0, 1, 2):
        emulator.configure(**FORMS[form], seed=seed)
        results.append(gradients(ours, given, None))
    for again in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], again, strict=True))


def test_both_forms_agree_bit_for_bit() -> None:
    """A row's sums are made in the same order in both forms."""
    given = arguments(197, 130, 72, dtype=BF16)
    results = []
    for settings in (RESIDENT, STREAMING, SMALL):
        emulator.configure(**settings)
        results.append(gradients(ours, given, None))
    for again in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], again, strict=True))


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_small_device(dim: int, hold: Hold) -> None:
    """With 99 KB of shared memory (sm_86, sm_89) every launch fits; here with as many warps as a block may have."""
    emulator.configure(**SMALL)
    seqlen = 200 if dim > 32 else 400
    case = AttentionCase(1, 2, seqlen, seqlen, dim, dim, dtype=F16, sharpness=2.0, seed=dim)
    hold("cuda attention backward, streaming", check_attention(case, "cuda", written_out=True), case)
    assert emulator.statistics()["launches"] == 3


def test_more_heads_than_blocks(hold: Hold) -> None:
    """Persistent blocks take several heads; other warps than in the shapes above."""
    emulator.configure(multiprocessors=1, seed=3)
    case = AttentionCase(3, 5, 100, 30, 32, 32, dtype=F16, layout="bnhd")
    hold("cuda attention backward, resident", check_attention(case, "cuda", written_out=True), case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
@pytest.mark.parametrize("bad", [NAN, torch.inf])
def test_non_finite_inputs_propagate(name: str, bad: float, form: str) -> None:
    """NaN where float64 has NaN, and only in the head where it is; an infinity may become NaN on the way."""
    given = arguments(70, 70, 32)
    given[name] = given[name].clone()
    given[name][0, 1, 3, 5] = bad
    emulator.configure(**FORMS[form])
    expected = gradients(plain, given, torch.float64)
    for actual, truth in zip(gradients(ours, given, None), expected, strict=True):
        assert torch.equal(actual.isfinite(), truth.isfinite())
        assert actual[0, 0].isfinite().all()


def test_a_score_of_minus_infinity_changes_nothing_else() -> None:
    """The zeros beyond a sequence do not meet the infinity."""
    given = arguments(70, 70, 32)
    given["query"] = given["query"].abs()
    given["key"] = given["key"].clone()
    given["key"][0, :, 3, 5] = -torch.inf
    grad_query, grad_key, grad_value = gradients(ours, given, None)
    assert grad_query[..., :5].isfinite().all()
    assert torch.count_nonzero(grad_key[:, :, 3]) == torch.count_nonzero(grad_value[:, :, 3]) == 0
    assert grad_key.isfinite().all()
    assert grad_value.isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (2, 0, 5, 7), (1, 2, 0, 7), (1, 2, 5, 0)])
def test_empty(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, seqlen_q, seqlen_k = sizes
    given = arguments(seqlen_q, seqlen_k, 32, batch=batch, heads=heads)
    for grad in gradients(ours, given, None):
        assert torch.count_nonzero(grad) == 0


@fuzz(100, shrink=False)
@given(attention_cases(max_seqlen=64, most_heads=192))
def test_fuzz_resident(hold: Hold, case: AttentionCase) -> None:
    hold("cuda attention backward, fuzz, resident", check_attention(in_range(case), "cuda", written_out=True), case)
    assert families(emulator.launches()) == {"attention_forward_resident", "attention_backward_resident"}


# Up to 64 rows make too little work to deal out, and any form takes them whole.
@fuzz(100, shrink=False)
@given(attention_cases(max_seqlen=90, min_elements=384, most_heads=24, min_queries=16, keys=(65, 100)))
def test_fuzz_streaming(hold: Hold, case: AttentionCase) -> None:
    emulator.configure(**STREAMING, seed=case.seed)
    hold("cuda attention backward, fuzz, streaming", check_attention(in_range(case), "cuda", written_out=True), case)
    assert families(emulator.launches()) == {"attention_forward_resident", "attention_backward_streaming"}
