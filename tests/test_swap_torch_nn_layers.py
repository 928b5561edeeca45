"""Swapping torch.nn's transformer layers: torch's inference path does not bypass their attention."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastvit.adapters.torch_nn import FusedTransformerEncoderLayer
from fastvit.modules.multihead_attention import FusedMultiheadAttention
from fastvit.swap import swap, unswap
from tests.swapping import PACKED, SEPARATE, normal, ops_run, state
from tests.torch_paths import check, double, lively, step, torchs_own

BATCH, LENGTH, MEMORY, WIDTH, HEADS = 4, 12, 9, 96, 4
SIZES = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 128}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nested tensors is in prototype.*")
        warnings.filterwarnings("ignore", message="enable_nested_tensor is True")
        warnings.filterwarnings("ignore", message="Support for mismatched")
        yield


def encoder(layers: int = 2, enable_nested_tensor: bool = True, norm: bool = True, **options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(**SIZES, **{"batch_first": True, "dropout": 0.0, **options})
    final = nn.LayerNorm(WIDTH) if norm else None
    return lively(nn.TransformerEncoder(layer, layers, final, enable_nested_tensor=enable_nested_tensor))


def transformer(**options: Any) -> nn.Module:
    options = {"num_encoder_layers": 1, "num_decoder_layers": 2, "batch_first": True, "dropout": 0.0, **options}
    return lively(nn.Transformer(**SIZES, **options))


def padding(*lengths: int, seqlen: int = LENGTH) -> Tensor:
    return torch.arange(seqlen) >= torch.tensor(lengths)[:, None]


def tokens(length: int = LENGTH, seed: int = 1, batch: int = BATCH) -> Tensor:
    return normal(batch, length, WIDTH, seed=seed)


def swapped(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    assert swap(model, strict=True).counts["fused"]
    return model


PADDING = padding(12, 7, 3, 1)
NOT_LEFT_ALIGNED = PADDING.flip(1)
CAUSAL = nn.Transformer.generate_square_subsequent_mask(LENGTH)
ENCODER_CALLS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "padding": {"src_key_padding_mask": PADDING},
    "padding on the left": {"src_key_padding_mask": NOT_LEFT_ALIGNED},
    "causal": {"mask": CAUSAL},
    "causal hint and padding": {"mask": CAUSAL, "is_causal": True, "src_key_padding_mask": PADDING},
    "2-D": {"mask": CAUSAL.isinf().flip(0)},
}


@pytest.mark.parametrize("call", ENCODER_CALLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "activation": "gelu", "norm": False},
        {"enable_nested_tensor": False},
        {"bias": False},
        {"batch_first": False, "activation": nn.SiLU()},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_encoders_attend_fused_in_every_mode(options: dict[str, Any], call: str) -> None:
    model, x, call = encoder(**options), tokens(), ENCODER_CALLS[call]
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    fused, exact = swapped(model), copy.deepcopy(model).double()
    wide = {key: double(value) for key, value in call.items()}

    truth = step(functools.partial(exact, **wide), exact, x.double())
    own = torchs_own(lambda: step(functools.partial(model, **call), model, x))
    mine = step(functools.partial(fused, **call), fused, x)
    check(mine, truth, own, "training step")

    # Inference, where torch takes other paths: padded tokens come back as 0 from those with nested tensors.
    with torch.no_grad():
        truth = {"output": exact(x.double(), **wide)}
        own = torchs_own(lambda: {"output": model(x, **call)})
        mine = {"output": fused(x, **call)}
        check(mine, truth, own, "inference")
        assert ops_run(lambda: fused(x, **call)) == {PACKED}
        assert ops_run(lambda: model(x, **call)) == set()


class AddsToTheMask(nn.Module):
    """Somebody's attention: torch's, with a bias of distance on top of the mask that it is given."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **rest: Any) -> Any:
        return self.attention(query, key, value, attn_mask=attn_mask - torch.arange(key.shape[1]) / 8, **rest)


def test_self_attn_is_given_additive_masks_as_by_torch() -> None:
    # In training, where torch does not pass self_attn by.
    layer = lively(nn.TransformerEncoderLayer(**SIZES, batch_first=True, dropout=0.0)).train()
    layer.self_attn = AddsToTheMask(layer.self_attn)
    x, future = tokens(), torch.ones(12, 12, dtype=torch.bool).triu(1)
    call = {"src_mask": future, "src_key_padding_mask": padding(12, 7, 5, 1)}
    expected = layer(x, **call)
    assert swap(layer, strict=True).counts["fused"] == 2
    torch.testing.assert_close(layer(x, **call), expected, rtol=1e-5, atol=1e-5)
    assert ops_run(lambda: layer(x, **call)) == {PACKED}


def test_nested_tensors_are_still_made_of_padding() -> None:
    model = encoder(norm=False)
    fused = swapped(model)
    with torch.no_grad():
        output = fused(tokens(), src_key_padding_mask=PADDING)
    assert (output[PADDING] == 0).all()
    assert (fused(tokens(), src_key_padding_mask=PADDING)[PADDING] != 0).all()


def test_a_sequence_of_padding_alone() -> None:
    model, mask = encoder(), padding(12, 7, 0, 1)
    fused = swapped(model)
    for is_inference in (True, False):
        with torch.set_grad_enabled(not is_inference):
            expected, actual = (m(tokens(), src_key_padding_mask=mask) for m in (model, fused))
        assert expected.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_gets_a_nested_tensor_without_an_encoder() -> None:
    layer = lively(nn.TransformerEncoderLayer(**SIZES, batch_first=True)).requires_grad_(False)
    fused = swapped(layer)
    nested = torch.nested.nested_tensor([normal(length, WIDTH, seed=length) for length in (5, 12, 1)])
    for actual, expected in zip(fused(nested).unbind(), layer(nested).unbind(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ops_run(lambda: fused(nested)) == {PACKED}


def test_layers_without_an_encoder_and_without_a_batch() -> None:
    layer = lively(nn.TransformerEncoderLayer(**SIZES, batch_first=True))
    fused = swapped(layer)
    with torch.no_grad():
        for x in (tokens(), tokens()[0]):
            for call in ({}, {"src_mask": CAUSAL}, {"src_mask": CAUSAL, "is_causal": True}):
                torch.testing.assert_close(fused(x, **call), layer(x, **call), rtol=1e-5, atol=1e-5)
                assert ops_run(lambda x=x, call=call: fused(x, **call)) == {PACKED}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("call", ["causal", "causal and padding", "memory mask"])
def test_transformers_with_a_decoder(batch_first: bool, norm_first: bool, call: str) -> None:
    model = transformer(batch_first=batch_first, norm_first=norm_first)
    source, target = tokens(MEMORY, seed=2), tokens()
    if not batch_first:
        source, target = source.transpose(0, 1).contiguous(), target.transpose(0, 1).contiguous()
    options: dict[str, Any] = {"tgt_mask": CAUSAL}
    if call == "causal and padding":
        memory_padding = padding(9, 4, 2, 6, seqlen=MEMORY)
        options |= {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": memory_padding}
        options |= {"src_key_padding_mask": memory_padding}
    if call == "memory mask":
        options["memory_mask"] = normal(LENGTH, MEMORY, seed=5)
    wide = {key: double(value) for key, value in options.items()}
    fused, exact = swapped(model), copy.deepcopy(model).double()
    truth = step(functools.partial(exact, **wide), exact, source.double(), target.double())
    own = torchs_own(lambda: step(functools.partial(model, **options), model, source, target))
    check(step(functools.partial(fused, **options), fused, source, target), truth, own, call)
    with torch.no_grad():
        assert ops_run(lambda: fused(source, target, **options)) == {PACKED, SEPARATE}
        torch.testing.assert_close(
            fused(source, target, **options), model(source, target, **options), rtol=1e-4, atol=1e-4
        )


def test_the_report_has_a_row_for_each_attention() -> None:
    model = transformer()
    report = swap(model, strict=True)
    assert [(row.name, row.original_type) for row in report.rows] == [
        ("encoder.layers.0", "TransformerEncoderLayer"),
        ("encoder.layers.0.self_attn", "MultiheadAttention"),
        ("decoder.layers.0.self_attn", "MultiheadAttention"),
        ("decoder.layers.0.multihead_attn", "MultiheadAttention"),
        ("decoder.layers.1.self_attn", "MultiheadAttention"),
        ("decoder.layers.1.multihead_attn", "MultiheadAttention"),
    ]
    assert "calls self_attn in inference too" in report.rows[0].reason
    assert swap(model).counts == {"already fused": 6}
    assert unswap(model).counts == {"restored": 6}


def test_unswapping_restores_everything_bit_for_bit() -> None:
    model = encoder()
    x = tokens()
    before, classes = state(model), [type(module) for module in model.modules()]
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=PADDING)
        swap(model, backend="reference")
        assert type(model.layers[0]) is FusedTransformerEncoderLayer
        assert isinstance(model.layers[0], nn.TransformerEncoderLayer)
        assert type(model.layers[0].self_attn) is FusedMultiheadAttention
        assert model.layers[0].activation_relu_or_gelu == 1
        unswap(model)
        assert torch.equal(model(x, src_key_padding_mask=PADDING), expected)
    assert state(model) == before
    assert [type(module) for module in model.modules()] == classes


def test_weights_travel_in_both_directions() -> None:
    model = transformer()
    fused, other = swapped(model), lively(nn.Transformer(**SIZES, num_encoder_layers=1, num_decoder_layers=2))
    assert list(fused.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.mul_(1.1)
    assert other.load_state_dict(fused.state_dict(), strict=True)
    assert fused.load_state_dict(model.state_dict(), strict=True)
    for name, parameter in fused.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
        assert torch.equal(other.get_parameter(name), 1.1 * parameter)


def test_an_optimizer_tied_and_frozen_weights() -> None:
    models = [encoder().train(), encoder().train()]
    for model in models:
        model.layers[1].self_attn.in_proj_weight = model.layers[0].self_attn.in_proj_weight
        model.layers[0].self_attn.out_proj.weight.requires_grad_(False)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    swap(models[0])
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(tokens(), src_key_padding_mask=PADDING).square().mean().backward()
            optimizer.step()
    first, plain = (model.layers[0].self_attn for model in models)
    assert models[0].layers[1].self_attn.in_proj_weight is first.in_proj_weight
    assert first.out_proj.weight.grad is None
    assert torch.equal(first.out_proj.weight, encoder().layers[0].self_attn.out_proj.weight)
    assert (first.in_proj_weight - encoder().layers[0].self_attn.in_proj_weight).abs().max() > 1e-3
    torch.testing.assert_close(first.in_proj_weight, plain.in_proj_weight, rtol=1e-3, atol=1e-3)


def test_hooks_on_every_child_fire_in_the_same_order() -> None:
    orders = []
    for is_swapped in (False, True):
        model, fired = transformer(num_decoder_layers=1), []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=name, f=fired: f.append(f"pre {n}"))
            module.register_forward_hook(lambda *_, n=name, f=fired: f.append(f"forward {n}"))
            module.register_full_backward_hook(lambda *_, n=name, f=fired: f.append(f"backward {n}"))
        if is_swapped:
            swap(model, strict=True)
        model(tokens(MEMORY).requires_grad_(), tokens().requires_grad_(), tgt_mask=CAUSAL).sum().backward()
        orders.append(fired)
    assert orders[0] == orders[1]
    assert "forward encoder.layers.0.self_attn" in orders[0]
    assert not any("out_proj" in line for line in orders[0])


def test_training_with_dropout_draws_torchs_numbers() -> None:
    model = encoder(dropout=0.3).train()
    fused = swapped(model)
    torch.manual_seed(5)
    expected = model(tokens())
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"FusedMultiheadAttention: attention dropout \(p=0.3\)"):
        actual = fused(tokens())
    assert torch.equal(actual, expected)
    with torch.no_grad():
        assert ops_run(lambda: fused.eval()(tokens())) == {PACKED}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    model, x = encoder(), tokens()
    truth = {"output": copy.deepcopy(model).double()(x.double())}
    low, fused = copy.deepcopy(model).to(dtype), swapped(model)
    own = torchs_own(lambda: {"output": low(x.to(dtype))})
    check({"output": swapped(low)(x.to(dtype))}, truth, own, str(dtype))
    with torch.autocast("cpu", dtype):
        own = torchs_own(lambda: {"output": model(x)})
        check({"output": fused(x)}, truth, own, "autocast")
        with torch.no_grad():
            assert fused(x).dtype == own["output"][0].dtype
            assert ops_run(lambda: fused(x)) == {PACKED}
    assert fused.to(dtype)(x.to(dtype)).dtype == dtype


def test_deepcopy_of_a_swapped_model() -> None:
    fused = swapped(encoder())
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        assert torch.equal(twin(tokens()), fused(tokens()))
        assert ops_run(lambda: twin(tokens())) == {PACKED}
    unswap(twin)
    assert type(twin.layers[0].self_attn) is nn.MultiheadAttention
    assert type(fused.layers[0].self_attn) is FusedMultiheadAttention


@pytest.mark.parametrize("is_inference", [True, False])
def test_compile_with_a_dynamic_batch_and_two_lengths(is_inference: bool) -> None:
    fused = swapped(encoder(layers=1))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.set_grad_enabled(not is_inference):
        for batch, length in ((2, 12), (5, 12), (3, 9)):
            x, mask = tokens(length, batch=batch), padding(*range(1, batch + 1), seqlen=length)
            actual, expected = (m(x, src_key_padding_mask=mask) for m in (compiled, fused))
            # In inference the eager model drops the padded tokens, which a compiled one keeps (torch's too).
            torch.testing.assert_close(actual[~mask], expected[~mask], rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1
        assert ops_run(lambda: compiled(x, src_key_padding_mask=mask)) == {PACKED}


def test_export_with_a_dynamic_batch_and_length() -> None:
    fused = swapped(encoder(layers=1))
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(fused, (tokens(),), dynamic_shapes={"src": sizes})
    assert "fastvit.attention_qkvpacked" in str(program.graph)
    for batch, length in ((1, 12), (5, 20)):
        x = tokens(length, batch=batch)
        torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-4)


def test_symbolic_tracing() -> None:
    layer = swapped(nn.TransformerEncoderLayer(**SIZES, batch_first=True).eval())
    traced = torch.fx.symbolic_trace(layer, concrete_args={"is_causal": False})
    torch.testing.assert_close(traced(tokens(), None, None), layer(tokens()))
    assert ops_run(lambda: traced(tokens(), None, None)) == {PACKED}


def test_quantised_linears_inside_keep_working() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = encoder(layers=1, enable_nested_tensor=False)
    models = [model, swapped(model)]
    for one in models:
        quantization.quantize_(one, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        expected, actual = (one(tokens(), src_key_padding_mask=PADDING) for one in models)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert (expected - encoder(layers=1)(tokens(), src_key_padding_mask=PADDING)).abs().max() > 1e-3
        assert ops_run(lambda: models[1](tokens())) == {PACKED}
