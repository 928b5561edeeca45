"""Swapping bare patch convolutions: conv2d's shape and numbers, in the memory of tokens."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastvit.adapters.torch_nn import FusedPatchConv2d
from fastvit.models import vit
from fastvit.swap import swap, unswap
from tests.swapping import PATCHES, normal, ops_run, state
from tests.torch_paths import check, step


def conv(*sizes: Any, seed: int = 0, **options: Any) -> nn.Conv2d:
    module = nn.Conv2d(*(sizes or (3, 24, 8, 8)), **options)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            spread = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * normal(*parameter.shape, seed=seed + index))
    return module.eval()


def fused(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    assert swap(module, strict=True).counts == {"fused": 1}
    return module


CASES: dict[str, tuple[Callable[[], nn.Conv2d], Tensor]] = {
    "image": (conv, normal(2, 3, 40, 56)),
    "no batch": (conv, normal(3, 40, 56)),
    "channels last": (conv, normal(2, 3, 40, 56).contiguous(memory_format=torch.channels_last)),
    "not divisible": (conv, normal(2, 3, 47, 57)),
    "not divisible, no batch": (conv, normal(3, 47, 57)),
    "no bias": (lambda: conv(3, 24, 8, 8, bias=False), normal(2, 3, 40, 40)),
    "padding='valid'": (lambda: conv(3, 24, 8, 8, padding="valid"), normal(2, 3, 40, 40)),
    "patch 14": (lambda: conv(3, 24, 14, 14), normal(2, 3, 56, 70)),
    "patch 4 × 6": (lambda: conv(1, 24, (4, 6), (4, 6)), normal(2, 1, 20, 30)),
    "16 channels": (lambda: conv(16, 24, 4, 4), normal(2, 16, 20, 20)),
    "a view": (conv, normal(40, 2, 56, 3).permute(1, 3, 0, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_layout_are_conv2ds(case: str) -> None:
    module, images = CASES[case][0](), CASES[case][1]
    mine, exact = fused(module), copy.deepcopy(module).double()
    truth, own = step(exact, exact, images.double()), step(module, module, images)
    check(step(mine, mine, images), truth, own, case)
    assert ops_run(lambda: mine(images)) == {PATCHES}
    grid = mine(images)
    assert grid.shape == module(images).shape
    assert grid.flatten(-2).transpose(-1, -2).is_contiguous()
    assert grid.reshape(*grid.shape[:-2], -1).data_ptr() == grid.data_ptr()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(17, 8, 4, 4), "17 channels are a feature map, no image: at most 16"),
        (lambda: nn.Conv2d(3, 8, 4, 4, dilation=2), "dilation (2, 2), groups 1 and padding_mode 'zeros'"),
        (lambda: nn.Conv2d(3, 8, 4, 4, padding_mode="reflect"), "padding_mode 'reflect'"),
        (lambda: nn.Conv2d(3, 8, 4, 4, dtype=torch.complex64), "weights of torch.complex64"),
        (lambda: nn.LazyConv2d(8, 4, 4), "a subclass of Conv2d that may compute something else"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 4, 4)), "a subclass of Conv2d"),
    ],
)
def test_patch_convolutions_that_are_left_alone_have_a_row(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(make())
    kind = type(model[0])
    with pytest.raises(ValueError, match=r"^strict"):
        swap(model, strict=True)
    report = swap(model)
    assert report.counts == {"left alone": 1}
    assert reason in report.left_alone[0].reason
    assert type(model[0]) is kind


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 3},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": (4, 2), "stride": (4, 2)},
        {"kernel_size": 7, "stride": 4, "padding": 3},
        {"kernel_size": 4, "stride": 4, "padding": 1},
        {"kernel_size": 4, "stride": 4, "groups": 3},
        {"kernel_size": 4, "padding": "same"},
        {"kernel_size": 1},
    ],
    ids=str,
)
def test_other_convolutions_have_no_row(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, **options))
    assert swap(model, strict=True).rows == ()
    assert type(model[0]) is nn.Conv2d


def test_the_convolution_of_a_patch_embedding_stays_its_own() -> None:
    model = vit.PatchEmbed(32, 8, embed_dim=24)
    assert [row.original_type for row in swap(model).rows] == ["PatchEmbed"]
    assert type(model.proj) is nn.Conv2d


class NamedPatchEmbeddings(nn.Module):
    """A patch embedding of a library that has no adapter: a name, a convolution, and what it does around it."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.projection = conv(channels, 24, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images).flatten(2).transpose(1, 2)


class ReducingAttention(nn.Module):
    """An attention that shrinks its keys with a convolution, as PVT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.sr = nn.Conv2d(64, 64, 4, 4)


def test_inside_a_layer_without_an_adapter() -> None:
    model = NamedPatchEmbeddings()
    expected = model(normal(2, 3, 32, 32))
    assert [(row.name, row.action) for row in swap(model, strict=True).rows] == [("projection", "fused")]
    torch.testing.assert_close(model(normal(2, 3, 32, 32)), expected, rtol=1e-5, atol=1e-5)
    for left_alone in (NamedPatchEmbeddings(32), ReducingAttention()):
        (row,) = swap(left_alone).rows
        assert row.name == "(root)"
        assert row.reason.startswith("no fused version of tests.test_swap_patch_conv")


def test_hooks_on_the_convolution_fire() -> None:
    module = fused(conv())
    fired: list[str] = []
    module.register_forward_pre_hook(lambda *_: fired.append("pre"))
    module.register_forward_hook(lambda module, args, output: (fired.append("forward"), 2 * output)[1])
    module.register_full_backward_hook(lambda *_: fired.append("backward"))
    images = normal(2, 3, 40, 56).requires_grad_()
    output = module(images)
    output.sum().backward()
    assert fired == ["pre", "forward", "backward"]
    torch.testing.assert_close(output, 2 * conv()(images), rtol=1e-5, atol=1e-5)


def test_a_stride_changed_afterwards_runs_the_plain_forward() -> None:
    module, plain = fused(conv()), conv()
    module.stride = plain.stride = (4, 4)
    with pytest.warns(UserWarning, match=r"FusedPatchConv2d: stride \(4, 4\)"):
        assert torch.equal(module(normal(2, 3, 40, 56)), plain(normal(2, 3, 40, 56)))
    assert "runs the plain forward" in str(swap(module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(dtype: torch.dtype) -> None:
    module, images = conv(), normal(2, 3, 40, 56)
    truth = {"output": copy.deepcopy(module).double()(images.double())}
    with torch.autocast("cpu", dtype):
        check({"output": fused(module)(images)}, truth, {"output": module(images)}, "autocast")
    low = copy.deepcopy(module).to(dtype)
    check({"output": fused(low)(images.to(dtype))}, truth, {"output": low(images.to(dtype))}, str(dtype))


def test_errors_name_what_is_accepted() -> None:
    module = fused(conv())
    for images, message in ((normal(2, 4, 40, 40), "4 channels"), (normal(2, 3, 7, 40), "at least one patch")):
        with pytest.raises(RuntimeError):
            conv()(images)
        with pytest.raises(ValueError, match=message):
            module(images)


def test_unswap_deepcopy_and_weights() -> None:
    model = nn.Sequential(conv(), nn.GELU())
    images = normal(2, 3, 40, 56)
    before, expected, weights = state(model), model(images), copy.deepcopy(model.state_dict())
    swap(model, backend="reference")
    twin = copy.deepcopy(model)
    assert type(twin[0]) is FusedPatchConv2d
    assert torch.equal(twin(images), model(images))
    assert twin.load_state_dict(weights, strict=True)
    assert nn.Sequential(conv(), nn.GELU()).load_state_dict(model.state_dict(), strict=True)
    unswap(model)
    assert state(model) == before
    assert torch.equal(model(images), expected)


def test_compile_export_and_tracing() -> None:
    module = fused(conv())
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for shape in ((2, 3, 40, 56), (5, 3, 40, 56), (3, 3, 33, 25)):
            images = normal(*shape).requires_grad_()
            actual, expected = compiled(images), module(images)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            gradients = [torch.autograd.grad(grid.square().sum(), images)[0] for grid in (actual, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
        assert ops_run(lambda: compiled(images)) == {PATCHES}
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    program = torch.export.export(module, (normal(2, 3, 40, 56),), dynamic_shapes={"input": batch})
    assert "fastvit.patch_embed" in str(program.graph)
    torch.testing.assert_close(program.module()(normal(4, 3, 40, 56)), module(normal(4, 3, 40, 56)))
    traced = torch.fx.symbolic_trace(nn.Sequential(module))
    assert ops_run(lambda: traced(normal(2, 3, 40, 56))) == {PATCHES}
    torch.testing.assert_close(traced(normal(3, 40, 56)), F.conv2d(normal(3, 40, 56), module.weight, module.bias, 8))


def test_a_class_that_was_derived_after_the_swap_is_reported() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, x = nn.Sequential(nn.Conv2d(3, 8, 4, 4)), normal(2, 3, 8, 8)
    swap(model)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    expected = F.conv2d(x, model[0].weight, model[0].bias, stride=4)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    again = swap(model)
    assert again.counts == {"already fused": 1}
    assert "built with" not in again.rows[0].reason
    report = unswap(model)
    assert report.counts == {"left alone": 1}
    assert "parametrize" in report.rows[0].reason
    assert ops_run(lambda: model(x)) == {PATCHES}
    parametrize.remove_parametrizations(model[0], "weight")
    assert unswap(model).counts == {"restored": 1}
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
