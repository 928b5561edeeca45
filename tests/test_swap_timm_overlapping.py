"""swap on timm's patch embeddings whose patches overlap: values, gradients, sizes, and what steps back."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.swap import swap, unswap
from fastvit.testing import check_model, compare_runs, livened
from tests.swapping import PATCHES, forward_backward, hold_the_rule, images, normal, ops_run, state

timm = pytest.importorskip("timm")
mvitv2 = pytest.importorskip("timm.models.mvitv2")
hieradet = pytest.importorskip("timm.models.hieradet_sam2")


def mvit(**options: Any) -> nn.Module:
    """Return an MViTv2 of the published width, so that gradients of norms have enough elements, and two blocks."""
    options = {"depths": (1, 1), **options}
    config = mvitv2.MultiScaleVitCfg(stride_q=((1, 1), (2, 2)), **options)
    return livened(mvitv2.MultiScaleVit(config, img_size=64, num_classes=10))


def layer(**options: Any) -> nn.Module:
    return mvitv2.PatchEmbed(**{"dim_out": 24, **options})


def test_mvitv2_holds_the_rule() -> None:
    model, x = mvit(), images(8)
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    comparisons = check_model(model, x)
    assert {comparison.name for comparison in comparisons} >= {"output 0", "patch_embed.proj.weight"}
    assert all(comparison.passed for comparison in comparisons), max(comparisons, key=lambda each: each.ratio)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())


class UnfoldedConv2d(nn.Conv2d):
    """A Conv2d as unfold and a product: PyTorch's other implementation."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = super().forward(input[:1].detach()).shape[2:]
        patches = F.unfold(input, self.kernel_size, 1, self.padding, self.stride).transpose(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (rows, columns))


def test_mvitv2_is_swapped_and_restored_in_place() -> None:
    model, x = mvit(), images(8)
    unfolded = copy.deepcopy(model)
    unfolded.patch_embed.proj.__class__ = UnfoldedConv2d
    truth = forward_backward(copy.deepcopy(model).double(), x.double())
    # Its attention is written out, so that what PyTorch has two implementations of are the patches.
    runs = [forward_backward(each, x) for each in (model, unfolded)]
    before = state(model)
    assert swap(model).counts["fused"] == 1
    assert state(model) == before
    mine: dict[str, Tensor] = {}
    assert ops_run(lambda: mine.update(forward_backward(model, x))) == {PATCHES}
    comparisons = compare_runs(mine, truth, runs)
    assert all(comparison.passed for comparison in comparisons), max(comparisons, key=lambda each: each.ratio)
    assert unswap(model).counts == {"restored": 1}
    assert state(model) == before
    assert type(model.patch_embed) is mvitv2.PatchEmbed
    restored = forward_backward(model, x)
    assert all(torch.equal(restored[key], runs[0][key]) for key in restored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_holds_the_rule(dtype: torch.dtype) -> None:
    comparisons = check_model(layer(dim_out=96).to(dtype), images(2).to(dtype))
    assert [comparison.name for comparison in comparisons] == ["output 0", "proj.weight", "proj.bias"]
    assert all(comparison.passed for comparison in comparisons), max(comparisons, key=lambda each: each.ratio)


def test_the_published_model_is_swapped_and_restored() -> None:
    model = timm.create_model("mvitv2_tiny", num_classes=10).eval()
    x = images(1, 224)
    with torch.no_grad():
        expected = model(x)
        report = swap(model)
        assert [(row.name, row.original_type) for row in report.swapped] == [("patch_embed", "PatchEmbed")]
        actual: list[Tensor] = []
        assert ops_run(lambda: actual.append(model(x))) == {PATCHES}
        torch.testing.assert_close(actual[0], expected, rtol=1e-4, atol=1e-4)
        unswap(model)
        assert type(model.patch_embed) is mvitv2.PatchEmbed
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dim_in": 1},
        {"kernel": (3, 5), "stride": (2, 7), "padding": (1, 0)},
        {"kernel": (4, 4), "stride": (4, 4), "padding": (0, 0)},
        {"kernel": (4, 4), "stride": (4, 4), "padding": (2, 1)},
    ],
    ids=str,
)
def test_the_layer_returns_the_same_tokens_and_the_same_size(options: dict) -> None:
    plain = layer(**options)
    fused = copy.deepcopy(plain)
    assert swap(fused).counts == {"fused": 1}
    for size in ((64, 64), (37, 50)):
        x = normal(2, options.get("dim_in", 3), *size)
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            (expected, shape), (tokens, fused_shape) = plain(given), fused(given)
            assert fused_shape == shape
            assert isinstance(fused_shape, torch.Size)
            torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
    assert ops_run(lambda: fused(x)) == {PATCHES}


def test_hiera_of_sam2_holds_the_rule() -> None:
    model = hieradet.HieraDet(stages=(1, 1), window_spec=(8, 4), global_att_blocks=(), q_pool=1, num_classes=10)
    print(f"worst {hold_the_rule(livened(model), images(8), 1, {PATCHES}):.2f}")
    plain = hieradet.HieraPatchEmbed(embed_dim=24)
    fused = copy.deepcopy(plain)
    assert swap(fused).counts == {"fused": 1}
    for x in (normal(2, 3, 37, 50), normal(2, 3, 37, 50).contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    fused.proj.padding_mode = "circular"
    with pytest.warns(UserWarning, match="runs its plain forward"):
        assert fused(x).shape == plain(x).shape


def test_a_hook_and_a_replaced_proj_step_back() -> None:
    expected = layer()
    x = normal(1, 3, 32, 32)
    hooked, fired = copy.deepcopy(expected), []
    hooked.proj.register_forward_hook(lambda *_: fired.append(1))
    reflected = copy.deepcopy(expected)
    reflected.proj.padding_mode = "reflect"
    same = copy.deepcopy(expected)
    same.proj.stride, same.proj.padding = (1, 1), "same"
    dilated = copy.deepcopy(expected)
    dilated.proj.dilation = (2, 2)
    for changed, word in ((hooked, "hook"), (reflected, "padding"), (same, "padding same"), (dilated, "dilation")):
        before = changed(x)[0]
        fired.clear()
        assert word in str(swap(changed))
        with pytest.warns(UserWarning, match="runs its plain forward"):
            assert torch.equal(changed(x)[0], before)
        assert len(fired) == (changed is hooked)
    grown = copy.deepcopy(expected)
    grown.norm = nn.Identity()
    assert "parts that fastvit does not know: norm" in str(swap(grown))
    assert type(grown) is mvitv2.PatchEmbed
    own = copy.deepcopy(expected)
    own.forward = lambda x: x
    assert "replaced on the instance" in str(swap(own))


def test_compile_and_export_of_a_swapped_model() -> None:
    model, x = mvit(), images(2)
    expected = model(x)
    swap(model)
    # tests/test_patch_embed_stride.py has the op in Inductor.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (x,))
    assert any("fastvit.patch_embed" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_the_backend_of_a_swap_is_the_one_that_runs() -> None:
    model, x = mvit(), images(2)
    expected = forward_backward(model, x)
    swap(model, backend="reference")
    for key, value in forward_backward(model, x).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)
    swap(model, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call"):
        model(x)
