"""swap on torchvision's vision transformers: the same numbers, the same objects, and rows for what is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastvit.adapters.torch_nn import FusedPatchConv2d
from fastvit.modules.multihead_attention import FusedMultiheadAttention
from fastvit.swap import swap, unswap
from tests.swapping import PACKED, PATCHES, forward_backward, images, ops_run, run_python, state
from tests.torch_paths import check, lively, torchs_own

torchvision = pytest.importorskip("torchvision")
vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")

# The real class in the shapes of the named models: patch 16 at 224 pixels, and head_dim 64 with patch 14.
BASE_16 = {"image_size": 224, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 96, "mlp_dim": 192}
LARGE_14 = {"image_size": 56, "patch_size": 14, "num_layers": 3, "num_heads": 4, "hidden_dim": 256, "mlp_dim": 512}
TINY = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 96, "mlp_dim": 128}
STEM = [
    vision_transformer.ConvStemConfig(out_channels=16, kernel_size=3, stride=2),
    vision_transformer.ConvStemConfig(out_channels=24, kernel_size=3, stride=2),
    vision_transformer.ConvStemConfig(out_channels=32, kernel_size=3, stride=2),
]


def model_of(sizes: dict[str, Any], **options: Any) -> nn.Module:
    return lively(vision_transformer.VisionTransformer(**sizes, **{"num_classes": 10, **options}))


def tiny(**options: Any) -> nn.Module:
    return model_of(TINY, **options)


def x(batch: int = 2) -> Tensor:
    return images(batch, 32)


@pytest.mark.parametrize(
    ("sizes", "options", "batch", "fused"),
    [
        (BASE_16, {}, 2, 3),
        (LARGE_14, {}, 4, 4),
        (TINY, {"representation_size": 24}, 8, 3),
        (TINY, {"conv_stem_configs": STEM}, 8, 2),
    ],
    ids=["vit_b_16", "vit_l_14", "representation", "conv_stem"],
)
def test_real_models_keep_their_numbers(sizes: dict, options: dict, batch: int, fused: int) -> None:
    model, pixels = model_of(sizes, **options), images(batch, sizes["image_size"])
    exact = copy.deepcopy(model).double()
    truth = forward_backward(exact, pixels.double())
    own = torchs_own(lambda: forward_backward(model, pixels))
    unswapped, before = forward_backward(model, pixels), state(model)
    classes = [type(module) for module in model.modules()]

    assert swap(model, strict=True).counts == {"fused": fused}
    assert state(model) == before
    expected_ops = {PACKED} if "conv_stem_configs" in options else {PACKED, PATCHES}
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, pixels))) == expected_ops
    check(mine, truth, own, "training step")
    with torch.no_grad():  # torch's own inference path would be another one
        assert ops_run(lambda: mine.update(output=model(pixels))) == expected_ops
        torch.testing.assert_close(mine["output"], mine["logits"], rtol=1e-5, atol=1e-5)

    unswap(model)
    assert state(model) == before
    assert [type(module) for module in model.modules()] == classes
    restored = forward_backward(model, pixels)
    assert all(torch.equal(restored[key], unswapped[key]) for key in unswapped)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_h_14"])
def test_the_report_of_every_vit(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    depth = len(model.encoder.layers)
    report = swap(model, strict=True)
    assert report.counts == {"fused": depth + 1}
    assert f"encoder.layers.encoder_layer_0-{depth - 1}.self_attention ×{depth}  MultiheadAttention -> f" in str(report)
    assert "conv_proj " in str(report)


@pytest.mark.parametrize(
    ("name", "attention", "reason", "layers", "stem"),
    [
        ("swin_t", "ShiftedWindowAttention", "attention in windows with a relative position bias and a mask", 12, 1),
        ("swin_v2_t", "ShiftedWindowAttentionV2", "cosine attention in windows, with a learned temperature", 12, 1),
        ("maxvit_t", "RelativePositionalMultiHeadAttention", "attention in windows and grids with", 22, 0),
        ("convnext_tiny", "", "", 0, 1),
    ],
)
def test_window_attentions_are_left_alone(name: str, attention: str, reason: str, layers: int, stem: int) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    before = [type(module) for module in model.modules()]
    report = swap(model)
    assert [row.original_type for row in report.left_alone] == [attention] * layers
    assert all(row.reason.startswith(reason) for row in report.left_alone)
    assert [row.original_type for row in report.swapped] == ["Conv2d"] * stem
    changed = [now for now, then in zip([type(m) for m in model.modules()], before, strict=True) if now is not then]
    assert changed == [FusedPatchConv2d] * stem


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_patchify_stems_keep_their_numbers(name: str) -> None:
    stem = torchvision.models.get_model(name).features[0].eval()
    pixels = images(2, 64)
    expected = stem(pixels)
    assert swap(stem, strict=True).counts == {"fused": 1}
    actual = stem(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: stem(pixels)) == {PATCHES}


def test_weights_travel_in_both_directions() -> None:
    fused, plain, other = tiny(), tiny(), vision_transformer.VisionTransformer(**TINY, num_classes=10).eval()
    identities = [id(parameter) for parameter in fused.parameters()]
    swap(fused, strict=True)
    assert other.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(other(x()), fused(x()), rtol=1e-5, atol=1e-5)
    assert fused.load_state_dict({k: 1.1 * v for k, v in plain.state_dict().items()}, strict=True)
    assert plain.load_state_dict(fused.state_dict(), strict=True)
    torch.testing.assert_close(plain(x()), fused(x()), rtol=1e-5, atol=1e-5)
    assert [id(parameter) for parameter in fused.parameters()] == identities


def test_an_optimizer_tied_and_frozen_weights() -> None:
    models = [tiny().train(), tiny().train()]
    for model in models:
        first, second = (layer.self_attention for layer in model.encoder.layers)
        second.in_proj_weight = first.in_proj_weight
        model.conv_proj.weight.requires_grad_(False)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]
    swap(models[0])
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x()).square().mean().backward()
            optimizer.step()
    first, second = (layer.self_attention for layer in models[0].encoder.layers)
    assert second.in_proj_weight is first.in_proj_weight
    assert models[0].conv_proj.weight.grad is None
    assert torch.equal(models[0].conv_proj.weight, tiny().conv_proj.weight)
    assert (models[0].conv_proj.bias - tiny().conv_proj.bias).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(*(model(x()) for model in models), rtol=1e-3, atol=1e-3)


def test_hooks_on_every_module_fire_in_the_same_order() -> None:
    orders = []
    for is_swapped in (False, True):
        model, fired = tiny(), []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=name, f=fired: f.append(f"pre {n}"))
            module.register_forward_hook(lambda *_, n=name, f=fired: f.append(f"forward {n}"))
            module.register_full_backward_hook(lambda *_, n=name, f=fired: f.append(f"backward {n}"))
        if is_swapped:
            assert swap(model).counts == {"fused": 3}
        model(x().requires_grad_()).sum().backward()
        orders.append(fired)
    assert orders[0] == orders[1]
    assert "backward conv_proj" in orders[0]


def test_training_with_dropout_draws_torchvisions_numbers() -> None:
    results = []
    for is_swapped in (False, True):
        model = tiny(attention_dropout=0.3, dropout=0.1).train()
        if is_swapped:
            assert "dropout p=0.3 runs the plain forward in training" in str(swap(model))
        torch.manual_seed(5)
        if is_swapped:
            with pytest.warns(UserWarning, match=r"attention dropout \(p=0.3\) has no kernel yet"):
                results.append(model(x()))
            assert ops_run(lambda m=model: m(x())) == {PATCHES}
            model.eval()
            assert ops_run(lambda m=model: m(x())) == {PACKED, PATCHES}
        else:
            results.append(model(x()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert (results[0] - tiny()(x())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    model, pixels = tiny(), x(8)
    truth = {"logits": copy.deepcopy(model).double()(pixels.double())}
    low, fused = copy.deepcopy(model).to(dtype), copy.deepcopy(model)
    own = torchs_own(lambda: {"logits": low(pixels.to(dtype))})
    swap(low)
    swap(fused)
    check({"logits": low(pixels.to(dtype))}, truth, own, str(dtype))
    with torch.autocast("cpu", dtype):
        own = torchs_own(lambda: {"logits": model(pixels)})
        check({"logits": fused(pixels)}, truth, own, "autocast")
    for other in (torch.float64, dtype, torch.float32):
        assert fused.to(other)(pixels.to(other)).dtype == other


def test_deepcopy_and_pickle_into_a_fresh_interpreter(tmp_path: Any) -> None:
    model = tiny()
    swap(model, backend="reference")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x()), model(x()))
    unswap(twin)
    assert type(model.conv_proj) is FusedPatchConv2d
    assert type(model.encoder.layers[0].self_attention) is FusedMultiheadAttention
    path = tmp_path / "model.pt"
    torch.save({"model": model, "x": x(), "logits": model(x()).detach()}, path)
    program = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
assert (model(saved["x"]) - saved["logits"]).abs().max() < 1e-5
from fastvit.swap import swap, unswap
print(swap(model, backend="reference").counts, len(unswap(model).rows), type(model.conv_proj).__module__)
"""
    assert run_python(program, path).strip() == "{'already fused': 3} 3 torch.nn.modules.conv"


def test_compile_with_a_dynamic_batch() -> None:
    model = tiny()
    swap(model)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5, 3):
        actual, expected = compiled(x(batch)), model(x(batch))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(y.square().sum(), model.class_token)[0] for y in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert ops_run(lambda: compiled(x(5))) == {PACKED, PATCHES}
    assert counters["stats"]["unique_graphs"] == 1


def test_export_with_a_dynamic_batch() -> None:
    model = tiny()
    swap(model)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(model, (x(3),), dynamic_shapes={"x": batch})
    assert "fastvit.attention_qkvpacked" in str(program.graph)
    assert "fastvit.patch_embed" in str(program.graph)
    for size in (1, 5):
        torch.testing.assert_close(program.module()(x(size)), model(x(size)), rtol=1e-4, atol=1e-4)


def test_feature_extraction() -> None:
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = tiny()
    nodes = {"encoder.layers.encoder_layer_0": "first", "heads": "logits"}
    extract: Callable[[Tensor], dict[str, Tensor]]
    expected = feature_extraction.create_feature_extractor(model, nodes)(x())
    swap(model)
    extract = feature_extraction.create_feature_extractor(model, nodes)
    actual = extract(x())
    assert actual.keys() == expected.keys() == {"first", "logits"}
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: extract(x())) == {PACKED, PATCHES}
