"""The attention op as a part of torch: SDPA's signature, bad input, opcheck, compile, export, autocast, checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from tests.test_attention import BACKENDS, qkv


def test_sdpa_signature_and_meaning() -> None:
    query, key, value = qkv(seqlen=21, dim=16)
    mask = torch.rand(2, 1, 21, 21) > 0.2
    for arguments, options in (((), {}), ((mask,), {}), ((None, 0.0, True), {}), ((), {"scale": 0.3})):
        torch.testing.assert_close(
            fastvit.scaled_dot_product_attention(query, key, value, *arguments, **options),
            F.scaled_dot_product_attention(query, key, value, *arguments, **options),
            rtol=1e-5,
            atol=1e-6,
        )
    for shape in ((21, 16), (4, 21, 16), (2, 3, 4, 21, 16)):
        tensors = [torch.randn(shape) for _ in range(3)]
        for attn_mask in (None, torch.rand(*shape[:-2], 21, 21) > 0.2, torch.rand(21, 21) > 0.2):
            torch.testing.assert_close(
                fastvit.scaled_dot_product_attention(*tensors, attn_mask),
                F.scaled_dot_product_attention(*tensors, attn_mask),
                rtol=1e-5,
                atol=1e-6,
            )
    torch.testing.assert_close(
        fastvit.scaled_dot_product_attention(torch.cat([query, query], 1), key, value, enable_gqa=True),
        F.scaled_dot_product_attention(torch.cat([query, query], 1), key, value, enable_gqa=True),
        rtol=1e-5,
        atol=1e-6,
    )


BAD_INPUT: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("rank", lambda: fastvit.attention(torch.zeros(2, 3, 4), *qkv()[1:]), ValueError, r"query: got shape \(2, 3, 4\)"),
    ("type", lambda: fastvit.attention(None, *qkv()[1:]), TypeError, "query: got NoneType"),
    ("heads", lambda: fastvit.attention(*qkv(heads=2)[:1], *qkv()[1:]), ValueError, r"key: got shape \(2, 3, 17, 8\)"),
    ("batch", lambda: fastvit.attention(*qkv(batch=1)[:1], *qkv()[1:]), ValueError, "key: got shape"),
    ("head_dim", lambda: fastvit.attention(*qkv(dim=4)[:1], *qkv()[1:]), ValueError, r"any, 4\)"),
    ("value", lambda: fastvit.attention(*qkv()[:2], *qkv(seqlen=5)[:1]), ValueError, "value: got shape"),
    ("device", lambda: fastvit.attention(*qkv()[:1], *qkv(device="meta")[1:]), ValueError, "key: got device meta"),
    ("dtype", lambda: fastvit.attention(*qkv()[:1], *qkv(dtype=torch.float64)[1:]), TypeError, "key: got dtype"),
    ("integer", lambda: fastvit.attention(*[t.long() for t in qkv()]), TypeError, "query: got dtype torch.int64"),
    ("complex", lambda: fastvit.attention(*qkv(dtype=torch.complex64)), TypeError, "query: got dtype torch.complex64"),
    ("head_dim 0", lambda: fastvit.attention(*qkv(dim=0)), ValueError, "head_dim 0; accepted are 1 to 256"),
    ("head_dim 257", lambda: fastvit.attention(*qkv(dim=257)), ValueError, "head_dim 257"),
    ("scale -1", lambda: fastvit.attention(*qkv(), scale=-1.0), ValueError, "scale: got -1.0"),
    ("scale nan", lambda: fastvit.attention(*qkv(), scale=float("nan")), ValueError, "scale: got nan"),
    ("scale str", lambda: fastvit.attention(*qkv(), scale="1"), TypeError, "scale: got str"),
    ("backend", lambda: fastvit.attention(*qkv(), backend="fast"), ValueError, "backend: got 'fast'; accepted are"),
    ("mask shape", lambda: fastvit.attention(*qkv(), bias=torch.zeros(2, 2, 1, 1)), ValueError, "bias: got shape"),
    ("mask rank", lambda: fastvit.attention(*qkv(), bias=torch.zeros(1, 1, 1, 1, 1)), ValueError, "bias: got shape"),
    (
        "mask dtype",
        lambda: fastvit.attention(*qkv(), bias=torch.ones(1, dtype=torch.int32)),
        TypeError,
        "bias: got dtyp",
    ),
    (
        "mask device",
        lambda: fastvit.attention(*qkv(), bias=torch.ones(1, device="meta")),
        ValueError,
        "bias: got device",
    ),
    (
        "bias gradient",
        lambda: fastvit.attention(*qkv(), bias=torch.zeros(17, 17, requires_grad=True)),
        NotImplementedError,
        "bias: requires grad",
    ),
    ("packed", lambda: fastvit.attention_qkvpacked(torch.zeros(2, 5, 4, 3, 8)), ValueError, "qkv: got shape"),
    ("packed rank", lambda: fastvit.attention_qkvpacked(torch.zeros(2, 5, 24)), ValueError, "qkv: got shape"),
    (
        "dropout",
        lambda: fastvit.scaled_dot_product_attention(*qkv(), dropout_p=0.1),
        NotImplementedError,
        "dropout_p: got 0.1",
    ),
    (
        "mask and causal",
        lambda: fastvit.scaled_dot_product_attention(*qkv(), torch.ones(17, 17) > 0, is_causal=True),
        ValueError,
        "attn_mask: got a mask together with is_causal",
    ),
    (
        "batches of another shape",
        lambda: fastvit.scaled_dot_product_attention(torch.ones(2, 3, 1, 5, 8), *[torch.ones(3, 2, 1, 5, 8)] * 2),
        ValueError,
        r"key: got shape \(3, 2, 1, 5, 8\); accepted are leading dimensions \(2, 3, 1\)",
    ),
    (
        "mask of a batch that is not there",
        lambda: fastvit.scaled_dot_product_attention(*torch.ones(3, 2, 5, 8), torch.zeros(3, 5, 5)),
        ValueError,
        r"attn_mask: got shape \(3, 5, 5\); accepted is what broadcasts to \(2, 5, 5\)",
    ),
    (
        "sdpa mask dtype",
        lambda: fastvit.scaled_dot_product_attention(*qkv(), torch.ones(17, 17, dtype=torch.int32)),
        TypeError,
        "attn_mask: got dtype torch.int32",
    ),
    (
        "sdpa mask gradient",
        lambda: fastvit.scaled_dot_product_attention(*qkv(), torch.zeros(17, 17, requires_grad=True)),
        NotImplementedError,
        "attn_mask: requires grad",
    ),
    (
        "sdpa mask type",
        lambda: fastvit.scaled_dot_product_attention(*torch.ones(3, 2, 5, 8), [[0.0]]),  # type: ignore[arg-type]
        TypeError,
        "attn_mask: got list",
    ),
    (
        "gqa",
        lambda: fastvit.scaled_dot_product_attention(*qkv(heads=3)[:1], *qkv(heads=2)[1:], enable_gqa=True),
        ValueError,
        "key: got shape",
    ),
]


def test_the_ops_refuse_the_gradient_of_a_bias() -> None:
    # What a graph calls that was exported without gradients: no check of the public functions comes before.
    query, key, value = qkv()
    bias = torch.randn(1, 1, query.shape[2], key.shape[2], requires_grad=True)
    qkv_packed = torch.randn(2, 5, 3, 2, 8)
    packed_bias = torch.randn(1, 1, 5, 5, requires_grad=True)
    output, _ = torch.ops.fastvit.attention(query, key, value, bias, False, 1.0, None)
    packed, _ = torch.ops.fastvit.attention_qkvpacked(qkv_packed, packed_bias, False, 1.0, None)
    for result in (output, packed):
        with pytest.raises(NotImplementedError, match="gradient of bias is not supported"):
            result.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_names_the_argument(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_second_derivative_is_refused() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    grad = torch.autograd.grad(fastvit.attention(query, key, value).sum(), query, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    bias = torch.randn(1, 3, 17, 1)
    packed = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    output, lse = torch.ops.fastvit.attention(query, key, value, bias, False, 0.3, backend)
    grad = torch.randn_like(output)
    with torch.no_grad():
        forward = (query.detach(), key.detach(), value.detach(), bias, output.detach(), lse.detach(), False, 0.3)
    for op, arguments in (
        (torch.ops.fastvit.attention, (query, key, value, bias, False, 0.3, backend)),
        (torch.ops.fastvit.attention, (query, key, value, None, True, 0.3, None)),
        (torch.ops.fastvit.attention_qkvpacked, (packed, None, False, 0.3, backend)),
        (torch.ops.fastvit.attention_backward, (grad, None, *forward, backend)),
    ):
        torch.library.opcheck(op.default, arguments)


_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "packed": lambda tensor: torch.stack([tensor.transpose(1, 2)] * 3, 2).unbind(2)[1].transpose(1, 2),
    "tokens first": lambda tensor: tensor.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda tensor: tensor.mT.contiguous().mT,
    "expanded": lambda tensor: tensor[:1, :1].expand_as(tensor),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_gradients_lie_as_compiled_graphs_expect(backend: str, layout: str) -> None:
    inputs = [_LAYOUTS[layout](tensor) for tensor in qkv(dtype=torch.float64)]
    op = torch.ops.fastvit.attention_backward.default
    output, lse = torch.ops.fastvit.attention(*inputs, None, False, 0.3, backend)
    grad = torch.randn_like(output)
    arguments = (grad, torch.randn_like(lse), *inputs, None, output, lse, False, 0.3, backend)
    grads = op(*arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = op(*[mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments])
    assert [grad.stride() for grad in grads] == [fake.stride() for fake in fakes]
    others = op(*arguments[:2], *[tensor.contiguous() for tensor in inputs], *arguments[5:-1], "reference")
    for got, expected in zip(grads, others, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    def layer(packed: Tensor, bias: Tensor) -> Tensor:
        return fastvit.attention_qkvpacked(packed * 2, bias=bias).flatten(2) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for seqlen in (10, 13):
        packed = torch.randn(2, seqlen, 3, 2, 8, requires_grad=True)
        bias = torch.randn(seqlen, seqlen)
        expected = layer(packed, bias)
        torch.testing.assert_close(compiled(packed, bias), expected)
        grads = [torch.autograd.grad(f(packed, bias).square().sum(), packed)[0] for f in (layer, compiled)]
        torch.testing.assert_close(*grads)


def test_export_keeps_the_op_and_runs() -> None:
    class Layer(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return fastvit.attention(query, key, value)

    program = torch.export.export(Layer(), tuple(qkv()), dynamic_shapes=[{0: torch.export.Dim("batch")}] * 3)
    assert "fastvit.attention" in str(program.graph)
    tensors = qkv(batch=5)
    assert torch.equal(program.module()(*tensors), fastvit.attention(*tensors))


def test_autocast_runs_in_its_dtype() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        # As behind a QK norm, which autocast keeps in float32, beside a value that a linear layer made bfloat16.
        output = fastvit.attention(query, key, value.bfloat16(), bias=torch.randn(17, 17))
    assert output.dtype == torch.bfloat16
    grad = torch.autograd.grad(output.sum(), query)[0]
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0


def test_inference_mode_and_checkpointing() -> None:
    packed = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
    with torch.inference_mode():
        assert torch.equal(fastvit.attention_qkvpacked(packed), fastvit.attention_qkvpacked(packed.detach()))
    plain = torch.autograd.grad(fastvit.attention_qkvpacked(packed).sum(), packed)[0]
    saved = torch.utils.checkpoint.checkpoint(fastvit.attention_qkvpacked, packed, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(saved.sum(), packed)[0], plain)
