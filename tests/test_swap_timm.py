"""swap on timm's other attentions: each in a real model of timm's, against float64, with the traps of its class."""

from __future__ import annotations

import copy
import importlib
import inspect
import pkgutil
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.adapters import registered
from fastvit.adapters.reasons import LOOKS_LIKE_ONE, REASONS
from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, PATCHES, SEPARATE, hold_the_rule, images, normal, ops_run

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")

SMALL = {"depth": 1, "img_size": 64, "num_classes": 10}
VIT, EVA = "vit_tiny_patch16_224", "eva02_tiny_patch14_224"
DINOV3, BEIT = "vit_small_patch16_dinov3", "beit_base_patch16_224"
BEIT_SMALL = {**SMALL, "embed_dim": 192, "num_heads": 3}
POOL = {**SMALL, "global_pool": "map", "class_token": False}


def build(name: str, **options: Any) -> nn.Module:
    return livened(timm.create_model(name, **options))


# name, options, modules that are swapped, ops that run
MODELS = [
    (VIT, {**SMALL, "global_pool": "avg"}, 2, {PACKED}),
    (VIT, {**SMALL, "reg_tokens": 4, "qk_norm": True}, 2, {SEPARATE}),
    (VIT, {**SMALL, "qkv_bias": False, "scale_attn_norm": True}, 2, {PACKED}),
    ("deit3_small_patch16_224", {**SMALL, "embed_dim": 192, "num_heads": 3}, 2, {PACKED}),
    ("deit_tiny_distilled_patch16_224", SMALL, 2, {PACKED}),
    ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 56, "embed_dim": 192, "num_heads": 3}, 2, {PACKED}),
    ("vit_base_patch16_siglip_224", {**SMALL, "embed_dim": 192, "num_heads": 3}, 3, {PACKED, SEPARATE}),
    (EVA, {**SMALL, "img_size": 56}, 2, {SEPARATE}),
    (EVA, {**SMALL, "img_size": 56, "scale_attn_inner": True, "qk_norm": True}, 2, {SEPARATE}),
    (EVA, {**SMALL, "img_size": 56, "use_rot_pos_emb": False}, 2, {PACKED}),
    (EVA, {**SMALL, "img_size": 56, "qkv_fused": False}, 2, {SEPARATE}),
    ("eva_giant_patch14_224", {**SMALL, "img_size": 56, "embed_dim": 192, "num_heads": 3}, 2, {PACKED}),
    (DINOV3, {**SMALL, "embed_dim": 192, "num_heads": 3}, 2, {SEPARATE}),
    ("vit_pe_core_tiny_patch16_384", {**SMALL, "embed_dim": 192, "num_heads": 3}, 3, {SEPARATE}),
    ("vit_small_patch16_rope_mixed_224", {**SMALL, "embed_dim": 192, "num_heads": 3}, 2, {SEPARATE}),
    ("cait_xxs24_224", {"depth": 1, "img_size": 64, "num_classes": 10}, 3, {SEPARATE}),
    ("convit_tiny", {"depth": 2, "local_up_to_layer": 1, "img_size": 64, "num_classes": 10}, 2, {PACKED}),
    ("naflexvit_base_patch16_gap", {"depth": 1, "embed_dim": 192, "num_heads": 3, "num_classes": 10}, 1, {PACKED}),
]


@pytest.mark.parametrize(("name", "options", "fused", "attention"), MODELS)
def test_models_keep_their_numbers(name: str, options: dict, fused: int, attention: set[str]) -> None:
    model = build(name, **options)
    ops = attention | ({PATCHES} if any(isinstance(m, layers.PatchEmbed) for m in model.modules()) else set())
    worst = hold_the_rule(model, images(4, options.get("img_size", 64)), fused, ops)
    print(f"{name}: worst {worst:.2f}")


def test_metaformer_keeps_its_numbers() -> None:
    from timm.models import metaformer

    mixers = [metaformer.SepConv, metaformer.Attention]
    norms = [metaformer.LayerNorm2dNoBias, metaformer.LayerNormNoBias]
    model = metaformer.MetaFormer(3, 10, depths=(1, 1), dims=(32, 64), token_mixers=mixers, norm_layers=norms)
    print(f"worst {hold_the_rule(livened(model), images(4), 1, {PACKED}):.2f}")


def grouped_queries() -> nn.Module:
    """Return a DINOv3-like model whose keys and values have fewer heads than its queries."""
    model = timm.create_model(DINOV3, **{**SMALL, "embed_dim": 192, "num_heads": 6})
    model.blocks[0].attn = layers.AttentionRope(
        192, 6, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=5, rotate_half=True, qk_norm=True, gated=True,
        scale_norm=True, norm_layer=nn.LayerNorm,
    )  # fmt: skip
    return livened(model)


def test_grouped_queries_keep_their_numbers() -> None:
    print(f"worst {hold_the_rule(grouped_queries(), images(4), 2, {SEPARATE, PATCHES}):.2f}")


def frozen_beit(**options: Any) -> nn.Module:
    model = build(BEIT, **{**BEIT_SMALL, **options})
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            parameter.requires_grad_(False)
            parameter.mul_(10)
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def grads_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    used = trainable(model)
    grads = torch.autograd.grad(logits.square().sum(), [*used.values()])
    return {"logits": logits.detach(), **dict(zip(used, grads, strict=True))}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False}, {"use_shared_rel_pos_bias": True}],
)
@pytest.mark.parametrize("frozen", [True, False])
def test_beit_is_fused_where_its_bias_needs_no_gradient(options: dict, frozen: bool) -> None:
    model = frozen_beit(**options)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad or not frozen)
    truth, own = grads_of(copy.deepcopy(model).double(), images(4).double()), grads_of(model, images(4))
    with torch.no_grad():
        without = copy.deepcopy(model)
        for name, parameter in without.named_parameters():
            if "bias_table" in name:
                parameter.zero_()
        assert (without(images(4)) - own["logits"]).abs().max() > 0.01
    report = swap(model)
    assert report.counts == {"fused": 2}
    assert ("relative_position_bias_table requires grad" in str(report)) == (
        not frozen and options.get("use_rel_pos_bias", True)
    )
    mine: dict[str, Tensor] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ran = ops_run(lambda: mine.update(grads_of(model, images(4))))
    assert ran == ({PACKED, PATCHES} if frozen else {PATCHES})
    assert ["position bias requires grad" in str(w.message) for w in caught] == [True] * (not frozen)
    for key in truth:
        comparison = compare(mine[key], truth[key], own[key], key)
        assert comparison.passed, comparison
    with torch.no_grad():
        assert ops_run(lambda: mine.update(logits=model(images(4)))) == {PACKED, PATCHES}
    assert compare(mine["logits"], truth["logits"], own["logits"]).passed


def test_naflex_masks_its_padding() -> None:
    model = build("naflexvit_base_patch16_map", depth=1, embed_dim=192, num_heads=3, num_classes=10)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    coordinates = torch.stack((rows, columns), dim=-1).reshape(1, 16, 2).expand(3, -1, -1)
    valid = torch.arange(16) < torch.tensor([[16], [12], [7]])
    patches = normal(3, 16, 768, seed=1)

    def padded(module: nn.Module, filling: float, dtype: torch.dtype = torch.float32) -> Tensor:
        filled = torch.where(valid[..., None], patches, filling).to(dtype)
        return module({"patches": filled, "patch_coord": coordinates, "patch_valid": valid})

    truth, own = padded(copy.deepcopy(model).double(), 0.0, torch.float64), padded(model, 0.0)
    report = swap(model)
    assert report.counts == {"left alone": 1, "fused": 2}
    (embeds,) = report.left_alone
    assert (embeds.name, embeds.original_type) == ("embeds", "NaFlexEmbeds")
    assert embeds.reason == "a Linear on patches that were cut out beforehand: no convolution to replace"
    assert ops_run(lambda: padded(model, 0.0)) == {PACKED, SEPARATE}
    comparison = compare(padded(model, 0.0), truth, own, "logits")
    assert comparison.passed, comparison
    torch.testing.assert_close(padded(model, 99.0), own, rtol=1e-4, atol=1e-4)
    unmasked = model({"patches": patches, "patch_coord": coordinates, "patch_valid": torch.ones_like(valid)})
    assert (padded(model, 0.0) - unmasked)[1:].abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"latent_len": 4, "pool_type": "avg", "qk_norm": True},
        {"latent_len": 3, "pool_type": "", "pos_embed": "abs", "feat_size": 17},
        {"q_proj": False, "out_features": 0},
    ],
)
def test_latent_pooling(options: dict) -> None:
    model = livened(layers.AttentionPoolLatent(96, num_heads=3, **options))
    print(f"worst {hold_the_rule(model, normal(16, 17, 96, seed=1), 1, {SEPARATE}):.2f}")
    for fused_attn in (True, False):
        for mask in (normal(1, 17, seed=2), normal(1, 17, seed=2) > 0):
            model.fused_attn = fused_attn
            expected = model(normal(2, 17, 96), attn_mask=mask)
            swap(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                actual = model(normal(2, 17, 96), attn_mask=mask)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            # Unfused, timm adds a bool mask to the scores: that is kept, oddity and all.
            odd = mask.dtype == torch.bool and not fused_attn
            assert ["adds a bool mask" in str(w.message) for w in caught] == [True] * odd
            unswap(model)


@pytest.mark.parametrize("name", [EVA, DINOV3])
def test_masks_of_rotary_attention(name: str) -> None:
    model = build(name, **{**SMALL, "img_size": 56 if name == EVA else 64, "embed_dim": 192, "num_heads": 3})
    attention = model.blocks[0].attn
    x, rope = normal(2, 17, 192), normal(17 - attention.num_prefix_tokens, 128, seed=4)
    learned = normal(3, 17, 17).requires_grad_()
    calls: list[dict[str, Any]] = [{}, {"rope": rope}, {"is_causal": True}, {"attn_mask": normal(17, 17) > 0}]
    calls += [{"rope": rope, "attn_mask": normal(2, 1, 17, 17)}, {"rope": rope, "attn_mask": learned}]
    expected = [attention(x, **call) for call in calls]
    assert len({round(output.abs().sum().item(), 2) for output in expected}) == len(calls)
    swap(model)
    for call, wanted in zip(calls[:-1], expected, strict=False):
        torch.testing.assert_close(attention(x, **call), wanted, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda call=call: attention(x, **call)) <= {PACKED, SEPARATE}
    with pytest.warns(UserWarning, match=r"attn_mask requires grad"):
        actual = attention(x, **calls[-1])
    assert torch.equal(
        torch.autograd.grad(actual.sum(), learned)[0], torch.autograd.grad(expected[-1].sum(), learned)[0]
    )


def test_rotary_queries_wider_than_the_values() -> None:
    model = build(DINOV3, **{**SMALL, "embed_dim": 192, "num_heads": 3}).to(torch.bfloat16)
    attention = model.blocks[0].attn
    for norm in (attention.q_norm, attention.k_norm):
        norm.register_forward_hook(lambda _, args, out: out.to(torch.promote_types(out.dtype, torch.float32)))
    x, rope = normal(2, 21, 192).to(torch.bfloat16), normal(16, 128, seed=4)
    truth, own = copy.deepcopy(attention).double()(x.double(), rope=rope.double()), attention(x, rope=rope)
    swap(model)
    assert ops_run(lambda: attention(x, rope=rope)) == {SEPARATE}
    comparison = compare(attention(x, rope=rope), truth, own)
    assert comparison.passed, comparison


def test_a_hook_on_a_qkv_that_timm_does_not_call_is_reported() -> None:
    for separate in (False, True):
        model = build(EVA, **{**SMALL, "img_size": 56})
        attention, fired = model.blocks[0].attn, []
        attention.qkv_bias_separate = separate
        attention.qkv.register_forward_hook(lambda *_, fired=fired: fired.append(1))
        expected = model(images(1, 56))
        report = swap(model)
        torch.testing.assert_close(model(images(1, 56)), expected, rtol=1e-4, atol=1e-4)
        assert len(fired) == 2 * separate
        assert ("without calling qkv" in str(report)) == (not separate)


@pytest.mark.parametrize(
    ("options", "size"),
    [({"dynamic_img_size": True}, (96, 64)), ({"dynamic_img_size": True, "dynamic_img_pad": True}, (70, 85))],
)
@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_dynamic_image_sizes(name: str, options: dict, size: tuple[int, int]) -> None:
    model = build(name, **SMALL, **options)
    x = normal(2, 3, *size, seed=7)
    expected = model(x)
    assert swap(model, strict=True).counts == {"fused": 2}
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert PATCHES in ops_run(lambda: model(x))


@pytest.mark.parametrize(
    ("name", "options", "fused", "left_alone"),
    [
        (VIT, {"depth": 2, "attn_layer": "diff"}, {"PatchEmbed": 1}, {"DiffAttention": "differential attention"}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, {"PatchEmbed": 1}, {"WindowAttention": "windows"}),
        ("swinv2_tiny_window8_256", {"depths": (1, 1)}, {"PatchEmbed": 1}, {"WindowAttention": "cosine attention"}),
        ("mvitv2_tiny", {}, {"PatchEmbed": 1}, {"MultiScaleAttention": "pooled"}),
        ("pvt_v2_b0", {}, {}, {"Attention": "shortened", "OverlapPatchEmbed": "overlapping convolution"}),
        (
            "xcit_nano_12_p16_224",
            {"depth": 2},
            {"ClassAttn": 2},
            {"XCA": "channels", "ConvPatchEmbed": "overlap"},
        ),
        ("cait_xxs24_224", {"depth": 2}, {"PatchEmbed": 1, "ClassAttn": 2}, {"TalkingHeadAttn": "talking heads"}),
        ("samvit_base_patch16", {"depth": 1}, {"PatchEmbed": 1}, {"Attention": "decomposed"}),
        (
            "vit_relpos_small_patch16_224",
            {"depth": 1},
            {"PatchEmbed": 1},
            {"RelPosAttention": "relative"},
        ),
        ("levit_128s", {}, {}, {"Attention": "relative", "AttentionDownsample": "relative"}),
    ],
)
def test_what_is_left_alone_says_why(name: str, options: dict, fused: dict, left_alone: dict) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    report = swap(model)
    kinds = [row.original_type for row in report.swapped]
    assert {kind: kinds.count(kind) for kind in kinds} == fused
    assert {row.original_type for row in report.left_alone} == left_alone.keys()
    for row in report.left_alone:
        assert left_alone[row.original_type] in row.reason, row


# They hold layers that have rows of their own, or are no attention and no patch embedding in spite of their names.
WRAPPERS = {
    *("layers.hybrid_embed.HybridEmbed", "layers.hybrid_embed.HybridEmbedWithSize"),
    *("layers.patch_embed.PatchEmbedInterpolator", "layers.patch_embed.PatchEmbedResamplerFixedOrigSize"),
    *("models._efficientnet_blocks.MobileAttention", "models.byobnet.SelfAttnBlock", "models.fastvit.AttentionBlock"),
    *("models.cait.LayerScaleBlockClassAttn", "models.crossvit.CrossAttentionBlock", "models.xcit.ClassAttentionBlock"),
    *("models.efficientvit_msra.LocalWindowAttention", "models.maxxvit.ParallelPartitionAttention"),
    *("models.maxxvit.PartitionAttention2d", "models.maxxvit.PartitionAttentionCl"),
}


def calls_torchs_attention(kind: type) -> bool:
    functions = [value for value in vars(kind).values() if inspect.isfunction(value)]
    return any("scaled_dot_product_attention" in function.__code__.co_names for function in functions)


def test_every_attention_of_timm_is_swapped_or_has_its_reason() -> None:
    table, classes = registered(), {}
    for package in (layers, timm.models):
        for found in pkgutil.iter_modules(package.__path__):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(f"{package.__name__}.{found.name}")
            for kind in vars(module).values():
                if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__:
                    classes[f"{kind.__module__}.{kind.__qualname__}"] = kind
    looking_like_one = {
        name for name, kind in classes.items() if LOOKS_LIKE_ONE.search(kind.__name__) or calls_torchs_attention(kind)
    }
    reasons = {name for name in REASONS if name.startswith("timm.")}
    known = {f"{kind.__module__}.{kind.__qualname__}" for kind in table} | reasons
    known |= {f"timm.{name}" for name in WRAPPERS}
    assert len(looking_like_one) > 100
    assert looking_like_one - known == set()
    assert len(reasons) > 80
    assert reasons - classes.keys() == set()
    assert not any(classes[name] in table for name in reasons)
