"""The Triton attention, executed by Triton's interpreter, against float64; needs TRITON_INTERPRET=1 before triton."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import triton as kernels
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec
from fastvit.kernels.triton import configs
from fastvit.testing import assert_close

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("triton was imported before TRITON_INTERPRET was set", allow_module_level=True)

# numpy warns where the hardware does not: inf - inf and all-NaN maxima are part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def poisoned(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, NAN)


def plain_scores(query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query.to(wide) @ key.to(wide).mT * scale
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """PyTorch's own attention and the LSE; in float64 this is the truth."""
    mask = bias if bias is None or bias.dtype == torch.bool else bias.to(query.dtype)
    if is_causal and mask is not None:
        later = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        mask = mask & ~later if mask.dtype == torch.bool else mask.masked_fill(later, -torch.inf)
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal and mask is None, scale=scale)
    return output, torch.logsumexp(plain_scores(query, key, bias, is_causal, scale), dim=-1)


def written_out_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(QKᵀ)V operation by operation in the dtype of the arguments, and the LSE."""
    assert bias is None
    assert not is_causal
    scores = query @ key.mT * scale
    return torch.softmax(scores, dim=-1) @ value, torch.logsumexp(scores.float(), dim=-1)


def torch_results(
    arguments: dict, dtype: torch.dtype | None = None, attention: Callable[..., tuple[Tensor, Tensor]] = torch_attention
) -> list[Tensor]:
    """Output, LSE and the three gradients by PyTorch, in ``dtype`` or in that of the arguments."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or dtype is None or tensor.dtype == torch.bool else tensor.to(dtype)

    leaves = [cast(arguments[name]).detach().clone().requires_grad_() for name in ("query", "key", "value")]
    output, lse = attention(*leaves, cast(arguments["bias"]), arguments["is_causal"], arguments["scale"])
    grads = [cast(arguments["grad_output"])]
    outputs = [output]
    if arguments["grad_lse"] is not None:
        outputs, grads = [output, lse], [*grads, cast(arguments["grad_lse"])]
    return [output.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads)]


def kernel_results(arguments: dict) -> list[Tensor]:
    """Output, LSE and the three gradients by the kernels, into memory full of NaN."""
    query, key, value, bias = (arguments[name] for name in ("query", "key", "value", "bias"))
    batch, heads, seqlen, _ = query.shape
    output = torch.full((batch, seqlen, heads, value.shape[3]), NAN, dtype=query.dtype).transpose(1, 2)
    lse = torch.full((batch, heads, seqlen), NAN)
    options = {"is_causal": arguments["is_causal"], "scale": arguments["scale"]}
    kernels.attention_forward(query, key, value, bias, output, lse, **options)
    grads = [poisoned(tensor) for tensor in (query, key, value)]
    kernels.attention_backward(
        arguments["grad_output"], arguments["grad_lse"], query, key, value, bias, output, lse, *grads, **options
    )
    return [output, lse, *grads]


def arguments_for(
    seqlen_q: int, seqlen_k: int, head_dim: int, head_dim_v: int, dtype: torch.dtype, *, batch: int = 2, heads: int = 2,
    bias: Tensor | None = None, is_causal: bool = False, scale: float | None = None, sharpness: float = 2.0,
    grad_lse: bool = True,
) -> dict:  # fmt: skip
    return {
        "query": normal(batch, heads, seqlen_q, head_dim, dtype=dtype, seed=1) * sharpness,
        "key": normal(batch, heads, seqlen_k, head_dim, dtype=dtype, seed=2),
        "value": normal(batch, heads, seqlen_k, head_dim_v, dtype=dtype, seed=3),
        "grad_output": normal(batch, heads, seqlen_q, head_dim_v, dtype=dtype, seed=4),
        "grad_lse": normal(batch, heads, seqlen_q, seed=5) if grad_lse else None,
        "bias": None if bias is None else bias.expand(batch, heads, seqlen_q, seqlen_k),
        "is_causal": is_causal,
        "scale": head_dim**-0.5 if scale is None else scale,
    }


def check(arguments: dict, written_out: bool = False) -> None:
    """Apply the rule; ``written_out`` chooses the yardstick of ``fastvit.testing.check_attention``.

    PyTorch's CPU path for Dv != D computes 16 bits in float32. With Dv much larger than D it shows against that that
    Δ = dO · O takes an output that is rounded, and whose P was: with all else exact but dS, dQ is at 1.38 of the limit.
    """
    attention = written_out_attention if written_out else torch_attention
    own_results = torch_results(arguments, attention=attention)
    results = kernel_results(arguments), torch_results(arguments, torch.float64), own_results
    for name, actual, expected, own in zip(("output", "lse", "dQ", "dK", "dV"), *results, strict=True):
        assert_close(actual, expected, own.to(actual.dtype), name)


def bias_for(kind: str, seqlen_q: int, seqlen_k: int, dtype: torch.dtype) -> Tensor | None:
    values = normal(2, 2, seqlen_q, seqlen_k, dtype=dtype, seed=6)
    allowed = values > -0.5
    allowed[0, 1, 0] = False
    return {
        "none": None,
        "bool": allowed,
        "key padding": allowed[:, :1, 1:2] if seqlen_q > 1 else allowed[:, :1],
        "additive": values,
        "float32": values.float(),
        "per head": values[:1],
        "masked rows": values.masked_fill(~allowed, -torch.inf),
    }[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seqlen", [1, 7, 49, 50, 197, 257])
def test_lengths(seqlen: int, dtype: torch.dtype) -> None:
    # The rule compares two largest errors: few rows need many heads for that to be more than luck.
    check(arguments_for(seqlen, seqlen, 64, 64, dtype, batch=1 if seqlen > 7 else 8, heads=2 if seqlen > 7 else 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("head_dim", "head_dim_v"),
    [(1, 1), (8, 8), (32, 32), (72, 72), (80, 80), (88, 88), (128, 128), (200, 200), (256, 256), (64, 40), (16, 130)],
)
def test_head_dims(head_dim: int, head_dim_v: int, dtype: torch.dtype) -> None:
    arguments = arguments_for(50, 50, head_dim, head_dim_v, dtype, batch=1)
    check(arguments, written_out=(head_dim_v, dtype) == (130, torch.float16))


def test_rows_are_promised_to_be_aligned_only_where_all_of_them_are() -> None:
    packed = torch.empty(2, 5, 3, 4, 72).permute(2, 0, 3, 1, 4)  # heads 72 apart, rows 864
    assert configs.rows_aligned(*packed)
    assert configs.rows_aligned(packed[0], torch.empty(1, 1, 1, 8).expand(2, 4, 5, 8))
    for dimension in range(3):
        steps = [8 * 72, 8 * 72, 8 * 72, 1]
        steps[dimension] += 4
        assert not configs.rows_aligned(packed[0], torch.empty(1).as_strided((1, 1, 1, 1), steps))
    assert not configs.rows_aligned(torch.empty(2, 3, 5, 20))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 65), (130, 7), (49, 100)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_cross_and_causal(seqlen_q: int, seqlen_k: int, is_causal: bool, dtype: torch.dtype) -> None:
    check(arguments_for(seqlen_q, seqlen_k, 32, 32, dtype, heads=2 if seqlen_q > 1 else 16, is_causal=is_causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "is_causal"), [(5, 1, False), (1, 9, True)])
def test_a_single_key_stops_the_gradient(seqlen_q: int, seqlen_k: int, is_causal: bool, dtype: torch.dtype) -> None:
    """softmax of one score is 1 whatever the score: what reaches query and key is 0, not a difference of two sums."""
    arguments = arguments_for(seqlen_q, seqlen_k, 80, 80, dtype, is_causal=is_causal, grad_lse=False)
    _, _, grad_query, grad_key, grad_value = kernel_results(arguments)
    assert (grad_query == 0).all()
    assert (grad_key == 0).all()
    assert_close(grad_value[:, :, :1], arguments["grad_output"].double().sum(2, keepdim=True),
                 arguments["grad_output"].sum(2, keepdim=True), "dV")  # fmt: skip
    arguments["value"][0, 0, 0, 3] = NAN
    assert kernel_results(arguments)[2][0, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_over_several_blocks(dtype: torch.dtype) -> None:
    check(arguments_for(197, 197, 64, 64, dtype, batch=1, heads=1, is_causal=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "key padding", "additive", "float32", "per head", "masked rows"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bias(kind: str, is_causal: bool, dtype: torch.dtype) -> None:
    bias = bias_for(kind, 49, 71, dtype)
    # PyTorch has no gradient through the LSE of a row of -inf.
    check(arguments_for(49, 71, 32, 32, dtype, bias=bias, is_causal=is_causal, grad_lse=kind != "masked rows"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_logits(dtype: torch.dtype) -> None:
    arguments = arguments_for(50, 50, 64, 64, dtype, batch=1, sharpness=30.0)
    assert plain_scores(arguments["query"], arguments["key"], None, False, 0.125).abs().max() > 100
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-36, 3.0])
def test_any_scale(scale: float, dtype: torch.dtype) -> None:
    check(arguments_for(50, 70, 16, 16, dtype, batch=1, scale=scale))
    # PyTorch's own causal attention is NaN at a scale of 0 or less; a mask of bools says the same.
    causal = kernel_results(arguments_for(50, 70, 16, 16, dtype, batch=1, scale=scale, is_causal=True))
    earlier = torch.ones(50, 70, dtype=torch.bool).tril()
    masked = kernel_results(arguments_for(50, 70, 16, 16, dtype, batch=1, scale=scale, bias=earlier))
    torch.testing.assert_close(causal, masked)


def test_float32_products_follow_whatever_sets_the_precision() -> None:
    tensor, matmul = SimpleNamespace(dtype=torch.float32, is_cuda=True), torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("high", "tf32"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(precision)
            assert configs.dot_precision(tensor) == expected
        # Reading allow_tf32 raises behind this.
        for expected in ("tf32", "ieee"):
            matmul.fp32_precision = expected
            assert configs.dot_precision(tensor) == expected
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_views(dtype: torch.dtype) -> None:
    """Query, key, value and their gradients are views of [B, N, 3, H, D]; the output's gradient is one expanded row."""
    arguments = arguments_for(50, 50, 64, 64, dtype)
    packed = normal(2, 50, 3, 2, 64, dtype=dtype, seed=7)
    arguments["query"], arguments["key"], arguments["value"] = packed.permute(2, 0, 3, 1, 4).unbind(0)
    arguments["grad_output"] = normal(64, dtype=dtype, seed=8).expand(2, 2, 50, 64)
    arguments["grad_lse"] = torch.ones(()).expand(2, 2, 50)
    check(arguments)
    output, lse = kernel_results(arguments)[:2]
    grad_packed = poisoned(packed)
    kernels.attention_backward(
        arguments["grad_output"], arguments["grad_lse"], *packed.permute(2, 0, 3, 1, 4).unbind(0), None, output, lse,
        *grad_packed.permute(2, 0, 3, 1, 4).unbind(0), is_causal=False, scale=0.125,
    )  # fmt: skip
    separate = torch.stack(kernel_results(arguments)[2:]).permute(1, 3, 0, 2, 4)
    assert torch.equal(grad_packed, separate)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fully_masked_rows(dtype: torch.dtype) -> None:
    bias = torch.ones(1, 1, 70, 70, dtype=torch.bool)
    bias[:, :, [0, 5, 69]] = False
    arguments = arguments_for(70, 70, 32, 32, dtype, bias=bias)
    # What flows into an LSE of -inf must not reach anything.
    arguments["grad_lse"][:, :, [0, 5, 69]] = NAN
    output, lse, grad_query, grad_key, grad_value = kernel_results(arguments)
    for masked in (0, 5, 69):
        assert (output[:, :, masked] == 0).all()
        assert (lse[:, :, masked] == -torch.inf).all()
        assert (grad_query[:, :, masked] == 0).all()
    assert grad_key.isfinite().all()
    assert grad_value.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_not_finite_inputs_reach_the_output_as_in_torch(where: str, bad: float, dtype: torch.dtype) -> None:
    arguments = arguments_for(50, 70, 32, 32, dtype, batch=1, grad_lse=False)
    arguments[where][0, 1, 3, 2] = bad
    output = kernel_results(arguments)[0]
    exact, own = torch_results(arguments, torch.float64)[0], torch_results(arguments)[0]
    assert_close(output[0, 0], exact[0, 0], own[0, 0], "untouched head")
    assert torch.equal(output.isnan(), exact.isnan())
    if where == "query" and bad != bad:
        assert output[0, 1, 3].isnan().all()


def test_row_of_nan_scores_is_not_taken_for_a_masked_row() -> None:
    arguments = arguments_for(20, 20, 16, 16, torch.float32, bias=torch.full((1, 1, 20, 20), NAN))
    output, lse, *grads = kernel_results(arguments)
    assert all(tensor.isnan().all() for tensor in (output, lse, *grads))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_identical(dtype: torch.dtype) -> None:
    arguments = arguments_for(130, 70, 64, 64, dtype, bias=bias_for("additive", 130, 70, dtype))
    for first, second in zip(kernel_results(arguments), kernel_results(arguments), strict=True):
        assert torch.equal(first, second)


def spec(**changes: object) -> AttentionSpec:
    values = AttentionSpec(1, 1, 4, 4, 64, 64, torch.float32, None, False, torch.device("cpu"))
    return values._replace(**changes)


def test_why_not_names_what_does_not_fit() -> None:
    assert kernels.attention_why_not(spec()) == []
    assert "dtype torch.float64" in kernels.attention_why_not(spec(dtype=torch.float64))[0]
    assert "head_dim_v 300: at least 1, at most 256" in kernels.attention_why_not(spec(head_dim_v=300))
    assert "device meta" in kernels.attention_why_not(spec(device=torch.device("meta")))[0]
    patch_spec = PatchEmbedSpec(1, 3, 32, 32, 16, 16, 64, torch.float64, torch.device("cpu"))
    assert "dtype torch.float64" in kernels.patch_embed_why_not(patch_spec)[0]
    assert kernels.patch_embed_why_not(patch_spec._replace(dtype=torch.bfloat16)) == []


def in_clean_python(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return run.stdout.strip()


def test_without_the_interpreter_a_cpu_tensor_is_refused() -> None:
    code = (
        "import torch; from fastvit.kernels import triton; from fastvit.kernels.spec import AttentionSpec;"
        "print(triton.attention_why_not("
        "AttentionSpec(1, 1, 4, 4, 64, 64, torch.float32, None, False, torch.device('cpu'))))"
    )
    assert "TRITON_INTERPRET=1" in in_clean_python(code)


def test_triton_is_imported_at_first_use_and_its_absence_is_named() -> None:
    code = (
        "import sys, fastvit, fastvit.kernels.triton as kernels; assert 'triton' not in sys.modules;"
        "sys.modules['triton'] = None; print(kernels.import_error())"
    )
    assert "triton cannot be imported" in in_clean_python(code)
