"""What must survive a swap of timm's other attentions and of open_clip's: hooks, dropout, compile, export, pickle."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fastvit.swap import swap, unswap
from fastvit.testing import compare, livened
from tests.swapping import PACKED, SEPARATE, images, ops_run
from tests.test_swap_timm import (
    DINOV3,
    EVA,
    POOL,
    SMALL,
    VIT,
    build,
    frozen_beit,
    grads_of,
    grouped_queries,
)


def open_clips() -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    return livened(
        transformer.VisionTransformer(
            64, 16, 192, 1, 3, 2.0, output_dim=10, qk_norm=True, scale_heads=True, scale_attn_inner=True
        )
    )


# A model, and where its attention is.
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "eva02": (
        lambda: build(EVA, **SMALL, patch_size=16, scale_attn_inner=True),
        "blocks.0.attn",
    ),
    "dinov3": (lambda: build(DINOV3, **{**SMALL, "embed_dim": 192, "num_heads": 3}), "blocks.0.attn"),
    "gqa": (grouped_queries, "blocks.0.attn"),
    "beit": (frozen_beit, "blocks.0.attn"),
    "siglip": (lambda: build(VIT, **POOL), "attn_pool"),
    "cait": (lambda: build("cait_xxs24_224", depth=1, img_size=64, num_classes=10), "blocks_token_only.0.attn"),
    "open_clip": (open_clips, "transformer.resblocks.0.attn"),
}
OURS = {PACKED, SEPARATE}
subjects = pytest.mark.parametrize("subject", SUBJECTS)


@subjects
def test_hooks_on_children_fire_in_the_same_order(subject: str) -> None:
    make, path = SUBJECTS[subject]
    orders = []
    for swapped in (False, True):
        model, fired = make(), []
        attention = model.get_submodule(path)
        for name, child in attention.named_modules():
            if name != "attn_drop":
                child.register_forward_pre_hook(lambda *_, name=name, fired=fired: fired.append(f"pre {name}"))
                child.register_forward_hook(lambda *_, name=name, fired=fired: fired.append(f"forward {name}"))
        if swapped:
            swap(model)
        assert bool(ops_run(lambda model=model: model(images())) & OURS) == swapped
        orders.append(fired)
    assert orders[0] == orders[1]
    assert len(orders[0]) >= 6


@subjects
def test_hooks_that_change_values_are_obeyed(subject: str) -> None:
    make, path = SUBJECTS[subject]
    names = {"q_norm", "ln_q", "q", "k", "v", "kv", "proj", "out_proj"}
    for name in names & {name for name, _ in make().get_submodule(path).named_children()}:
        results = []
        for swapped in (False, True):
            model = make()
            model.get_submodule(path).get_submodule(name).register_forward_hook(lambda m, args, output: -20 * output)
            if swapped:
                swap(model)
            results.append(model(images()).detach())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
        assert (results[0] - make()(images())).abs().max() > 1e-4, name


@pytest.mark.parametrize("subject", ["eva02", "dinov3", "beit", "cait", "open_clip"])
def test_a_hook_on_attn_drop_and_attention_dropout_step_back(subject: str) -> None:
    make, path = SUBJECTS[subject]
    model = make()
    expected = model(images())
    report = swap(model)
    attention = model.get_submodule(path)
    handle = attention.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hook on attn_drop wants the attention matrix"):
        assert torch.equal(model(images()), model(images()))
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
    assert "stays silent" in str(swap(model))
    assert "stays silent" not in str(report)
    handle.remove()
    attention.attn_drop.p = 0.4
    assert "attn_drop p=0.4 runs the plain forward in training" in str(swap(model))
    assert ops_run(lambda: model(images())) & OURS
    unswap(model)
    results = []
    for swapped in (False, True):
        if swapped:
            swap(model)
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(model.train()(images()).detach())
        assert any("attention dropout (p=0.4)" in str(w.message) for w in caught) == swapped
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert (results[0] - expected).abs().max() > 1e-3


@subjects
def test_compile_fullgraph(subject: str) -> None:
    model = SUBJECTS[subject][0]()
    swap(model)
    expected = grads_of(model, images())
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        actual = grads_of(compiled, images())
        assert ops_run(lambda: compiled(images())) & OURS
    for (name, value), other in zip(expected.items(), actual.values(), strict=True):
        scale = value.abs().max().item()
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m, n=name: f"{n}: {m}")


@subjects
def test_export_with_a_dynamic_batch(subject: str) -> None:
    model = SUBJECTS[subject][0]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    swap(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},))
    assert "fastvit.attention" in str(program.graph)
    torch.testing.assert_close(program.module()(images(5)), model(images(5)), rtol=1e-4, atol=1e-4)


@subjects
def test_symbolic_tracing(subject: str) -> None:
    model = SUBJECTS[subject][0]()
    swap(model)
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        torch.testing.assert_close(traced(images()), model(images()))
        assert ops_run(lambda: traced(images())) & OURS


@subjects
def test_deepcopy_and_pickle(subject: str) -> None:
    make, path = SUBJECTS[subject]
    model = make()
    plain = type(model.get_submodule(path))
    swap(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(twin(images()), model(images()))
        unswap(twin)
        assert type(twin.get_submodule(path)) is plain
    assert type(model.get_submodule(path)) is not plain


@pytest.mark.parametrize("subject", ["eva02", "dinov3", "beit", "siglip", "cait"])
def test_both_conventions_of_the_scale(subject: str) -> None:
    make, path = SUBJECTS[subject]
    for fused_attn in (True, False):
        model = make()
        attention = model.get_submodule(path)
        attention.fused_attn, attention.scale = fused_attn, 2 * attention.scale
        expected = model(images())
        swap(model)
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
        assert ((expected - make()(images())).abs().max() > 1e-4) == (not fused_attn)


@subjects
def test_autocast_and_16_bits(subject: str) -> None:
    model = SUBJECTS[subject][0]()
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(images(8).double())
        with torch.autocast("cpu", torch.bfloat16):
            own = model(images(8))
            swap(model)
            mine = model(images(8))
        assert mine.dtype == own.dtype
        assert compare(mine, truth, own, "autocast").passed
        unswap(model)
        model, x = model.to(torch.bfloat16), images(8).to(torch.bfloat16)
        truth, own = copy.deepcopy(model).double()(x.double()), model(x)
        swap(model)
        comparison = compare(model(x), truth, own, "bfloat16")
    assert comparison.passed, comparison
