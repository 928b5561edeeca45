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
from fastvit.modules.attention import FusedAttentionForward
from fastvit.swap import SwapReport, swap, unswap
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
    run_python,
    state,
    torchs_paths,
)

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")


def tiny(**options: Any) -> nn.Module:
    options = {"depth": 2, "img_size": 64, "num_classes": 10, **options}
    return livened(timm.create_model("vit_tiny_patch16_224", **options))


REAL_MODELS = [
    ("vit_tiny_patch16_224", 224, 2),
    ("vit_small_patch16_384", 384, 1),
    ("vit_base_patch32_224", 224, 1),
    ("deit_tiny_distilled_patch16_224", 224, 2),
    ("vit_small_patch14_dinov2", 518, 1),
]


@pytest.mark.parametrize(("name", "size", "batch"), REAL_MODELS)
def test_real_models_keep_their_numbers(
    name: str, size: int, batch: int, record_property: Callable[[str, object], None]
) -> None:
    model = livened(timm.create_model(name))
    x = images(batch, size)
    truth = forward_backward(copy.deepcopy(model).double(), x.double())
    runs = torchs_paths(model, lambda: forward_backward(model, x))
    own, unswapped = by_tensor(runs), runs[0]
    before = state(model)
    classes = [type(module) for module in model.modules()]

    report = swap(model, strict=True)
    assert report.counts == {"fused": 13}
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

    assert len(unswap(model).rows) == 13
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
    assert "_fastvit_warned" not in model.blocks[0].attn.__dict__


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


def test_deepcopy() -> None:
    model = tiny()
    swap(model, backend="reference")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images()), model(images()))
    assert ops_run(lambda: twin(images())) == {PACKED, PATCHES}
    unswap(twin)
    assert type(twin.patch_embed) is layers.PatchEmbed
    assert type(model.patch_embed) is not layers.PatchEmbed


def test_pickle_into_a_fresh_interpreter(tmp_path: Path) -> None:
    model = tiny()
    swap(model, backend="reference")
    path = tmp_path / "model.pt"
    torch.save({"model": model, "x": images(), "logits": model(images()).detach()}, path)
    program = """
import sys, torch
saved = torch.load(sys.argv[1], weights_only=False)
model = saved["model"]
assert (model(saved["x"]) - saved["logits"]).abs().max() < 1e-5
from fastvit.swap import swap, unswap
print(swap(model, backend="reference").counts, len(unswap(model).rows), type(model.patch_embed).__module__)
"""
    assert run_python(program, path).strip() == "{'already fused': 3} 3 timm.layers.patch_embed"


def test_timm_is_never_imported_for_its_own_sake() -> None:
    program = """
import sys
from fastvit.swap import swap
from fastvit.models import vit
assert swap(vit.vit_ti16(img_size=32, depth=1)).counts == {"fused": 2}
assert not any(name.split(".")[0] == "timm" for name in sys.modules)
"""
    run_python(program)


def test_compile_fullgraph() -> None:
    model = tiny()
    swap(model)
    x = images()
    expected = forward_backward(model, x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits = compiled(x)
        grads = torch.autograd.grad((logits * normal(*logits.shape, seed=3)).sum(), list(model.parameters()))
        assert ops_run(lambda: compiled(x)) == {PACKED, PATCHES}
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_inductor_runs_the_ops() -> None:
    model = tiny(depth=1)
    swap(model)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        expected = model(images())
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: compiled(images())) == {PACKED, PATCHES}


def test_compiled_before_the_swap() -> None:
    model = tiny()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(images())
    assert swap(compiled).counts == {"fused": 3}
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: compiled(images())) == {PACKED, PATCHES}
    unswap(model)
    assert ops_run(lambda: compiled(images())) == set()


def test_compile_with_attention_dropout() -> None:
    model = tiny(attn_drop_rate=0.3).train()
    swap(model)
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images()).sum().backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0


def test_export_with_a_dynamic_batch() -> None:
    model = tiny()
    swap(model)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(3),), dynamic_shapes={"x": {0: batch}})
    code = str(program.graph)
    assert "fastvit.attention_qkvpacked" in code
    assert "fastvit.patch_embed" in code
    for size in (1, 5):
        torch.testing.assert_close(program.module()(images(size)), model(images(size)), rtol=1e-4, atol=1e-4)


def test_symbolic_tracing() -> None:
    model = tiny()
    swap(model)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(images()), model(images()))
    assert ops_run(lambda: traced(images())) == {PACKED, PATCHES}


def test_inference_mode_and_checkpointing() -> None:
    model = tiny().train()
    swap(model)
    with torch.inference_mode():
        inferred = model(images())
    expected = forward_backward(model, images())
    torch.testing.assert_close(inferred, expected["logits"])
    model.set_grad_checkpointing()
    checkpointed = forward_backward(model, images())
    for name, value in expected.items():
        torch.testing.assert_close(checkpointed[name], value, msg=lambda m, name=name: f"{name}: {m}")


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
