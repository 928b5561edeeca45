"""The reference ViT: equal to timm's with timm's weights, of the paper's size, and loaded whole or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastvit.models import VARIANTS, VisionTransformer, create, load_checkpoint, vit
from fastvit.testing import compare

timm = pytest.importorskip("timm")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, so that zero-initialised ones count too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(base + 0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(
    ("variant", "options", "timm_name", "timm_options"),
    [
        ("Ti/16", {}, "vit_tiny_patch16_224", {}),
        ("S/16", {"img_size": 384}, "vit_small_patch16_384", {}),
        ("B/32", {}, "vit_base_patch32_224", {}),
        (
            "Ti/16",
            {"global_pool": "avg"},
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "class_token": False, "fc_norm": False},
        ),
        (
            "Ti/16",
            {"global_pool": "avg", "class_token": True, "qkv_bias": False},
            "vit_tiny_patch16_224",
            {"global_pool": "avg", "fc_norm": False, "qkv_bias": False},
        ),
    ],
)
def test_timm_weights_give_timm_logits(variant: str, options: dict, timm_name: str, timm_options: dict) -> None:
    theirs = randomised(timm.create_model(timm_name, **timm_options))
    ours = create(variant, **options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = torch.randn(1, 3, *ours.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own_float32, torch_float32 = ours(images), theirs(images)
        truth = theirs.double()(images.double())
        exact = ours.double()(images.double())
    assert truth.std() > 0.1
    # Both are float64: only the order of sums differs, over at most a few thousand terms per layer and 12 layers.
    torch.testing.assert_close(exact, truth, rtol=1e-10, atol=1e-10)
    comparison = compare(own_float32, truth, torch_float32, "logits")
    assert comparison.passed, comparison


def parameters(embed_dim: int, depth: int, patch: int, tokens: int, classes: int) -> int:
    """Count the parameters by the paper's equations 1 to 4, with biases, not by the code."""
    attention = 4 * embed_dim**2 + 4 * embed_dim
    mlp = 2 * 4 * embed_dim**2 + 4 * embed_dim + embed_dim
    norms = 2 * 2 * embed_dim
    embedding = 3 * patch**2 * embed_dim + embed_dim + embed_dim + (tokens + 1) * embed_dim
    return depth * (attention + mlp + norms) + embedding + 2 * embed_dim + classes * (embed_dim + 1)


@pytest.mark.parametrize(
    ("variant", "exact", "paper"),
    [
        ("B/16", 86_567_656, 86e6),
        ("L/16", 304_326_632, 307e6),
        ("L/32", 306_535_400, 307e6),
        ("H/14", 632_045_800, 632e6),
    ],
)
def test_parameter_counts_are_the_papers(variant: str, exact: int, paper: float) -> None:
    with torch.device("meta"):
        model = create(variant)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == exact
    embed_dim, depth, _, patch = VARIANTS[variant]
    assert count == parameters(embed_dim, depth, patch, (224 // patch) ** 2, 1000)
    # Table 1 of the paper does not say which patch size and head it counts; every choice is within 1 % of it.
    assert abs(count - paper) / paper < 0.01


def test_every_variant_has_its_factory() -> None:
    with torch.device("meta"):
        for variant, (embed_dim, depth, num_heads, patch_size) in VARIANTS.items():
            model = getattr(vit, "vit_" + variant.lower().replace("/", ""))(num_classes=3)
            assert len(model.blocks) == depth
            assert model.blocks[0].attn.num_heads == num_heads
            assert model.patch_embed.proj.weight.shape == (embed_dim, 3, patch_size, patch_size)
            assert model.head.weight.shape == (3, embed_dim)


def test_attention_is_the_papers_equation() -> None:
    attention = randomised(vit.Attention(24, num_heads=3)).double()
    x = 5 * torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    qkv = x @ attention.qkv.weight.T + attention.qkv.bias
    heads = []
    for head in range(3):
        query, key, value = (qkv[..., start + 8 * head : start + 8 * (head + 1)] for start in (0, 24, 48))
        weights = torch.exp(query @ key.transpose(1, 2) / math.sqrt(8))
        heads.append(weights / weights.sum(-1, keepdim=True) @ value)
    expected = torch.cat(heads, -1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_a_hook_on_softmax_reads_the_attention_matrix() -> None:
    model = randomised(VisionTransformer(**SMALL))
    seen: list[Tensor] = []
    model.blocks[1].attn.softmax.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.randn(2, 3, 32, 32))
    assert seen[0].shape == (2, 4, 17, 17)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 17))


def test_sincos2d_positions_by_the_formula() -> None:
    positions = vit.sincos2d_positions((3, 5), 16, num_prefix_tokens=1)
    assert positions.shape == (1, 16, 16)
    assert (positions[0, 0] == 0).all()
    row, column, i = 2, 3, 2
    omega = 10000 ** (-i / 3)
    token = positions[0, 1 + row * 5 + column]
    expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
    assert token[[i, 4 + i, 8 + i, 12 + i]].tolist() == pytest.approx(expected, abs=1e-14)


def test_fixed_positions_are_no_parameter_but_count() -> None:
    model = randomised(VisionTransformer(**SMALL, pos_embed="sincos2d"))
    assert "pos_embed" not in dict(model.named_parameters())
    assert "pos_embed" in model.state_dict()
    images = torch.randn(1, 3, 32, 32)
    flipped = model(images.flip(-1))
    assert (model(images) - flipped).abs().max() > 1e-3


def test_initial_values() -> None:
    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=128, depth=2, num_heads=2)
    assert (model.head.weight == 0).all()
    assert (model.head.bias == 0).all()
    assert (model.cls_token == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.blocks[1].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)
    assert model.blocks[0].norm1.eps == 1e-6


def test_options_shapes_and_dropout() -> None:
    images = torch.randn(2, 1, 24, 40)
    options = {**SMALL, "img_size": (24, 40), "patch_size": (8, 4), "in_chans": 1, "num_classes": 0, "mlp_ratio": 2.0}
    model = VisionTransformer(**options, dropout=0.5).double()
    assert model.blocks[0].mlp.fc1.weight.shape == (64, 32)
    assert model.patch_embed.num_patches == 30
    features = model.eval()(images.double())
    assert features.shape == (2, 32)
    assert features.dtype == torch.float64
    assert (features - model(images.double())).abs().max() == 0
    model.train()
    assert (model(images.double()) - features).abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"img_size": 30}, "img_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"num_heads": 5}, "num_heads"),
        ({"pos_embed": "rope"}, "pos_embed"),
        ({"global_pool": "max"}, "global_pool"),
        ({"class_token": False}, "class_token"),
        ({"pos_embed": "sincos2d", "embed_dim": 18, "num_heads": 1}, "embed_dim"),
    ],
)
def test_bad_options_are_named(options: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got"):
        VisionTransformer(**{**SMALL, **options})


def test_bad_images_and_variants_are_named() -> None:
    with pytest.raises(ValueError, match=r"^images: got shape \(1, 3, 32, 40\); accepted is \(batch, 3, 32, 32\)"):
        VisionTransformer(**SMALL)(torch.randn(1, 3, 32, 40))
    with pytest.raises(ValueError, match=r"^variant: got 'B/64'.*'B/16'"):
        create("B/64")


def _save(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights.pt"])
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    source, target = randomised(VisionTransformer(**SMALL)), VisionTransformer(**SMALL)
    assert load_checkpoint(target, _save(tmp_path / name, source.state_dict())) is target
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_checkpoint_wrappers_and_prefix(wrapper: str, tmp_path: Path) -> None:
    source, target = randomised(VisionTransformer(**SMALL)), VisionTransformer(**SMALL)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    load_checkpoint(target, _save(tmp_path / "w.pth", {wrapper: state, "epoch": 3}))
    assert torch.equal(target.head.weight, source.head.weight)


def _broken(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    if fault == "missing":
        del state["blocks.0.attn.qkv.weight"]
    elif fault == "unexpected":
        state["blocks.0.attn.gamma"] = torch.zeros(3)
    elif fault == "shape":
        state["pos_embed"] = torch.zeros(1, 50, 32)
    return state


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 keys are missing \(blocks.0.attn.qkv.weight\)"),
        ("unexpected", r"1 keys are unexpected \(blocks.0.attn.gamma\)"),
        ("shape", r"1 shapes differ \(pos_embed: file \(1, 50, 32\), model \(1, 17, 32\)\)"),
    ],
)
@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth"])
def test_a_checkpoint_that_does_not_fit_changes_nothing(fault: str, message: str, name: str, tmp_path: Path) -> None:
    source, target = randomised(VisionTransformer(**SMALL), 1), randomised(VisionTransformer(**SMALL), 2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    path = _save(tmp_path / name, _broken(source.state_dict(), fault))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        load_checkpoint(target, path)
    assert all(torch.equal(target.state_dict()[key], value) for key, value in before.items())


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    model = VisionTransformer(**SMALL)
    with pytest.raises(FileNotFoundError, match=r"absent.pth"):
        load_checkpoint(model, tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"accepted is a file"):
        load_checkpoint(model, tmp_path)
    for name in ("text.safetensors", "text.pth", "empty.pt", "text.npz"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"this is no checkpoint at all")
        with pytest.raises(ValueError, match=name):
            load_checkpoint(model, tmp_path / name)
    for name, content in (("list.pth", [1, 2]), ("nothing.pth", {}), ("mixed.pth", {"a": torch.zeros(1), "epoch": 3})):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_checkpoint(model, tmp_path / name)


def test_a_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    torch.save(VisionTransformer(**SMALL), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole.pth"):
        load_checkpoint(VisionTransformer(**SMALL), tmp_path / "whole.pth")
