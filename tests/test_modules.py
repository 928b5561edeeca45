"""The drop-in modules against timm's own: constructor, keys, numbers, gradients, and when they step back."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvit.modules
from fastvit.modules import Attention, PatchEmbed
from fastvit.testing import assert_close

timm = pytest.importorskip("timm")
layers = pytest.importorskip("timm.layers")

OPS = ("fastvit::attention", "fastvit::attention_qkvpacked", "fastvit::patch_embed")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ops_run(function: Any) -> set[str]:
    """Return which of our forward ops the profiler sees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()} & set(OPS)


def sharpened(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give random weights that make peaked attention, so that a wrong scale or head order shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 2.0 if name.startswith("qkv.w") else 1.0
            spread *= parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            base = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(base + spread * torch.randn(parameter.shape, generator=generator))
    return module


def check_against(ours: nn.Module, theirs: nn.Module, x: Tensor, **call: Any) -> None:
    """Apply the tolerance rule to the output and to every gradient, with ``theirs`` in float64 as the truth."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    exact = copy.deepcopy(theirs).double()
    mask = call.get("attn_mask")
    exact_call = {**call, "attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else call
    with torch.no_grad():
        grad = normal(*theirs(x, **call).shape, seed=9)
    mine, own, truth = (
        forward_backward(ours, x, grad, call),
        forward_backward(theirs, x, grad, call),
        forward_backward(exact, x.double(), grad.double(), exact_call),
    )
    for name, expected in truth.items():
        assert_close(mine[name], expected, own[name], name)


def forward_backward(module: nn.Module, x: Tensor, grad: Tensor, call: dict[str, Any]) -> dict[str, Tensor]:
    """Return the output and the gradients of the input and of every parameter."""
    leaf = x.detach().requires_grad_()
    output = module(leaf, **call)
    leaves = {"x": leaf, **dict(module.named_parameters())}
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


ATTENTION_OPTIONS = [
    {"dim": 96, "num_heads": 3},
    {"dim": 96, "num_heads": 4, "qkv_bias": True, "proj_bias": False},
    {"dim": 64, "num_heads": 2, "attn_head_dim": 40, "dim_out": 48, "qkv_bias": True},
    {"dim": 96, "num_heads": 3, "qk_norm": True, "norm_layer": nn.LayerNorm},
    {"dim": 96, "num_heads": 3, "scale_norm": True, "gated": True, "norm_layer": nn.LayerNorm, "qkv_bias": True},
    {"dim": 96, "num_heads": 3, "qk_norm": True, "scale_norm": True, "norm_layer": layers.RmsNorm},
]


@pytest.mark.parametrize("options", ATTENTION_OPTIONS, ids=lambda options: "-".join(options))
def test_attention_is_timms(options: dict) -> None:
    theirs = sharpened(layers.Attention(**options)).eval()
    ours = Attention(**options).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    check_against(ours, theirs, normal(2, 50, options["dim"]))
    expected = "fastvit::attention" if options.get("qk_norm") else "fastvit::attention_qkvpacked"
    assert ops_run(lambda: ours(normal(2, 50, options["dim"]))) == {expected}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("mask", ["bool", "additive", "causal", "heads"])
def test_attention_masks_are_timms(mask: str, qk_norm: bool) -> None:
    options = {"dim": 96, "num_heads": 3, "qkv_bias": True, "qk_norm": qk_norm, "norm_layer": nn.LayerNorm}
    theirs = sharpened(layers.Attention(**options)).eval()
    bias = normal(2, 3, 37, 37, seed=4)
    call = {
        "bool": {"attn_mask": bias[:, :1] > -0.5},
        "additive": {"attn_mask": bias[0, 0]},
        "causal": {"is_causal": True},
        "heads": {"attn_mask": 3 * bias},
    }[mask]
    check_against(Attention(**options).eval(), theirs, normal(2, 37, 96), **call)


def test_constructors_take_what_timms_take() -> None:
    for ours, theirs in ((Attention, layers.Attention), (PatchEmbed, layers.PatchEmbed)):
        mine, own = (inspect.signature(kind.__init__).parameters for kind in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values()][:-1] == [(p.name, p.default) for p in own.values()]
        assert list(mine)[-1] == "backend"
        assert mine["backend"].kind is inspect.Parameter.KEYWORD_ONLY
    ours, theirs = Attention(48, 3, 24, attn_drop=0.2), layers.Attention(48, 3, 24, attn_drop=0.2)
    for name in ("num_heads", "head_dim", "attn_dim", "scale", "fused_attn"):
        assert getattr(ours, name) == getattr(theirs, name), name
    made = Attention(8, 2, device="meta", dtype=torch.bfloat16)
    assert made.qkv.weight.is_meta
    assert made.qkv.weight.dtype == torch.bfloat16


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"^num_heads: got 7"):
        Attention(96, 7)
    with pytest.raises(ValueError, match=r"^norm_layer: got None"):
        Attention(96, 3, qk_norm=True)
    with pytest.raises(ValueError, match=r"^backend: got 'fast'"):
        Attention(96, 3, backend="fast")
    with pytest.raises(ValueError, match=r"^backend: got 'fast'"):
        PatchEmbed(backend="fast")
    with pytest.raises(ValueError, match=r"^output_fmt: got 'CHW'"):
        PatchEmbed(output_fmt="CHW")
    with pytest.raises(ValueError, match=r"^patch_size: got"):
        PatchEmbed(patch_size=(4, 4, 4))


def test_backend_argument_is_obeyed() -> None:
    layer, embed = Attention(32, 2, backend="cuda"), PatchEmbed(32, 8, embed_dim=16, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend 'cuda'"):
        layer(normal(1, 5, 32))
    with pytest.raises(RuntimeError, match=r"backend 'cuda'"):
        embed(normal(1, 3, 32, 32))
    assert Attention(32, 2, backend="reference")(normal(1, 5, 32)).shape == (1, 5, 32)
    assert "backend=cuda" in repr(layer)
    assert "backend=automatic" in repr(PatchEmbed())


def test_dropout_in_training_is_torchs_and_says_so_once() -> None:
    options = {"dim": 48, "num_heads": 3, "attn_drop": 0.5}
    theirs, ours = sharpened(layers.Attention(**options)), Attention(**options)
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, 20, 48)
    torch.manual_seed(3)
    expected = theirs(x)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match=r"attention dropout \(p=0.5\) has no kernel yet"):
        actual = ours(x)
    assert torch.equal(actual, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)
    assert "attn_drop p=0.5 runs the plain forward in training" in repr(ours)
    assert ops_run(lambda: ours(x)) == set()
    ours.eval()
    assert ops_run(lambda: ours(x)) == {"fastvit::attention_qkvpacked"}


@pytest.mark.filterwarnings("ignore:.*plain forward")
def test_hooks_on_attn_drop_get_the_matrix() -> None:
    ours = sharpened(Attention(48, 3)).eval()
    x, seen = normal(2, 20, 48), []
    expected = ours(x)
    handle = ours.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(ours(x), expected)
    assert seen[0].shape == (2, 3, 20, 20)
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 3, 20))
    handle.remove()
    assert ops_run(lambda: ours(x)) == {"fastvit::attention_qkvpacked"}


@pytest.mark.filterwarnings("ignore:.*plain forward")
def test_what_has_no_kernel_runs_plain() -> None:
    theirs = sharpened(layers.Attention(48, 3)).eval()
    ours = Attention(48, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    x, bias = normal(2, 20, 48), normal(20, 20).requires_grad_()
    grads = [torch.autograd.grad(module(x, attn_mask=bias).square().sum(), bias)[0] for module in (ours, theirs)]
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0
    with pytest.raises(RuntimeError):
        theirs(x, attn_mask=bias, is_causal=True)
    with pytest.raises(RuntimeError):
        ours(x, attn_mask=bias, is_causal=True)
    wide = Attention(600, 2).eval()
    assert ops_run(lambda: wide(normal(1, 4, 600))) == set()


def test_unfused_modules_keep_their_scale() -> None:
    theirs = sharpened(layers.Attention(48, 3)).eval()
    ours = Attention(48, 3).eval()
    ours.load_state_dict(theirs.state_dict())
    for module in (ours, theirs):
        module.fused_attn, module.scale = False, 0.5
    x = normal(2, 20, 48)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ops_run(lambda: ours(x)) == {"fastvit::attention_qkvpacked"}


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast(qk_norm: bool) -> None:
    options = {"dim": 96, "num_heads": 3, "qk_norm": qk_norm, "norm_layer": nn.LayerNorm}
    theirs = sharpened(layers.Attention(**options)).eval()
    ours = Attention(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, 50, 96)
    with torch.autocast("cpu", torch.bfloat16):
        actual, own = ours(x), theirs(x)
    assert actual.dtype == own.dtype == torch.bfloat16
    assert_close(actual, theirs.double()(x.double()), own)


def test_norms_in_float32_under_autocast_mix_dtypes() -> None:
    class Float32Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    options = {"dim": 96, "num_heads": 3, "qk_norm": True, "norm_layer": Float32Norm}
    theirs = sharpened(layers.Attention(**options)).eval()
    ours = Attention(**options).eval()
    ours.load_state_dict(theirs.state_dict())
    x = normal(2, 50, 96)
    with torch.autocast("cpu", torch.bfloat16):
        actual, own = ours(x), theirs(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, own, rtol=0.02, atol=0.02)


PATCH_OPTIONS = [
    {"img_size": 32, "patch_size": 8},
    {"img_size": (24, 40), "patch_size": (4, 8), "in_chans": 1, "bias": False},
    {"img_size": 32, "patch_size": 8, "norm_layer": nn.LayerNorm},
    {"img_size": 32, "patch_size": 8, "flatten": False},
    {"img_size": 32, "patch_size": 8, "output_fmt": "NHWC", "norm_layer": nn.LayerNorm},
    {"img_size": 32, "patch_size": 8, "output_fmt": "NLC"},
    {"img_size": 32, "patch_size": 8, "output_fmt": "NCL"},
    {"img_size": 32, "patch_size": 8, "output_fmt": "NCHW"},
    {"img_size": 35, "patch_size": 8},
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", PATCH_OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_patch_embed_is_timms(options: dict, channels_last: bool) -> None:
    theirs = sharpened(layers.PatchEmbed(**options, embed_dim=24))
    ours = PatchEmbed(**options, embed_dim=24)
    images = normal(2, options.get("in_chans", 3), *ours.img_size)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    check_against(ours, theirs, images)
    output, own = ours(images), theirs(images)
    if options.get("output_fmt") in ("NCHW", "NCL") or options.get("flatten") is False:
        assert output.stride() == own.stride()
    assert ops_run(lambda: ours(images)) == {"fastvit::patch_embed"}
    for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt", "strict_img_size"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"strict_img_size": True}, [(32, 32), (40, 32), (32, 33)]),
        ({"strict_img_size": False}, [(40, 24), (36, 32), (32, 36)]),
        ({"dynamic_img_pad": True, "strict_img_size": False}, [(33, 47), (31, 8), (32, 32)]),
        ({"img_size": None}, [(32, 47), (39, 8)]),
        ({"img_size": None, "dynamic_img_pad": True, "output_fmt": "NHWC"}, [(32, 47), (3, 8)]),
    ],
)
def test_patch_embed_accepts_the_sizes_that_timms_accepts(options: dict, sizes: list[tuple[int, int]]) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, **options}
    theirs, ours = sharpened(layers.PatchEmbed(**options)), PatchEmbed(**options)
    ours.load_state_dict(theirs.state_dict())
    for size in sizes:
        images = normal(1, 3, *size)
        assert ours.dynamic_feat_size(size) == theirs.dynamic_feat_size(size)
        try:
            expected = theirs(images)
        except AssertionError:
            with pytest.raises(AssertionError, match=r"^images: got (height|width) \d+; accepted"):
                ours(images)
            continue
        torch.testing.assert_close(ours(images), expected)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_set_input_size_does_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    expected, module = PatchEmbed(32, 8, embed_dim=24), PatchEmbed(32, 8, embed_dim=24)
    module.load_state_dict(expected.state_dict())
    expected.set_input_size(patch_size=4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        module.set_input_size(patch_size=4)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(module.proj.weight, expected.proj.weight)


def test_set_input_size_is_timms() -> None:
    theirs, ours = sharpened(layers.PatchEmbed(32, 8, embed_dim=24)), PatchEmbed(32, 8, embed_dim=24)
    ours.load_state_dict(theirs.state_dict())
    ours.proj.weight.requires_grad_(False)
    for change in ({"img_size": 48}, {"patch_size": 4}, {"img_size": (36, 72), "patch_size": (6, 12)}):
        for module in (ours, theirs):
            module.set_input_size(**change)
        for name in ("img_size", "patch_size", "grid_size", "num_patches"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.feat_ratio() == theirs.feat_ratio()
        assert ours.feat_ratio(False) == theirs.feat_ratio(False)
        torch.testing.assert_close(ours.proj.weight.data, theirs.proj.weight.data, rtol=1e-4, atol=1e-5)
        assert not ours.proj.weight.requires_grad
        assert ours.proj.bias.requires_grad
        images = normal(1, 3, *ours.img_size)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def _stride_two(proj: nn.Conv2d) -> None:
    proj.stride = (4, 4)


@pytest.mark.filterwarnings("ignore:.*plain forward")
@pytest.mark.parametrize("output_fmt", [None, "NHWC", "NCL", "NLC"])
def test_a_changed_proj_is_called(output_fmt: str | None) -> None:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "output_fmt": output_fmt}
    images = normal(2, 3, 32, 32)

    def double(proj: nn.Conv2d) -> None:
        proj.register_forward_hook(lambda module, args, output: 2 * output)

    def shift(proj: nn.Conv2d) -> None:
        proj.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def replace(proj: nn.Conv2d) -> None:
        proj.forward = lambda x: torch.nn.functional.conv2d(x, proj.weight, stride=8)

    for change in (double, shift, replace, _stride_two):
        theirs, ours = sharpened(layers.PatchEmbed(**options)), PatchEmbed(**options)
        ours.load_state_dict(theirs.state_dict())
        unchanged = ours(images)
        change(theirs.proj)
        change(ours.proj)
        expected = theirs(images)
        assert expected.shape != unchanged.shape or (expected - unchanged).abs().max() > 0.1
        assert torch.equal(ours(images), expected), change.__name__
        assert "runs the plain forward" in repr(ours)


def test_parametrized_weights_are_read_through() -> None:
    ours = sharpened(PatchEmbed(32, 8, embed_dim=24))
    images = normal(1, 3, 32, 32)

    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    bias = ours.proj.bias.detach()
    before = ours(images) - bias
    torch.nn.utils.parametrize.register_parametrization(ours.proj, "weight", Negated())
    torch.testing.assert_close(ours(images) - bias, -before)
    assert ops_run(lambda: ours(images)) == {"fastvit::patch_embed"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_dinov2"])
def test_timm_builds_with_our_modules(name: str) -> None:
    options = {"depth": 2, "img_size": 112}
    stock = timm.create_model(name, **options).eval()
    ours = timm.create_model(
        name, attn_layer=fastvit.modules.Attention, embed_layer=fastvit.modules.PatchEmbed, **options
    ).eval()
    assert ours.load_state_dict(stock.state_dict(), strict=True).missing_keys == []
    images = normal(1, 3, 112, 112)
    with torch.no_grad():
        assert ops_run(lambda: ours(images)) == {"fastvit::attention_qkvpacked", "fastvit::patch_embed"}
        own = stock(images)
        assert_close(ours(images), stock.double()(images.double()), own, "logits")


def test_dynamic_image_sizes_in_timm() -> None:
    options = {"depth": 1, "img_size": 64, "dynamic_img_size": True, "dynamic_img_pad": True}
    stock = timm.create_model("vit_tiny_patch16_224", **options).eval()
    ours = timm.create_model("vit_tiny_patch16_224", attn_layer=Attention, embed_layer=PatchEmbed, **options).eval()
    ours.load_state_dict(stock.state_dict(), strict=True)
    for height, width in itertools.product((64, 70), (48, 64)):
        images = normal(1, 3, height, width)
        torch.testing.assert_close(ours(images), stock(images), rtol=1e-4, atol=1e-5)


def test_a_projection_need_not_be_a_child() -> None:
    shared = nn.Linear(24, 72)

    class Sharing(fastvit.modules.Attention):
        qkv = property(lambda _: shared)  # type: ignore[assignment]

    plain = fastvit.modules.Attention(24, 3)
    ours = Sharing(24, 3)
    del ours._modules["qkv"]
    plain.qkv = shared
    ours.proj = plain.proj
    x = torch.randn(2, 5, 24)
    assert torch.equal(ours(x), plain(x))
