"""The patch-embedding op through its public function: values, layouts, bad input, and torch's integration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from fastvit.testing import PatchEmbedCase, check_patch_embed, vit_patch_embed_cases

from .capabilities import run_in

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")


def conv(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_vit_shapes_hold_the_rule(hold: Callable, backend: str, dtype: torch.dtype) -> None:
    for case in vit_patch_embed_cases([dtype]):
        hold(f"patch_embed, {backend}, ViT shapes", check_patch_embed(case, backend), case)


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx"])
def test_pairs_of_bfloat16_are_not_taken_for_numbers(capability: str) -> None:
    """A weight beside a zero is a subnormal float; one beside an infinity is no number."""
    run_in(
        capability,
        "import fastvit\n"
        "torch.set_num_threads(1)\n"
        "torch.set_flush_denormal(True)\n"
        "images = torch.ones(1, 1, 16, 16, dtype=torch.bfloat16)\n"
        "for tokens in (1, 40):\n"
        "    weight = torch.ones(32, 1, 16, 16, dtype=torch.bfloat16)\n"
        "    weight[..., 1::2] = 0\n"
        "    given = images.expand(tokens, 1, 16, 16)\n"
        "    assert (fastvit.patch_embed(given, weight) == 128).all()\n"
        "    weight[3, 0, 0, 1] = torch.inf\n"
        "    result = fastvit.patch_embed(given, weight)\n"
        "    assert (result[..., 3] == torch.inf).all(), result[..., 3]\n"
        "    assert (result[..., :3] == 128).all()\n"
        "    images[..., 1::2], weight[:] = 0, 1\n"
        "    assert (fastvit.patch_embed(given, weight) == 128).all()\n"
        "    images[:] = 1\n",
    )


@pytest.mark.parametrize("patch", [(1, 1), (4, 4), (8, 8), (14, 14), (16, 16), (32, 32), (14, 16), (3, 5), (1, 7)])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_patch_sizes(hold: Callable, layout: str, patch: tuple[int, int]) -> None:
    # Odd channels make odd patches, which have no whole number of bfloat16 pairs.
    for dtype in DTYPES:
        case = PatchEmbedCase(3, 3, (5, 11), patch, 65, dtype, layout=layout, seed=patch[1])
        hold("patch_embed, cpu, patch sizes", check_patch_embed(case, "cpu"), case)


def test_channels_last_gives_the_same_bits_without_a_copy() -> None:
    images, weight, bias = torch.randn(2, 3, 32, 48), torch.randn(7, 3, 16, 16), torch.randn(7)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(fastvit.patch_embed(nhwc, weight, bias), fastvit.patch_embed(images, weight, bias))
    images.requires_grad_()
    nhwc.requires_grad_()
    grads = [torch.autograd.grad(fastvit.patch_embed(x, weight).square().sum(), x)[0] for x in (images, nhwc)]
    assert torch.equal(*grads)
    assert grads[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    images, weight = torch.randn(2, 3, 28, 28), torch.randn(5, 3, 14, 14)
    expected = fastvit.patch_embed(images, weight, backend=backend)
    cropped = torch.full((4, 3, 40, 60), torch.nan)[::2, :, 6:34, 2:58:2].copy_(images)
    assert torch.equal(fastvit.patch_embed(cropped, weight, backend=backend), expected)
    gray = torch.randn(2, 1, 28, 28).expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        fastvit.patch_embed(gray, weight, backend=backend), conv(gray, weight), rtol=1e-4, atol=1e-4
    )


def test_output_is_contiguous_tokens() -> None:
    tokens = fastvit.patch_embed(torch.randn(2, 3, 32, 48), torch.randn(7, 3, 16, 16))
    assert tokens.shape == (2, 6, 7)
    assert tokens.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_in_float64(backend: str) -> None:
    shapes = ((2, 3, 4, 6), (5, 3, 2, 3), (5,))
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: fastvit.patch_embed(*t, backend=backend), tensors)
    assert torch.autograd.gradcheck(lambda *t: fastvit.patch_embed(*t, backend=backend), tensors[:2])


def test_only_the_gradients_that_are_needed() -> None:
    images, weight = torch.randn(1, 3, 16, 16), torch.randn(4, 3, 8, 8, requires_grad=True)
    with torch.profiler.profile() as profile:
        fastvit.patch_embed(images, weight).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "fastvit::patch_embed_backward_weight" in names
    assert "fastvit::patch_embed_backward_images" not in names


# The public functions do not call a kernel for nothing; a graph or another program may.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(0, 3, 32, 32), (1, 3, 0, 32)])
def test_the_native_ops_take_no_tokens(size: tuple[int, ...], dtype: torch.dtype) -> None:
    native = torch.ops.fastvit_native
    images, weight = torch.zeros(size, dtype=dtype), torch.ones(8, 3, 16, 16, dtype=dtype)
    bias, tokens = torch.ones(8, dtype=dtype), torch.zeros(size[0], size[2] // 16 * 2, 8, dtype=dtype)
    native.patch_embed_forward(images, weight, bias, tokens, None)
    native.patch_embed_backward_images(tokens, weight, images)
    native.patch_embed_backward_weight(tokens, images, weight, bias, None)
    assert not weight.any()
    assert not bias.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_its_gradients(backend: str) -> None:
    images, weight = torch.randn(0, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 8, 8, requires_grad=True)
    tokens = fastvit.patch_embed(images, weight, backend=backend)
    assert tokens.shape == conv(images, weight).shape
    grads = torch.autograd.grad(tokens.sum(), (images, weight))
    assert grads[0].shape == images.shape
    assert (grads[1] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_reach_only_their_token(backend: str, value: float) -> None:
    images, weight = torch.randn(2, 3, 32, 32), torch.rand(9, 3, 8, 8) + 0.1
    images[1, 2, 9, 17] = value
    result, expected = fastvit.patch_embed(images, weight, backend=backend), conv(images, weight)
    assert torch.equal(result.isfinite(), expected.isfinite())
    assert torch.equal(result.isnan(), expected.isnan())


def test_repeated_runs_and_thread_counts_give_the_same_bits() -> None:
    tensors = [torch.randn(3, 3, 64, 80, requires_grad=True), torch.randn(200, 3, 16, 16, requires_grad=True)]
    grad = torch.randn(3, 20, 200)

    def run() -> list[Tensor]:
        tokens = fastvit.patch_embed(*tensors, backend="cpu")
        return [tokens.detach(), *torch.autograd.grad(tokens, tensors, grad)]

    threads, first = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_addresses_past_two_to_the_31_elements(tmp_path: Path) -> None:
    # A sparse file: of the 4.8 GB only the pages that the two images touch exist.
    stride = 2_400_000_000
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2 * (stride + 4096))
    buffer = torch.UntypedStorage.from_file(str(tmp_path / "sparse"), True, 2 * (stride + 4096))
    images = torch.empty(0, dtype=torch.bfloat16).set_(buffer, 0, (2, 3, 16, 16), (stride, 256, 16, 1))
    images.copy_(torch.randn(2, 3, 16, 16))
    weight = torch.randn(5, 3, 8, 8, dtype=torch.bfloat16)
    assert torch.equal(fastvit.patch_embed(images, weight), fastvit.patch_embed(images.contiguous(), weight))


def call(images: object = None, weight: object = None, bias: object = None, **options: object) -> Tensor:
    images = torch.zeros(2, 3, 32, 32) if images is None else images
    return fastvit.patch_embed(images, torch.zeros(7, 3, 16, 16) if weight is None else weight, bias, **options)


BAD_INPUT: list[tuple[str, Callable[[], object], type[Exception], str]] = [
    ("rank", lambda: call(torch.zeros(3, 32, 32)), ValueError, r"images: got shape \(3, 32, 32\); accepted are 4 dim"),
    ("type", lambda: call([1]), TypeError, "images: got list"),
    ("integer", lambda: call(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)), TypeError, "images: got dtype torch.uint8"),
    ("small", lambda: call(torch.zeros(2, 3, 8, 32)), ValueError, "images: got 8×32 pixels; accepted is at least"),
    ("indivisible", lambda: call(torch.zeros(2, 3, 33, 32)), ValueError, "images: got 33×32 pixels; accepted are mult"),
    ("channels", lambda: call(torch.zeros(2, 4, 32, 32)), ValueError, "images: got 4 channels"),
    ("weight rank", lambda: call(weight=torch.zeros(7, 768)), ValueError, r"weight: got shape \(7, 768\)"),
    ("weight dtype", lambda: call(weight=torch.zeros(7, 3, 16, 16).half()), TypeError, "weight: got dtype"),
    ("weight device", lambda: call(weight=torch.zeros(7, 3, 16, 16, device="meta")), ValueError, "weight: got device"),
    ("weight size", lambda: call(weight=torch.zeros(0, 3, 16, 16)), ValueError, "weight: got shape"),
    ("bias size", lambda: call(bias=torch.zeros(6)), ValueError, r"bias: got shape \(6,\); accepted is \(7,\)"),
    ("bias dtype", lambda: call(bias=torch.zeros(7).double()), TypeError, "bias: got dtype"),
    ("backend", lambda: call(backend="fast"), ValueError, "backend: got 'fast'"),
]


@pytest.mark.parametrize(("bad", "error", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT])
def test_bad_input_names_the_argument(bad: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bad()


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    images, weight = torch.randn(2, 3, 8, 12, requires_grad=True), torch.randn(5, 3, 4, 4, requires_grad=True)
    bias, grad = torch.randn(5, requires_grad=True), torch.randn(2, 6, 5)
    for op, arguments in (
        (torch.ops.fastvit.patch_embed, (images, weight, bias, backend)),
        (torch.ops.fastvit.patch_embed, (images, weight, None, None)),
        (torch.ops.fastvit.patch_embed_backward_weight, (grad, images.detach(), weight.detach(), backend)),
        (torch.ops.fastvit.patch_embed_backward_images, (grad, images.detach(), weight.detach(), backend)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic: bool) -> None:
    def stem(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fastvit.patch_embed(images * 2, weight, bias) + 1

    compiled = torch.compile(stem, fullgraph=True, dynamic=dynamic)
    weight, bias = torch.randn(5, 3, 4, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    for side in (8, 12):
        images = torch.randn(2, 3, side, 8, requires_grad=True)
        leaves = (images, weight, bias)
        torch.testing.assert_close(compiled(*leaves), stem(*leaves))
        for a, b in zip(
            *(torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (stem, compiled)), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_export_autocast_and_inference_mode() -> None:
    class Stem(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(5, 3, 4, 4))

        def forward(self, images: Tensor) -> Tensor:
            return fastvit.patch_embed(images, self.weight)

    stem, images = Stem(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(stem, (images,), dynamic_shapes=[{0: torch.export.Dim("batch")}])
    assert torch.equal(program.module()(images), stem(images))
    with torch.inference_mode():
        assert torch.equal(stem(images), stem(images))
    with torch.autocast("cpu", torch.bfloat16):
        tokens = stem(images)
    assert tokens.dtype == torch.bfloat16
    tokens.sum().backward()
    assert stem.weight.grad is not None
    assert stem.weight.grad.dtype == torch.float32


def test_wrong_pixel_order_is_seen() -> None:
    case = PatchEmbedCase()
    tensors = case.tensors()
    swapped = tensors["weight"].transpose(2, 3).contiguous()
    exact = conv(tensors["images"].double(), tensors["weight"].double())
    own = conv(tensors["images"], tensors["weight"])
    assert not fastvit.testing.compare(fastvit.patch_embed(tensors["images"], swapped), exact, own).passed
