"""What swap reports of timm models: what it changed, what it left alone and why, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastvit
from fastvit import scaled_dot_product_attention
from fastvit.modules.attention import FusedAttentionForward
from fastvit.swap import SwapReport, swap, unswap
from fastvit.testing import livened
from tests.swapping import images, run_python, state
from tests.test_swap import tiny

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")


class HalvingAttention(layers.Attention):
    """A user's subclass with its own forward."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 0.5 * super().forward(x, attn_mask, is_causal)


def _own_forward(model: nn.Module) -> None:
    attention = model.blocks[0].attn
    attention.forward = lambda x, attn_mask=None, is_causal=False: 3 * x


def _extra_child(model: nn.Module) -> None:
    model.blocks[0].attn.rel_pos_bias = nn.Parameter(torch.zeros(17, 17))


def _subclass(model: nn.Module) -> None:
    model.blocks[0].attn.__class__ = HalvingAttention


def _wide_heads(model: nn.Module) -> None:
    model.blocks[0].attn = layers.Attention(192, num_heads=1, attn_head_dim=300)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_forward, "its forward was replaced on the instance"),
        (_extra_child, "it has parts that fastvit does not know: rel_pos_bias"),
        (_subclass, "a subclass of Attention that may compute something else"),
        (_wide_heads, "head_dim 300: at most 256"),
    ],
)
def test_what_is_left_alone_and_why(change: Callable[[nn.Module], None], reason: str) -> None:
    model = tiny()
    change(model)
    expected, kind = model(images()), type(model.blocks[0].attn)
    with pytest.raises(ValueError, match=r"^strict: got True.*nothing was changed"):
        swap(model, strict=True)
    assert type(model.patch_embed) is layers.PatchEmbed
    report = swap(model)
    assert report.counts == {"fused": 2, "left alone": 1}
    assert report.left_alone[0].name == "blocks.0.attn"
    assert reason in report.left_alone[0].reason
    assert reason in str(report)
    assert type(model.blocks[0].attn) is kind
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "fused", "left_alone"),
    [
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, {"PatchEmbed": 1}, {"DiffAttention": 2}),
        (
            "vit_tiny_patch16_224",
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock},
            {"PatchEmbed": 1},
            {"ParallelScalingBlock": 2},
        ),
        (
            "vit_tiny_patch16_224",
            {"block_fn": timm.models.vision_transformer.ParallelThingsBlock},
            {"PatchEmbed": 1, "Attention": 4},
            {},
        ),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, {"PatchEmbed": 1}, {"WindowAttention": 2}),
    ],
)
def test_other_models_report_every_layer(name: str, options: dict, fused: dict, left_alone: dict) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **{"depth": 2, **options} if name.startswith("vit") else options)
    report = swap(model)
    for rows, expected in ((report.swapped, fused), (report.left_alone, left_alone)):
        found = [row.original_type for row in rows]
        assert {kind: found.count(kind) for kind in found} == expected
    assert all(row.reason for row in report.left_alone)


def test_swin_patch_embedding_keeps_its_layout() -> None:
    model = livened(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), img_size=56, window_size=7))
    expected = model(images(1, 56))
    assert swap(model).counts["fused"] == 1
    torch.testing.assert_close(model(images(1, 56)), expected, rtol=1e-4, atol=1e-4)


def test_patch_embed_with_size() -> None:
    module = livened(layers.PatchEmbedWithSize(32, 8, embed_dim=24))
    expected, size = module(images(2, 32))
    assert swap(module).counts == {"fused": 1}
    actual, actual_size = module(images(2, 32))
    torch.testing.assert_close(actual, expected)
    assert actual_size == size == torch.Size((4, 4))
    with pytest.raises(AssertionError, match=r"multiples of 8"):
        module(images(2, 36))


class Mixer(nn.Module):
    """An attention whose name does not say so."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        heads = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(heads.transpose(1, 2).flatten(2))


class AlreadyOurs(Mixer):
    """One that calls fastvit by itself."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(fastvit.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class OursByName(Mixer):
    """Another."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def test_an_attention_of_another_name_is_reported() -> None:
    model = nn.Sequential(Mixer(), nn.Sequential(Mixer()), AlreadyOurs(), OursByName())
    expected = model(images(1, 48)[0])
    report = swap(model)
    assert [(row.name, row.action) for row in report.rows] == [("0", "left alone"), ("1.0", "left alone")]
    name = "tests.test_swap_report.Mixer"
    assert report.rows[0].reason == f"no fused version of {name}, which calls scaled_dot_product_attention"
    with pytest.raises(ValueError, match=r"^strict: got True"):
        swap(model, strict=True)
    assert torch.equal(model(images(1, 48)[0]), expected)


def test_report_reads_well() -> None:
    report = swap(tiny(depth=12))
    lines = str(report).splitlines()
    assert len(lines) <= 6
    assert str(len(report.rows)) in str(report)
    assert any(line.startswith("blocks.0-11.attn ×12  Attention -> fused") for line in lines)
    assert any(line.startswith("patch_embed") and "PatchEmbed -> fused" in line for line in lines)
    assert any(line.startswith("cpu: the automatic order picks ") for line in lines)
    assert "reference" in str(swap(tiny(), backend="reference"))


def test_swapping_again_changes_at_most_the_backend() -> None:
    model = tiny()
    swap(model)
    before = state(model)
    assert swap(model).counts == {"already fused": 3}
    assert state(model) == before
    swap(model, backend="reference")
    assert model.patch_embed._fastvit_backend == model.blocks[1].attn._fastvit_backend == "reference"
    swap(model)
    assert state(model) == before


def test_models_with_nothing_to_swap() -> None:
    for model in (nn.Linear(2, 2), timm.create_model("resnet18")):
        report = swap(model, strict=True)
        assert isinstance(report, SwapReport)
        assert not report.rows
        assert "nothing to swap" in str(report)
    assert unswap(nn.Linear(2, 2)).rows == ()


def test_modules_built_fused_are_reported_and_kept() -> None:
    from fastvit.modules import Attention, PatchEmbed

    model = timm.create_model("vit_tiny_patch16_224", depth=2, attn_layer=Attention, embed_layer=PatchEmbed)
    report = swap(model)
    assert report.counts == {"already fused": 3}
    assert "built with fastvit.modules" in str(report)
    assert unswap(model).rows == ()
    assert type(model.patch_embed) is PatchEmbed


def test_modules_built_fused_keep_the_backend_they_were_built_with() -> None:
    from fastvit.modules import Attention

    for built in (None, "reference"):
        module = Attention(48, 3, backend=built)
        before, x = set(module.__dict__), torch.randn(1, 5, 48)
        assert swap(module).rows[0].backend == (built or "automatic")
        assert module._fastvit_backend == built
        assert swap(module, backend="cuda").rows[0].backend == "cuda"
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
            module(x)
        assert swap(copy.deepcopy(module)).rows[0].backend == (built or "automatic")
        unswap(module)
        assert module._fastvit_backend == built
        assert set(module.__dict__) == before
        module(x)


def test_a_root_module_swaps_itself() -> None:
    module = layers.Attention(48, 3)
    assert swap(module).rows[0].name == "(root)"
    assert isinstance(module, FusedAttentionForward)
    assert isinstance(module, layers.Attention)
    unswap(module)
    assert type(module) is layers.Attention


def test_bad_arguments_change_nothing() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"^backend: got 'fast'.*'reference'"):
        swap(model, backend="fast")
    assert type(model.patch_embed) is layers.PatchEmbed
    for call in (swap, unswap):
        with pytest.raises(TypeError, match=r"^model: got dict"):
            call({})


def test_timm_is_never_imported_for_its_own_sake() -> None:
    program = """
import sys
from fastvit.swap import swap
from fastvit.models import vit
assert swap(vit.vit_ti16(img_size=32, depth=1)).counts == {"fused": 2}
assert not any(name.split(".")[0] == "timm" for name in sys.modules)
"""
    run_python(program)
