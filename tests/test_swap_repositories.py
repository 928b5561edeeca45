"""swap on the classes of open_clip, and of the dinov2 and dinov3 repositories where PYTHONPATH leads to them."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, PATCHES, SEPARATE, hold_the_rule, images, normal, ops_run

OURS = {PACKED, SEPARATE}


def module_of(name: str) -> ModuleType:
    """Return a module of a library or repository, else skip with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.split('.')[0]} cannot be imported ({error}); put its repository on PYTHONPATH")


def clip_attention(**options: Any) -> nn.Module:
    file = module_of("open_clip.transformer")
    # Its default norm computes in float32 whatever it is given, which leaves no float64 to compare with.
    return livened(file.Attention(96, 3, norm_layer=file.LayerNorm, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"qk_norm": True},
        {"scale_heads": True, "inner_norm": True},
        {"scale_heads": True, "qk_norm": True},
    ],
)
def test_open_clips_attention(options: dict) -> None:
    attention = SEPARATE if "qk_norm" in options else PACKED
    worst = hold_the_rule(clip_attention(**options), normal(8, 17, 96, seed=1), 1, {attention})
    print(f"{options}: worst {worst:.2f}")


def test_open_clips_masks_block_where_they_are_true() -> None:
    module, x = clip_attention(), normal(2, 17, 96, seed=1)
    blocked = (normal(17, 17, seed=2) > 0) & ~torch.eye(17, dtype=torch.bool)
    masks = [blocked, normal(17, 17), normal(6, 17, 17), normal(2, 3, 17, 17), normal(2, 3, 17, 17) > 1]
    masks.append(torch.full((17, 17), -torch.inf).triu(1))
    # Every key of the first token is blocked: torch gives zeros there, and so must we.
    masks.append(blocked | (torch.arange(17) == 0)[:, None])
    expected = [module(x, attn_mask=mask) for mask in masks]
    truth = [copy.deepcopy(module).double()(x.double(), attn_mask=mask) for mask in masks]
    learned = normal(17, 17).requires_grad_()
    gradient = torch.autograd.grad(module(x, learned).sum(), learned)[0]
    swap(module)
    for mask, own, exact in zip(masks, expected, truth, strict=True):
        comparison = compare(module(x, attn_mask=mask), exact, own, f"{mask.dtype} {tuple(mask.shape)}")
        assert comparison.passed, comparison
        assert ops_run(lambda mask=mask: module(x, attn_mask=mask)) == {PACKED}
    assert (expected[0] - module(x, attn_mask=~blocked)).abs().max() > 0.01
    with pytest.warns(UserWarning, match=r"attn_mask requires grad"):
        assert torch.equal(torch.autograd.grad(module(x, learned).sum(), learned)[0], gradient)


def test_open_clips_scaled_cosine_attention_is_left_alone() -> None:
    module = clip_attention(scaled_cosine=True)
    with pytest.raises(RuntimeError, match=r"3D tensor"):
        module(normal(2, 17, 96))
    report = swap(module)
    assert "scaled cosine attention: open_clip's own forward raises" in report.left_alone[0].reason


def test_a_clip_of_open_clips_blocks() -> None:
    model_file = module_of("open_clip.model")
    torch.manual_seed(0)
    features = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
    vision = model_file.CLIPVisionCfg(layers=1, width=96, head_width=32, patch_size=16, image_size=64, **features)
    text = model_file.CLIPTextCfg(context_length=12, vocab_size=50, width=96, heads=3, layers=1, **features)
    model = livened(model_file.CLIP(32, vision, text))
    x, words = images(4), torch.randint(1, 50, (4, 12))
    truth = copy.deepcopy(model).double()(x.double(), words)
    own = model(x, words)
    report = swap(model)
    assert [row.original_type for row in report.swapped].count("Attention") == 2
    mine: list[Tensor] = []
    assert SEPARATE in ops_run(lambda: mine.extend(model(x, words)))
    for name, actual, exact, theirs in zip(("image", "text", "scale"), mine, truth, own, strict=False):
        comparison = compare(actual, exact, theirs, name)
        assert comparison.passed, comparison


DINOS = ["dinov2", "dinov3"]


def dino(version: str, **options: Any) -> nn.Module:
    """Return a small model of the repository, with registers and, for dinov3, a masked key bias."""
    file = module_of(f"{version}.models.vision_transformer")
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 192, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    if version == "dinov2":
        block = module_of("dinov2.layers").NestedTensorBlock
        attention = module_of("dinov2.layers").MemEffAttention
        options = {"num_register_tokens": 2, "init_values": 1.0, "block_chunks": 0, **options}
        block = partial(block, attn_class=attention)
        return livened(file.DinoVisionTransformer(**sizes, block_fn=block, **options))
    # Its default rope is bfloat16: a query that differs by one rounding of float32 may then differ by one of bfloat16.
    options = {
        "pos_embed_rope_dtype": "fp32",
        "n_storage_tokens": 2,
        "mask_k_bias": True,
        "layerscale_init": 1.0,
        **options,
    }
    model = livened(file.DinoVisionTransformer(**sizes, **options))
    for name, buffer in model.named_buffers():
        if name.endswith("bias_mask"):
            # NaN until a checkpoint is loaded: ones for query and value, zeros for the key.
            buffer.copy_(torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(buffer.numel() // 3))
        elif name.endswith("periods"):
            model.rope_embed._init_weights()
    return model


@pytest.mark.parametrize("version", DINOS)
def test_dinos_keep_their_numbers(version: str) -> None:
    model = dino(version)
    ops = {PACKED if version == "dinov2" else SEPARATE, PATCHES}
    print(f"{version}: worst {hold_the_rule(model, images(4), 3, ops):.2f}")


@pytest.mark.parametrize("version", DINOS)
def test_lists_of_images(version: str) -> None:
    model = dino(version).train()
    crops = [images(2, 64), images(3, 32)]
    masks = [None, None]

    def features() -> list[Tensor]:
        return [output["x_norm_patchtokens"] for output in model.forward_features_list(crops, masks)]

    def nested() -> list[Tensor]:
        block, lists = model.blocks[0], [normal(2, 17, 192), normal(3, 5, 192)]
        return block(lists)

    if version == "dinov2" and not module_of("dinov2.layers.block").XFORMERS_AVAILABLE:
        swap(model)
        with pytest.raises(AssertionError):
            nested()
        attention = model.blocks[0].attn
        with pytest.warns(UserWarning, match=r"nested lists"), pytest.raises(AssertionError, match=r"xFormers is req"):
            attention(normal(1, 22, 192), attn_bias=object())
        return
    expected = features()
    swap(model)
    actual: list[Tensor] = []
    assert SEPARATE in ops_run(lambda: actual.extend(features()))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", DINOS)
def test_dino_behaviour(version: str) -> None:
    orders = []
    for swapped in (False, True):
        model, fired = dino(version), []
        for name, child in model.blocks[0].attn.named_modules():
            child.register_forward_hook(lambda *_, name=name, fired=fired: fired.append(name))
        if swapped:
            swap(model)
        assert bool(ops_run(lambda model=model: model(images())) & OURS) == swapped
        orders.append(fired)
    assert orders[0] == orders[1]
    assert "qkv" in orders[0]

    model = dino(version)
    expected = model(images())
    swap(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        torch.testing.assert_close(twin(images()), expected, rtol=1e-4, atol=1e-4)
        assert len(unswap(twin).rows) == 3
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: compiled(images())) & OURS
        program = torch.export.export(model, (images(3),))
        assert "fastvit.attention" in str(program.graph)
        torch.testing.assert_close(program.module()(images(3)), model(images(3)), rtol=1e-4, atol=1e-4)


def test_a_low_precision_rope_keeps_the_dtype_of_the_queries() -> None:
    module = livened(module_of("dinov3.layers.attention").SelfAttention(96, num_heads=3, qkv_bias=True))
    x, angles = normal(8, 17, 96), normal(16, 32, seed=4)
    ropes = [tuple(f(angles).to(dtype) for f in (torch.sin, torch.cos)) for dtype in (torch.float32, torch.bfloat16)]
    expected = [module(x, rope=rope) for rope in ropes]
    assert (expected[0] - expected[1]).abs().max() > 1e-4
    swap(module)
    for rope, wanted in zip(ropes, expected, strict=True):
        torch.testing.assert_close(module(x, rope=rope), wanted, rtol=1e-4, atol=1e-5)
        assert ops_run(lambda rope=rope: module(x, rope=rope)) == {SEPARATE}
    with pytest.raises(AssertionError):
        module(x, attn_bias=normal(17, 17))


def test_dinov3s_masked_key_bias_is_applied() -> None:
    model = dino("dinov3")
    expected = model(images())
    swap(model)
    mask = model.blocks[0].attn.qkv.bias_mask
    mask[: mask.numel() // 3] = 0.0
    assert (model(images()) - expected).abs().max() > 1e-4
    mask.fill_(torch.nan)
    assert model(images()).isnan().all()


@pytest.mark.parametrize("name", ["dinov2.layers.attention.Attention", "dinov3.layers.attention.CausalSelfAttention"])
def test_causal_attention_of_the_repositories(name: str) -> None:
    file, _, kind = name.rpartition(".")
    module = livened(getattr(module_of(file), kind)(96, num_heads=3, qkv_bias=True, attn_drop=0.4))
    print(f"worst {hold_the_rule(module, normal(8, 17, 96, seed=1), 1, {PACKED}):.2f}")
    x = normal(2, 17, 96)
    expected = [module(x, is_causal=is_causal) for is_causal in (True, False)]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    assert "attn_drop p=0.4 runs the plain forward in training" in str(swap(module))
    for is_causal, wanted in zip((True, False), expected, strict=True):
        torch.testing.assert_close(module(x, is_causal=is_causal), wanted, rtol=1e-4, atol=1e-5)
    results = []
    for swapped in (True, False):
        if not swapped:
            unswap(module)
        torch.manual_seed(1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(module.train()(x))
        assert any("attention dropout (p=0.4)" in str(w.message) for w in caught) == swapped
    assert torch.equal(*results)
    assert (results[0] - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("version", DINOS)
@pytest.mark.parametrize("flatten", [True, False])
def test_dino_patch_embeddings(version: str, flatten: bool) -> None:
    kind = module_of(f"{version}.layers.patch_embed").PatchEmbed
    module = livened(kind(64, 16, 3, 96, norm_layer=nn.LayerNorm, flatten_embedding=flatten))
    print(f"worst {hold_the_rule(module, images(4), 1, {PATCHES}):.2f}")
    wide = normal(2, 3, 96, 70, seed=7)
    if version == "dinov2":
        swap(module)
        with pytest.raises(AssertionError, match=r"multiple"):
            module(wide)
        return
    expected = module(wide)
    swap(module)
    torch.testing.assert_close(module(wide), expected, rtol=1e-4, atol=1e-4)
