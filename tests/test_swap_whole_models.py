"""Models of two towers and models that are swapped in part: what their users do with them goes on working."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastvit.swap import swap, unswap
from fastvit.testing import compare_runs
from tests.swapping import PACKED, PATCHES, SEPARATE, images, normal, ops_run
from tests.torch_paths import lively, step, torchs_own

Call = tuple[tuple[Any, ...], dict[str, Any]]
# The rule compares the largest errors: over the few tokens of a few images that is luck.
IMAGES = 15


class Joined(nn.Module):
    """Both towers of a model as one tensor."""

    def __init__(self, model: nn.Module, keys: tuple[Any, ...]) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, pixels: Tensor, words: Tensor, **options: Any) -> Tensor:
        """Return image and text features, normalised, side by side."""
        named = {"pixel_values": pixels, "input_ids": words, **options}
        answer = self.model(**named) if options else self.model(pixels, words)
        return torch.cat([answer[key] for key in self.keys], dim=-1)


def words(length: int) -> Tensor:
    return torch.randint(2, 90, (IMAGES, length), generator=torch.Generator().manual_seed(5))


def open_clips() -> tuple[nn.Module, Call]:
    """Return open_clip's CLIP as it comes: nn.MultiheadAttention in both towers, an additive causal mask in one."""
    kind = pytest.importorskip("open_clip.model").CLIP
    vision = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 1, "head_width": 32}
    text = {"context_length": 12, "vocab_size": 99, "width": 96, "heads": 3, "layers": 1}
    return lively(Joined(kind(32, vision, text), (0, 1))).eval(), ((images(IMAGES, 32), words(12)), {})


def transformers_(name: str) -> tuple[nn.Module, Call]:
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 128}
    text = {"vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 0}
    options = {"projection_dim": 32} if name == "CLIP" else {}
    config = getattr(library, f"{name}Config")(
        text_config={**sizes, **text, **options}, vision_config={**sizes, "image_size": 32, "patch_size": 8}, **options
    )
    model = getattr(library, f"{name}Model")(config)
    mask = torch.arange(12) < torch.tensor([12, 7, 3] * 5)[:, None]
    call = ((images(IMAGES, 32), words(12)), {"attention_mask": mask.long()})
    return lively(Joined(model, ("image_embeds", "text_embeds"))).eval(), call


# With the number of swapped modules and the ops that run.
MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Call]], int, set[str]]] = {
    "open_clip": (open_clips, 3, {PACKED, PATCHES}),
    "transformers' CLIP": (lambda: transformers_("CLIP"), 3, {SEPARATE, PATCHES}),
    "transformers' SigLIP": (lambda: transformers_("Siglip"), 5, {SEPARATE, PATCHES}),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_towers_hold_the_rule_and_their_weights_travel(name: str) -> None:
    make, fused, ops = MODELS[name]
    model, ((pixels, ids), options) = make()
    exact, twin = copy.deepcopy(model).double(), copy.deepcopy(model)

    def run(of: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return step(lambda image: of(image, ids, **options), of, x)

    truth, own = run(exact, pixels.double()), torchs_own(lambda: run(model, pixels))
    assert swap(model, strict=True).counts == {"fused": fused}
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(run(model, pixels))) == ops
    assert mine.keys() == truth.keys()
    runs = [dict(zip(own, each, strict=True)) for each in zip(*own.values(), strict=True)]
    comparisons = compare_runs(mine, truth, runs)
    assert all(comparison.passed for comparison in comparisons), max(comparisons, key=lambda each: each.ratio)
    twin.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(twin.state_dict(), strict=True)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    with torch.no_grad():
        expected = twin(pixels, ids, **options)
        for copied in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
            torch.testing.assert_close(copied(pixels, ids, **options), expected, rtol=1e-4, atol=1e-5)
            assert ops_run(lambda copied=copied: copied(pixels, ids, **options)) == ops
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(pixels, ids, **options), expected, rtol=0.05, atol=0.02, check_dtype=False)
        assert len(unswap(model).rows) == fused
        assert torch.equal(model(pixels, ids, **options), expected)


def test_a_swapped_transformers_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, ((pixels, ids), options) = transformers_("CLIP")
    expected = model(pixels, ids, **options)
    swap(model, strict=True)
    model.model.save_pretrained(tmp_path)
    loaded = type(transformers_("CLIP")[0].model).from_pretrained(tmp_path)
    assert [type(module) for module in loaded.modules()] == [
        type(module) for module in transformers_("CLIP")[0].model.modules()
    ]
    again = Joined(loaded.eval(), model.keys)
    torch.testing.assert_close(again(pixels, ids, **options), expected, rtol=1e-5, atol=1e-6)
    swap(again, strict=True)
    torch.testing.assert_close(again(pixels, ids, **options), expected, rtol=1e-4, atol=1e-5)


def test_open_clips_attentional_pooler() -> None:
    kind = pytest.importorskip("open_clip.transformer").AttentionalPooler
    pooler = lively(kind(d_model=64, context_dim=96, n_head=4, n_queries=5)).eval()
    tokens = normal(3, 17, 96)
    expected = pooler(tokens)
    assert swap(pooler, strict=True).counts == {"fused": 1}
    torch.testing.assert_close(pooler(tokens), expected, rtol=1e-4, atol=1e-5)
    assert ops_run(lambda: pooler(tokens)) == {SEPARATE}


def test_torchvisions_half_swapped_swin_keeps_its_weights() -> None:
    kind = pytest.importorskip("torchvision.models.swin_transformer").SwinTransformer

    def swin() -> nn.Module:
        return kind([4, 4], 48, [1, 1], [3, 6], [4, 4], num_classes=10, stochastic_depth_prob=0.0)

    model, other = lively(swin()).eval(), swin().eval()
    expected, keys = model(images(2, 64)), list(model.state_dict())
    report = swap(model)
    assert report.counts == {"fused": 1, "left alone": 2}
    assert list(model.state_dict()) == keys
    assert any(key.endswith("relative_position_index") for key in keys)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(images(2, 64)), expected)
    swap(other)
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other(images(2, 64)), expected, rtol=1e-4, atol=1e-4)


def test_timms_patch_embedding_changes_its_size_after_the_swap() -> None:
    layers = pytest.importorskip("timm.layers")
    pair = [lively(layers.PatchEmbed(32, 8, embed_dim=24)).eval() for _ in range(2)]
    plain, fused = pair
    swap(fused)
    for change in ({"img_size": 48}, {"patch_size": (4, 8)}, {"img_size": (64, 48), "patch_size": 16}):
        for one in pair:
            one.set_input_size(**change)
        assert (plain.grid_size, plain.num_patches) == (fused.grid_size, fused.num_patches)
        for as_scalar in (True, False):
            assert plain.feat_ratio(as_scalar) == fused.feat_ratio(as_scalar)
        assert plain.dynamic_feat_size((96, 80)) == fused.dynamic_feat_size((96, 80))
        x = normal(2, 3, *plain.img_size)
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
        assert ops_run(lambda x=x: fused(x)) == {PATCHES}
    for one in pair:
        one.output_fmt, one.flatten = layers.Format.NHWC, False
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    assert fused(x).shape == (2, 4, 3, 24)


@pytest.mark.parametrize("options", [{"attn_head_dim": 24}, {"dim_out": 64}, {"gated": True}])
def test_timms_attention_of_other_widths(options: dict[str, Any]) -> None:
    layers = pytest.importorskip("timm.layers")
    attention = lively(layers.Attention(96, num_heads=3, **options)).eval()
    expected = attention(normal(2, 17, 96))
    assert swap(attention, strict=True).counts == {"fused": 1}
    torch.testing.assert_close(attention(normal(2, 17, 96)), expected, rtol=1e-4, atol=1e-5)
    assert ops_run(lambda: attention(normal(2, 17, 96))) == {PACKED}


@pytest.mark.parametrize(("name", "reason"), [("Swin", "relative position bias and a mask"), ("Swinv2", "cosine")])
def test_transformers_swin_says_why_its_windows_are_left_alone(name: str, reason: str) -> None:
    library = pytest.importorskip("transformers")
    config = getattr(library, f"{name}Config")(
        image_size=32, patch_size=4, embed_dim=24, depths=[2], num_heads=[3], window_size=4
    )
    model = lively(getattr(library, f"{name}Model")(config)).eval()
    with torch.no_grad():
        expected = model(images(2, 32)).last_hidden_state
        report = swap(model)
        assert report.counts == {"fused": 1, "left alone": 2}
        assert all(reason in row.reason for row in report.left_alone)
        torch.testing.assert_close(model(images(2, 32)).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
