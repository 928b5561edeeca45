"""LoRA and int8 weights inside nn.MultiheadAttention (torch.nn, torchvision, open_clip), before or after a swap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.swap import swap
from tests.swapping import PACKED, PATCHES, images, normal, ops_run
from tests.torch_paths import lively

# A model, its input, what LoRA adapts, and the number of swapped modules.
Model = tuple[nn.Module, Tensor, str, int]


def torch_nn() -> Model:
    layer = nn.TransformerEncoderLayer(96, 4, 128, batch_first=True, dropout=0.0)
    model = lively(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    return model, normal(3, 12, 96), "self_attn linear1", 4


def torchvision() -> Model:
    kind = pytest.importorskip("torchvision.models.vision_transformer").VisionTransformer
    return lively(kind(32, 8, 2, 4, 96, 128, num_classes=10)), images(3, 32), "self_attention", 3


def open_clip() -> Model:
    kind = pytest.importorskip("open_clip.transformer").VisionTransformer
    sizes = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 2, "heads": 4, "mlp_ratio": 2.0}
    return lively(kind(**sizes, output_dim=10)), images(3, 32), "attn", 3


MODELS: list[Callable[[], Model]] = [torch_nn, torchvision, open_clip]


def ops_of(x: Tensor) -> set[str]:
    return {PACKED, PATCHES} if x.dim() == 4 else {PACKED}


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("is_adapted_first", [False, True])
def test_lora_on_the_attention(make: Callable[[], Model], is_adapted_first: bool) -> None:
    peft = pytest.importorskip("peft")
    model, x, names, count = make()
    config = {"r": 2, "target_modules": names.split(), "init_lora_weights": False}

    def adapted(one: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(nn.Sequential(one), peft.LoraConfig(**config))

    plain, fused = adapted(copy.deepcopy(model)), copy.deepcopy(model)
    if is_adapted_first:
        fused = adapted(fused)
        assert swap(fused, strict=True).counts == {"fused": count}
    else:
        assert swap(fused, strict=True).counts == {"fused": count}
        fused = adapted(fused)
    expected, grads = trained(plain, x)
    actual, mine = trained(fused, x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert grads.keys() == mine.keys()
    assert any("lora_B" in key for key in grads)
    for key, wanted in grads.items():
        torch.testing.assert_close(mine[key], wanted, rtol=1e-3, atol=1e-3, msg=lambda m, key=key: f"{key}: {m}")
    assert (expected - model.train()(x)).abs().max() > 0.01
    # Where torch's encoder layer passes the adapter by in inference, the swapped one does not.
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), expected, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: fused(x)) == ops_of(x)
        assert (plain.eval()(x) - expected).abs().max() > (0.01 if make is torch_nn else -1)
        with fused.disable_adapter():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
        merged = fused.merge_and_unload()
        torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: merged(x)) == ops_of(x)


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output in training and the gradients of the adapters."""
    output = model.train()(x)
    output.square().mean().backward()
    return output.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def is_linear(module: nn.Module, name: str) -> bool:
    """Choose out_proj too, which torchao's own choice leaves out."""
    return isinstance(module, nn.Linear)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("is_quantised_first", [False, True])
def test_int8_weights_in_the_output_projection(make: Callable[[], Model], is_quantised_first: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x, _, count = make()

    def quantise(one: nn.Module) -> None:
        quantization.quantize_(one, quantization.Int8WeightOnlyConfig(), filter_fn=is_linear)

    fused = copy.deepcopy(model)
    for change in (quantise, swap) if is_quantised_first else (swap, quantise):
        change(fused)
    assert swap(fused).counts == {"already fused": count}
    projections = [module.out_proj.weight for module in fused.modules() if isinstance(module, nn.MultiheadAttention)]
    assert len(projections) == 2
    assert all("Int8" in type(weight).__name__ for weight in projections)
    with torch.no_grad():
        actual: list[Tensor] = []
        assert ops_run(lambda: actual.append(fused(x))) == ops_of(x)
        torch.testing.assert_close(actual[0], dequantised(model, fused)(x), rtol=1e-5, atol=1e-5)
        assert (actual[0] - model(x)).abs().max() > 2e-4


def dequantised(model: nn.Module, quantised: nn.Module) -> nn.Module:
    """Return a plain copy with the numbers that the int8 weights stand for."""
    plain: Any = copy.deepcopy(model)
    for name, parameter in plain.named_parameters():
        weight: Any = quantised.get_parameter(name)
        parameter.copy_(weight.dequantize() if "Int8" in type(weight).__name__ else weight)
    return plain
