"""Patches that overlap or leave gaps, and padding: values, gradients, torch's integration, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import fastvit
from fastvit.testing import PatchEmbedCase, check_patch_embed, compare

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")
WEIGHT, IMAGES = "fastvit::patch_embed_backward_weight", "fastvit::patch_embed_backward_images"
TORCHS = "aten::convolution_backward"

# patch, stride, padding: MViTv2's; half a patch; one axis alone; gaps; one axis overlaps, the other leaves gaps; single
# pixels; a stride of one; padding on both sides as wide as it may be without a patch of zeros alone.
STEPS = [
    ((7, 7), (4, 4), (3, 3)),
    ((16, 16), (8, 8), (0, 0)),
    ((14, 14), (14, 7), (0, 0)),
    ((4, 6), (7, 9), (1, 2)),
    ((5, 16), (2, 18), (2, 7)),
    ((1, 1), (2, 3), (0, 0)),
    ((3, 5), (1, 1), (1, 2)),
    ((8, 8), (8, 8), (7, 7)),
]


def conv(images: Tensor, weight: Tensor, bias: Tensor | None = None, stride: object = 2, padding: object = 0) -> Tensor:
    return F.conv2d(images, weight, bias, stride, padding).flatten(2).transpose(1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("patch", "stride", "padding"), STEPS, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps(hold: Callable, backend: str, layout: str, patch: tuple, stride: tuple, padding: tuple) -> None:
    case = PatchEmbedCase(3, 3, (5, 11), patch, 65, layout=layout, stride=stride, padding=padding)
    for dtype in DTYPES:
        hold(f"patch_embed, {backend}, strides", check_patch_embed(replace(case, dtype=dtype), backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_left_over_is_dropped(backend: str) -> None:
    images, weight = torch.randn(2, 3, 23, 30, dtype=torch.float64), torch.randn(5, 3, 7, 4, dtype=torch.float64)
    for stride, padding in ((3, 0), ((4, 7), 0), (7, 1), ((7, 4), 0), (None, 2), (None, (1, 0))):
        leaves = [images.clone().requires_grad_(), weight.clone().requires_grad_()]
        tokens = fastvit.patch_embed(*leaves, stride=stride, padding=padding, backend=backend)
        wanted = conv(*leaves, stride=(7, 4) if stride is None else stride, padding=padding)
        torch.testing.assert_close(tokens, wanted, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(wanted)
        for a, b in zip(*(torch.autograd.grad(each, leaves, upstream) for each in (tokens, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def run_backward(**options: object) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 24, generator=generator).requires_grad_()
    weight = torch.randn(5, 3, 8, 8, generator=generator).requires_grad_()
    return torch.autograd.grad(fastvit.patch_embed(images, weight, **options).square().sum(), (images, weight))


@pytest.mark.parametrize("stride", [8, (8, 8)])
def test_a_stride_of_the_patch_is_the_same_call(stride: int | tuple[int, int]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(run_backward(stride=stride), run_backward(), strict=True))


@pytest.mark.parametrize(("stride", "by_torch"), [(None, False), (8, False), (4, True), (9, True)])
def test_who_computes_the_gradient_of_the_images(stride: int | None, by_torch: bool) -> None:
    with torch.profiler.profile() as profile:
        run_backward(stride=stride, backend="cpu")
    names = {event.key for event in profile.key_averages()}
    assert {WEIGHT, IMAGES} <= names
    assert (TORCHS in names) == by_torch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_in_gaps_have_a_gradient_of_zero_in_the_images_layout(layout: torch.memory_format) -> None:
    images = torch.randn(2, 3, 17, 19).contiguous(memory_format=layout).requires_grad_()
    weight = torch.rand(4, 3, 3, 2) + 0.1
    gradient = torch.autograd.grad(fastvit.patch_embed(images, weight, stride=(5, 4)).sum(), images)[0]
    covered = torch.zeros(17, 19, dtype=torch.bool)
    for row in range(0, 15, 5):
        for column in range(0, 18, 4):
            covered[row : row + 3, column : column + 2] = True
    assert torch.equal(gradient != 0, covered.expand(2, 3, -1, -1))
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_memory(backend: str) -> None:
    images, weight = torch.randn(2, 3, 30, 28), torch.randn(5, 3, 7, 7)
    expected = fastvit.patch_embed(images, weight, stride=4, backend=backend)
    cropped = torch.full((4, 3, 40, 60), torch.nan)[::2, :, 6:36, 2:58:2].copy_(images)
    assert torch.equal(fastvit.patch_embed(cropped, weight, stride=4, backend=backend), expected)
    cropped.requires_grad_()
    gradient = torch.autograd.grad(fastvit.patch_embed(cropped, weight, stride=4, backend=backend).sum(), cropped)[0]
    plain = images.clone().requires_grad_()
    exact, own = (
        torch.autograd.grad(conv(plain.to(kind), weight.to(kind), stride=4).sum(), plain)[0].double()
        for kind in (torch.float64, torch.float32)
    )
    assert compare(gradient, exact, own.float()).passed


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_reach_only_the_patches_that_see_them(backend: str, value: float) -> None:
    for stride in (4, 11):
        images, weight = torch.randn(2, 3, 33, 34), torch.rand(9, 3, 8, 8) + 0.1
        images[1, 2, 13, 17] = value
        result = fastvit.patch_embed(images, weight, stride=stride, padding=3, backend=backend)
        expected = conv(images, weight, stride=stride, padding=3)
        assert torch.equal(result.isfinite(), expected.isfinite())
        # With the larger stride the pixel lies in a gap.
        assert result.isfinite().all() == (stride == 11)


def test_repeated_runs_and_thread_counts_give_the_same_bits() -> None:
    tensors = [torch.randn(3, 3, 64, 80, requires_grad=True), torch.randn(96, 3, 7, 7, requires_grad=True)]
    upstream = torch.randn(3, 320, 96)

    def run() -> list[Tensor]:
        tokens = fastvit.patch_embed(*tensors, stride=4, padding=3, backend="cpu")
        return [tokens.detach(), torch.autograd.grad(tokens, tensors, upstream)[1]]

    threads, first = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_its_gradients(backend: str) -> None:
    images, weight = torch.randn(0, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 8, 8, requires_grad=True)
    tokens = fastvit.patch_embed(images, weight, stride=4, padding=2, backend=backend)
    assert tokens.shape == conv(images, weight, stride=4, padding=2).shape
    grads = torch.autograd.grad(tokens.sum(), (images, weight))
    assert grads[0].shape == images.shape
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stride", "padding"), [((1, 2), (1, 0)), ((3, 4), (0, 2)), (None, 1)])
def test_gradcheck_in_float64(backend: str, stride: tuple[int, int] | None, padding: int | tuple[int, int]) -> None:
    shapes = ((2, 3, 4, 6), (5, 3, 2, 3), (5,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for given in (tensors, tensors[:2]):
        assert torch.autograd.gradcheck(
            lambda *t: fastvit.patch_embed(*t, stride=stride, padding=padding, backend=backend), given
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend: str, layout: torch.memory_format) -> None:
    images = torch.randn(2, 3, 9, 13).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    for stride, tokens in (([2, 3], 12), ([5, 6], 4)):
        upstream = torch.randn(2, tokens, 5)
        for op, arguments in (
            (torch.ops.fastvit.patch_embed, (images, weight, bias, backend, stride)),
            (torch.ops.fastvit.patch_embed, (images, weight, None, None, stride)),
            (torch.ops.fastvit.patch_embed_backward_weight, (upstream, images.detach(), weight.detach(), None, stride)),
            (torch.ops.fastvit.patch_embed_backward_images, (upstream, images.detach(), weight.detach(), None, stride)),
        ):
            torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    def stem(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        half = weight.shape[2] // 2
        return fastvit.patch_embed(images * 2, weight, bias, stride=half + 1, padding=(half, 0)) + 1

    compiled = torch.compile(stem, fullgraph=True, dynamic=dynamic)
    weight, bias = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    for side in (8, 13):
        images = torch.randn(2, 3, side, 9, requires_grad=True)
        leaves = (images, weight, bias)
        torch.testing.assert_close(compiled(*leaves), stem(*leaves))
        for a, b in zip(
            *(torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (stem, compiled)), strict=True
        ):
            torch.testing.assert_close(a, b)


class Stem(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(5, 3, 7, 7))

    def forward(self, images: Tensor) -> Tensor:
        return fastvit.patch_embed(images, self.weight, stride=4, padding=3)


def test_export_autocast_and_inference_mode() -> None:
    stem, images = Stem(), torch.randn(2, 3, 12, 18)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=8), 3: torch.export.Dim("width", min=8)}
    program = torch.export.export(stem, (images,), dynamic_shapes=[sizes])
    for given in (images, torch.randn(3, 3, 21, 16)):
        assert torch.equal(program.module()(given), stem(given))
    with torch.inference_mode():
        assert torch.equal(stem(images), stem(images))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = stem(images)
    assert tokens.dtype == torch.bfloat16
    tokens.sum().backward()
    assert stem.weight.grad is not None
    assert stem.weight.grad.dtype == torch.float32


def test_aot_inductor(tmp_path: object) -> None:
    stem, images = Stem(), torch.randn(2, 3, 12, 18)
    with torch.no_grad():
        program = torch.export.export(stem, (images,), dynamic_shapes=[{0: torch.export.Dim("batch", min=1, max=64)}])
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/stem.pt2")
        loaded = torch._inductor.aoti_load_package(package)
        for given in (images, torch.randn(5, 3, 12, 18)):
            torch.testing.assert_close(loaded(given), stem(given))


@pytest.mark.parametrize("dims", [(0, None, None), (1, None, None), (None, 0, 0), (0, 0, 0), (0, None, 0)], ids=str)
def test_vmap(dims: tuple[int | None, ...]) -> None:
    torch._C._functorch._set_vmap_fallback_enabled(False)
    stacked = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 2, 3, 9, 12), (4, 5, 3, 4, 4), (4, 5))]
    args = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(stacked, dims, strict=True)]
    weighting = torch.randn(2, 24, 5, dtype=torch.float64)

    def ours(*given: Tensor) -> Tensor:
        return fastvit.patch_embed(*given, stride=(2, 3), padding=(1, 2))

    def theirs(*given: Tensor) -> Tensor:
        return conv(*given, stride=(2, 3), padding=(1, 2))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: (function(*given) * weighting[:, : function(*given).shape[1]]).sum()

    try:
        torch.testing.assert_close(vmap(ours, dims)(*args), vmap(theirs, dims)(*args), rtol=1e-10, atol=1e-10)
        every = (0, 1, 2)
        mine, wanted = (vmap(grad(loss(function), every), dims)(*args) for function in (ours, theirs))
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


def test_flops_are_those_of_the_convolution() -> None:
    images, weight = torch.randn(2, 3, 18, 23, requires_grad=True), torch.randn(5, 3, 7, 7, requires_grad=True)
    counts = []
    for function in (fastvit.patch_embed, conv):
        with FlopCounterMode(display=False) as counter:
            tokens = function(images, weight, stride=(4, 9), padding=3)
            forward = counter.get_total_flops()
            tokens.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 * (2 * 5 * 3) * (5 * 3 * 7 * 7)


def call(side: int = 32, **options: object) -> Tensor:
    return fastvit.patch_embed(torch.zeros(2, 3, side, 32), torch.zeros(7, 3, 16, 16), **options)  # type: ignore[arg-type]


INTEGERS = "accepted are an integer of at least"
BAD_INPUT: list[tuple[dict, type[Exception], str]] = [
    ({"stride": 0}, ValueError, f"^stride: got 0; {INTEGERS} 1"),
    ({"stride": (4, -1)}, ValueError, rf"^stride: got \(4, -1\); {INTEGERS} 1"),
    ({"stride": (4,)}, ValueError, rf"^stride: got \(4,\); {INTEGERS} 1"),
    ({"stride": (4, 4, 4)}, ValueError, r"^stride: got \(4, 4, 4\)"),
    ({"stride": 4.0}, TypeError, r"^stride: got 4\.0"),
    ({"stride": "same"}, TypeError, "^stride: got 'same'"),
    ({"stride": True}, TypeError, "^stride: got True"),
    ({"padding": -1}, ValueError, f"^padding: got -1; {INTEGERS} 0"),
    ({"padding": "same"}, TypeError, "^padding: got 'same'"),
    ({"padding": None}, TypeError, "^padding: got None"),
    ({"stride": 4, "side": 15}, ValueError, "^images: got 15×32 pixels; accepted is at least one patch of 16×16"),
    ({"padding": (2, 0), "side": 11}, ValueError, "^images: got 11×32 pixels and padding 2×0; accepted is at least"),
    ({"padding": 0, "side": 33}, ValueError, "^images: got 33×32 pixels; accepted are multiples"),
    ({"padding": (0, 0), "side": 33}, ValueError, "^images: got 33×32 pixels; accepted are multiples"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_INPUT, ids=[str(row[0]) for row in BAD_INPUT])
def test_bad_input_names_the_argument(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**options)


def test_the_native_op_checks_its_stride() -> None:
    images, weight = torch.zeros(1, 3, 8, 8), torch.zeros(4, 3, 4, 4)
    for stride in ([0, 2], [2, -1]):
        with pytest.raises(RuntimeError, match="stride: accepted are two numbers of at least 1"):
            torch.ops.fastvit_native.patch_embed_forward(images, weight, None, torch.zeros(1, 9, 4), stride)
    with pytest.raises(RuntimeError, match="images: accepted is at least one patch"):
        torch.ops.fastvit_native.patch_embed_forward(images[..., :3], weight, None, torch.zeros(1, 0, 4), [2, 2])
    with pytest.raises(RuntimeError, match="tokens: its shape"):
        torch.ops.fastvit_native.patch_embed_forward(images, weight, None, torch.zeros(1, 4, 4), [2, 2])


def test_a_wrong_stride_is_seen() -> None:
    case = PatchEmbedCase(grid=(6, 6), patch=(8, 8), embed_dim=32, stride=(4, 4))
    tensors = case.tensors()
    images, weight = tensors["images"], tensors["weight"]
    assert images is not None
    assert weight is not None
    exact, own = (conv(images.to(kind), weight.to(kind), stride=4) for kind in (torch.float64, torch.float32))
    shifted = fastvit.patch_embed(images[..., 1:], weight, stride=(4, 4), padding=(0, 1))[:, : exact.shape[1]]
    assert not compare(shifted, exact, own).passed
