"""Layers inside a swapped model that are no longer what they were: LoRA, int8 weights, parametrized, pruned."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastvit.swap import swap, unswap
from fastvit.testing import compare
from tests.swapping import PACKED, ops_run, torchs_paths
from tests.test_swap_behaviour import BOTH, hold_the_rule, swapped, tiny, x


def with_lora(model: nn.Module, targets: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when: str) -> None:
    targets = r".*attn\.(qkv|proj)"
    if when == "before":
        model = with_lora(tiny(), targets)
        assert swap(model, strict=True).counts == {"fused": 2}
    else:
        model = with_lora(swapped(), targets)
    assert ops_run(lambda: model(x())) == BOTH
    assert (model(x()) - tiny()(x())).abs().max() > 0.1
    hold_the_rule(model, lambda: with_lora(tiny(), targets))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(x()).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert len(trained) == 4
    expected = model(x())
    merged = model.merge_and_unload()
    assert type(merged.blocks[0].attn.qkv) is nn.Linear
    torch.testing.assert_close(merged(x()), expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: merged(x())) == BOTH
    unswap(merged)
    torch.testing.assert_close(merged(x()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_the_patch_embedding_is_called(when: str) -> None:
    targets = r".*patch_embed\.proj"
    if when == "before":
        model = with_lora(tiny(), targets)
        assert "proj is a Conv2d with a forward of its own: runs the plain forward" in str(swap(model))
    else:
        model = with_lora(swapped(), targets)
    with pytest.warns(UserWarning, match=r"FusedPatchEmbed: proj is a Conv2d with a forward of its own"):
        hold_the_rule(model, lambda: with_lora(tiny(), targets))
    assert ops_run(lambda: model(x())) == {PACKED}
    expected = model(x())
    merged = model.merge_and_unload()
    assert ops_run(lambda: merged(x())) == BOTH
    torch.testing.assert_close(merged(x()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_int8_weights(when: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")

    def quantized(model: nn.Module) -> nn.Module:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    model = quantized(tiny()) if when == "before" else quantized(swapped())
    if when == "before":
        assert swap(model, strict=True).counts == {"fused": 2}
    assert not type(model.blocks[0].attn.qkv.weight).__name__.endswith("Parameter")
    exact = quantized(tiny())
    for module in exact.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    plain = quantized(tiny())
    with torch.no_grad():
        assert ops_run(lambda: model(x())) == BOTH
        truth = exact.double()(x().double())
        comparison = compare(model(x()), truth, torchs_paths(plain, lambda: plain(x())), "logits")
        assert (truth - tiny()(x())).abs().max() > 1e-3
    assert comparison.passed, comparison


def l1_pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


REWRITES = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "pruning": l1_pruned,
}


@pytest.mark.filterwarnings("ignore:.*plain forward", "ignore:.*weight_norm")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "patch_embed.proj"])
@pytest.mark.parametrize("rewrite", REWRITES)
def test_weights_that_are_computed(rewrite: str, where: str, when: str) -> None:
    def rewritten(model: nn.Module) -> nn.Module:
        torch.manual_seed(6)
        REWRITES[rewrite](model.get_submodule(where))
        # So that a stale weight shows: what the weight is computed from has changed since.
        with torch.no_grad():
            for name, parameter in model.get_submodule(where).named_parameters():
                if "weight" in name:
                    parameter.mul_(1.5).add_(0.01)
        return model.eval()

    model = rewritten(tiny()) if when == "before" else rewritten(swapped())
    if when == "before":
        assert swap(model, strict=True).counts == {"fused": 2}
    # The older ones compute the weight in a hook of proj, which fires only if proj is called.
    hooked = where == "patch_embed.proj" and (rewrite.startswith("old") or rewrite == "pruning")
    assert ops_run(lambda: model(x())) == ({PACKED} if hooked else BOTH)
    hold_the_rule(model, lambda: rewritten(tiny()))
    unswap(model)
    torch.testing.assert_close(model(x()), rewritten(tiny())(x()), rtol=0, atol=0)


def test_what_was_parametrized_can_be_baked_in() -> None:
    model = swapped()
    parametrizations.weight_norm(model.patch_embed.proj)
    expected = model(x())
    parametrize.remove_parametrizations(model.patch_embed.proj, "weight")
    torch.testing.assert_close(model(x()), expected, rtol=1e-5, atol=1e-5)
    prune.random_unstructured(model.patch_embed.proj, "weight", 0.5)
    prune.remove(model.patch_embed.proj, "weight")
    assert (model.patch_embed.proj.weight == 0).float().mean() == 0.5
    assert ops_run(lambda: model(x())) == BOTH
