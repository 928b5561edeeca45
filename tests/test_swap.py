"""swap and unswap on real timm models: the same numbers, the same objects, and an honest report."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.models import vit
from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import (
    PACKED,
    PATCHES,
    SEPARATE,
    by_tensor,
    forward_backward,
    images,
    normal,
    ops_run,
    state,
    torchs_paths,
)

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")


def tiny(**options: Any) -> nn.Module:
    options = {"depth": 2, "img_size": 64, "num_classes": 10, **options}
    return livened(timm.create_model("vit_tiny_patch16_224", **options))


# The large ones with a third of their blocks: blocks are alike, and float64 of all of them takes half a minute.
REAL_MODELS = [
    ("vit_tiny_patch16_224", 224, 2, 12),
    ("vit_small_patch16_384", 384, 1, 12),
    ("vit_base_patch32_224", 224, 1, 4),
    ("deit_tiny_distilled_patch16_224", 224, 2, 12),
    ("vit_small_patch14_dinov2", 518, 1, 4),
]


@pytest.mark.parametrize(("name", "size", "batch", "depth"), REAL_MODELS)
def test_real_models_keep_their_numbers(
    name: str, size: int, batch: int, depth: int, record_property: Callable[[str, object], None]
) -> None:
    model = livened(timm.create_model(name, depth=depth))
    x = images(batch, size)
    truth = forward_backward(copy.deepcopy(model).double(), x.double())
    runs = torchs_paths(model, lambda: forward_backward(model, x))
    own, unswapped = by_tensor(runs), runs[0]
    before = state(model)
    classes = [type(module) for module in model.modules()]

    report = swap(model, strict=True)
    assert report.counts == {"fused": depth + 1}
    assert not report.left_alone
    assert state(model) == before
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, x))) == {PACKED, PATCHES}

    assert mine.keys() == own.keys() == truth.keys()
    comparisons = [compare(mine[key], truth[key], own[key], key) for key in truth]
    worst = max(comparisons, key=lambda comparison: comparison.ratio)
    record_property("worst", str(worst))
    print(f"{name}: logits {comparisons[0].ratio:.2f}, worst {worst}")
    assert all(comparison.passed for comparison in comparisons), worst

    assert len(unswap(model).rows) == depth + 1
    assert [type(module) for module in model.modules()] == classes
    assert state(model) == before
    restored = forward_backward(model, x)
    assert all(torch.equal(restored[key], unswapped[key]) for key in unswapped)


def test_the_reference_vit_swaps_too() -> None:
    model = livened(vit.vit_ti16(img_size=64, depth=3))
    x = images(4)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    truth = forward_backward(copy.deepcopy(model).double(), x.double())
    own = by_tensor(torchs_paths(theirs, lambda: forward_backward(theirs, x)))
    assert swap(model, strict=True).counts == {"fused": 4}
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, x))) == {PACKED, PATCHES}
    for key in truth:
        comparison = compare(mine[key], truth[key], own[key], key)
        assert comparison.passed, comparison
    with pytest.raises(ValueError, match=r"^images: got shape"):
        model(images(1, 80))
    unswap(model)
    assert type(model.blocks[0].attn) is vit.Attention
    assert type(model.patch_embed) is vit.PatchEmbed


def test_float64_is_exact() -> None:
    model = tiny().double()
    expected = model(images().double())
    swap(model)
    torch.testing.assert_close(model(images().double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    x = images().to(dtype)
    with torch.no_grad():
        truth, own = copy.deepcopy(model).double()(x.double()), model(x)
        swap(model)
        comparison = compare(model(x), truth, own, "logits")
    assert comparison.passed, comparison


def test_dtype_changes_after_the_swap() -> None:
    model = tiny()
    swap(model)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        assert model.to(dtype)(images().to(dtype)).dtype == dtype
        assert ops_run(lambda dtype=dtype: model(images().to(dtype))) == {PACKED, PATCHES}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast(qk_norm: bool) -> None:
    model = tiny(qk_norm=qk_norm)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(images().double())
        with torch.autocast("cpu", torch.bfloat16):
            own = model(images())
            swap(model)
            mine = model(images())
    assert mine.dtype == own.dtype == torch.bfloat16
    comparison = compare(mine, truth, own, "logits")
    assert comparison.passed, comparison


def test_an_optimizer_made_before_the_swap_keeps_working() -> None:
    model, plain = tiny().train(), tiny().train()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    swap(model)
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            m(images()).square().mean().backward()
            optimizer.step()
    assert (plain.patch_embed.proj.weight - tiny().patch_embed.proj.weight).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(model(images()), plain(images()), rtol=1e-3, atol=1e-3)


def test_tied_and_frozen_weights() -> None:
    model = tiny()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    model.patch_embed.proj.weight.requires_grad_(False)
    model.blocks[0].attn.proj.bias.requires_grad_(False)
    model(images()).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    swap(model)
    model(images()).sum().backward()
    assert model.blocks[1].attn.qkv.weight is model.blocks[0].attn.qkv.weight
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            scale = expected[name].abs().max().item()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4 * scale)
    assert expected["patch_embed.proj.weight"] is None


def test_a_module_used_twice_is_swapped_once() -> None:
    model = tiny()
    model.blocks[1].attn = model.blocks[0].attn
    expected = model(images())
    assert swap(model).counts == {"fused": 2}
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def _hooked(model: nn.Module, fired: list[str]) -> None:
    names = [
        "patch_embed",
        "patch_embed.norm",
        "blocks.0.attn",
        "blocks.0.attn.qkv",
        "blocks.0.attn.q_norm",
        "blocks.0.attn.k_norm",
        "blocks.0.attn.norm",
        "blocks.1.attn.proj",
        "blocks.1.attn.proj_drop",
    ]
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda *_, name=name: fired.append(f"pre {name}"))
        module.register_forward_hook(lambda *_, name=name: fired.append(f"forward {name}"))
        module.register_full_backward_hook(lambda *_, name=name: fired.append(f"backward {name}"))


def test_hooks_fire_in_the_same_order() -> None:
    orders = []
    for swapped in (False, True):
        model, fired = tiny(), []
        _hooked(model, fired)
        if swapped:
            assert swap(model).counts == {"fused": 3}
        model(images().requires_grad_()).sum().backward()
        orders.append(fired)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 27


def test_hooks_that_change_values_are_obeyed() -> None:
    results = []
    for swapped in (False, True):
        model = tiny()
        model.blocks[0].attn.register_forward_hook(lambda module, args, output: 2 * output)
        model.blocks[1].attn.q_norm.register_forward_hook(lambda module, args, output: -output)
        if swapped:
            swap(model)
            assert ops_run(lambda model=model: model(images())) == {PACKED, SEPARATE, PATCHES}
        results.append(model(images()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert (results[0] - tiny()(images())).abs().max() > 0.1


def test_a_hook_on_the_convolution_makes_that_module_step_back() -> None:
    model = tiny()
    expected = model(images())
    report = swap(model)
    seen: list[Tensor] = []
    model.patch_embed.proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with pytest.warns(UserWarning, match=r"FusedPatchEmbed: proj has a hook"):
        actual = model(images())
    assert len(seen) == 1
    assert seen[0].shape == (2, 192, 4, 4)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: model(images())) == {PACKED}
    assert "proj has a hook" not in str(report)
    assert "proj has a hook" in str(swap(model))


@pytest.mark.filterwarnings("ignore:.*plain forward")
def test_a_hook_on_attn_drop_behaves_as_in_timm() -> None:
    for fused_attn in (False, True):
        model = tiny()
        attention = model.blocks[0].attn
        attention.fused_attn = fused_attn
        seen: list[Tensor] = []
        attention.attn_drop.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        expected, counted = model(images()), len(seen)
        report = swap(model)
        assert torch.equal(attention(normal(1, 17, 192)), layers.Attention.forward(attention, normal(1, 17, 192)))
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
        assert counted == (0 if fused_attn else 1)
        assert len(seen) == (0 if fused_attn else 4)
        assert "a hook on attn_drop wants the attention matrix: runs the plain forward" in str(report)
        assert ("stays silent" in str(report)) == fused_attn


def test_attention_dropout_in_training_is_timms() -> None:
    model, plain = tiny(attn_drop_rate=0.3).train(), tiny(attn_drop_rate=0.3).train()
    report = swap(model)
    assert "attn_drop p=0.3 runs the plain forward in training" in str(report)
    assert "attn_drop p=0.3" in repr(model.blocks[0].attn)
    torch.manual_seed(5)
    expected = plain(images())
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match=r"attention dropout \(p=0.3\) has no kernel yet") as caught:
        actual = model(images())
    assert len(caught) == 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: model(images())) == {PATCHES}
    assert ops_run(lambda: model.eval()(images())) == {PACKED, PATCHES}
    unswap(model)
    swap(model)
    with pytest.warns(UserWarning, match=r"attention dropout \(p=0.3\) has no kernel yet"):
        model.train()(images())


def test_a_loaded_module_says_again_that_it_runs_its_plain_forward(tmp_path: Path) -> None:
    module = nn.MultiheadAttention(32, 4, batch_first=True)
    swap(module)
    x = normal(1, 5, 32)
    with pytest.warns(UserWarning, match="need_weights=True"):
        module(x, x, x)
    torch.save(module, tmp_path / "module.pt")
    for other in (torch.load(tmp_path / "module.pt", weights_only=False), copy.deepcopy(module)):
        with pytest.warns(UserWarning, match="need_weights=True"):
            other(x, x, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(x, x, x)


def test_monte_carlo_dropout_in_an_unfused_model() -> None:
    model = tiny(attn_drop_rate=0.5)
    attention = model.blocks[0].attn
    attention.fused_attn = False
    attention.attn_drop.train()
    swap(model)
    with pytest.warns(UserWarning, match=r"attention dropout"):
        first = model(images())
    assert (first - model(images())).abs().max() > 1e-3


def test_train_and_eval_with_projection_dropout() -> None:
    model, plain = tiny(proj_drop_rate=0.5).train(), tiny(proj_drop_rate=0.5).train()
    swap(model)
    results = []
    for m in (model, plain):
        torch.manual_seed(5)
        results.append(m(images()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert (results[0] - model.eval()(images())).abs().max() > 0.1


def test_masks_go_through_the_whole_model() -> None:
    model = tiny()
    mask = normal(17, 17, seed=2) > -0.5
    for call in ({"attn_mask": mask}, {"is_causal": True}):
        unswap(model)
        expected = model(images(), **call)
        swap(model)
        torch.testing.assert_close(model(images(), **call), expected, rtol=1e-4, atol=1e-4)
        assert (expected - model(images())).abs().max() > 0.1
