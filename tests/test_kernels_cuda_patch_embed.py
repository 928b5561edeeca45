"""The CUDA C++ patch embedding, run by the emulator: the very sources of csrc/cuda, on the CPU.

The emulator ends a launch on races, reads of shared memory that nobody has written, accesses out of bounds and missing
barriers, so that every case here is a test of those as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import Tensor

import fastvit
from fastvit.kernels import cuda
from fastvit.kernels.spec import PatchEmbedSpec
from fastvit.ops.backends import reset_selection
from fastvit.testing import Comparison, PatchEmbedCase, check_patch_embed, compare
from tests.kernel_cases import DTYPES, EMBED_DIMS, MULTIPROCESSORS, on_device, patch_embed_case
from tests.strategies import fuzz, patch_embed_cases

try:
    emulator: Any = importlib.import_module("fastvit._emulator")
except ImportError as error:
    pytest.skip(f"{error}: built with FASTVIT_BUILD_EMULATOR=1", allow_module_level=True)

LABEL = "cuda patch_embed, emulated"
# As much as a block may have on sm_86 and sm_89.
SHARED_BYTES = 99 * 1024
ops = torch.ops.fastvit_emulated

Hold = Callable[..., None]


@pytest.fixture(autouse=True)
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTVIT_EMULATE_CUDA", "1")
    reset_selection()
    configure()
    yield
    # ldmatrix reads without bank conflicts, whatever the shape.
    assert emulator.statistics()["bank_conflicts"] == 0
    emulator.configure()
    reset_selection()


def configure(multiprocessors: int = 3, seed: int = 1) -> None:
    """Emulate a device; with 1 multiprocessor every result is made of large tiles, with many of small ones."""
    emulator.configure(multiprocessors=multiprocessors, shared_bytes=SHARED_BYTES, seed=seed)
    emulator.reset_statistics()


def normal(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def run(
    function: Callable[..., Tensor], images: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of images, weight and bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in (images, weight, bias) if tensor is not None]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def ours(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return fastvit.patch_embed(images, weight, bias, backend="cuda")


def theirs(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def compare_all(images: Tensor, weight: Tensor, bias: Tensor | None, grad_output: Tensor) -> list[Comparison]:
    given = (images, weight, bias, grad_output)
    exact = [None if tensor is None else tensor.double() for tensor in given]
    names = ("output", "grad_images", "grad_weight", "grad_bias")
    results = run(ours, *given), run(theirs, *exact), run(theirs, *given)  # type: ignore[arg-type]
    return [compare(actual, expected, own, name) for name, actual, expected, own in zip(names, *results, strict=False)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("patch", "grid"),
    [
        ((1, 1), (9, 15)),
        ((4, 4), (9, 9)),
        ((5, 3), (6, 11)),
        ((8, 8), (5, 7)),
        ((14, 14), (5, 7)),
        ((14, 16), (3, 5)),
        ((16, 16), (5, 7)),
        ((32, 32), (2, 3)),
    ],
)
def test_patch_sizes(
    patch: tuple[int, int], grid: tuple[int, int], layout: str, dtype: torch.dtype, hold: Hold
) -> None:
    case = PatchEmbedCase(patch=patch, grid=grid, layout=layout, embed_dim=72, dtype=dtype)
    hold(LABEL, check_patch_embed(case, "cuda"), case)


# Overlaps, gaps, both at once. The distance between patches limits how many elements can move at once (8, 4, 2 or 1),
# unless there is one column of patches.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("patch", "grid", "stride", "padding"),
    [
        ((7, 7), (9, 8), (4, 4), (3, 3)),
        ((16, 16), (5, 7), (16, 8), (0, 0)),
        ((16, 16), (5, 6), (7, 4), (0, 2)),
        ((8, 8), (6, 9), (9, 10), (0, 0)),
        ((8, 16), (5, 7), (8, 5), (1, 0)),
        ((4, 6), (6, 11), (7, 3), (1, 2)),
        ((16, 16), (9, 1), (4, 5), (0, 0)),
        ((1, 1), (9, 15), (2, 3), (0, 0)),
    ],
)
def test_strides(patch: tuple, grid: tuple, stride: tuple, padding: tuple, layout: str, dtype: Any, hold: Hold) -> None:
    case = PatchEmbedCase(
        patch=patch, grid=grid, layout=layout, embed_dim=72, dtype=dtype, stride=stride, padding=padding
    )
    hold(LABEL, check_patch_embed(case, "cuda"), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("embed_dim", EMBED_DIMS)
def test_embed_dims(embed_dim: int, multiprocessors: int, dtype: torch.dtype, hold: Hold) -> None:
    case = patch_embed_case(embed_dim, multiprocessors, dtype)
    assert isinstance(case.case, PatchEmbedCase)
    with on_device(emulator, case):
        hold(LABEL, check_patch_embed(case.case, "cuda"), case)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_channels(in_channels: int, layout: str, hold: Hold) -> None:
    for patch in ((7, 6), (8, 4)):
        case = PatchEmbedCase(
            in_channels=in_channels, patch=patch, grid=(5, 7), embed_dim=40, layout=layout, dtype=torch.bfloat16
        )
        hold(LABEL, check_patch_embed(case, "cuda"), case)


def test_grey_pixels_have_a_channel_stride_that_means_nothing(hold: Hold) -> None:
    """Sixteen pixels a patch leave half of a slice empty, and its addresses must be aligned all the same."""
    images = normal(2, 8, 12, 1).permute(0, 3, 1, 2)
    assert images.stride(1) == 1
    hold(LABEL, compare_all(images, normal(24, 1, 4, 4), normal(24), normal(2, 6, 24)), "grey")


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 257])
def test_partial_tiles(tokens: int, hold: Hold) -> None:
    for multiprocessors in (1, 64):
        configure(multiprocessors)
        case = PatchEmbedCase(batch=1, grid=(1, tokens), patch=(4, 8), embed_dim=136, dtype=torch.float16)
        hold(LABEL, check_patch_embed(case, "cuda"), case)


def test_large_and_small_tiles() -> None:
    images, weight = normal(2, 3, 80, 128), normal(136, 3, 16, 16)
    output = images.new_empty(2, 40, 136)
    for multiprocessors, blocks in ((1, 1 * 2), (3, 2 * 3)):
        configure(multiprocessors)
        cuda.patch_embed_forward(images, weight, None, output)
        assert emulator.statistics()["blocks"] == blocks


def views() -> dict[str, Tensor]:
    """Return images [2, 3, 32, 48] that lie in memory in ways which limit how many elements can move at once."""
    full = normal(3, 4, 40, 64)
    return {
        "sliced": full[1:, 1:, 8:, 16:],
        "two at once": full[1:, :3, 3:35, 10:58],
        "four at once": full[1:, :3, 3:35, 12:60],
        "odd offset": full[:2, :3, 1:33, 3:51],
        "odd row": normal(2, 3, 32, 49)[..., :48],
        "odd channel": normal(2 * 3 * 1600).as_strided((2, 3, 32, 48), (4800, 1537, 48, 1)),
        "odd image": normal(2, 3 * 32 * 48 + 1)[:, :-1].view(2, 3, 32, 48),
        "one image": normal(1, 3, 32, 48).expand(2, -1, -1, -1),
        "grey": normal(2, 1, 32, 48).expand(-1, 3, -1, -1),
        "mirrored": normal(2, 3, 48, 32).transpose(2, 3),
        "every other": normal(2, 3, 64, 96)[:, :, ::2, ::2],
        "channels last, sliced": normal(3, 40, 64, 5)[1:, 3:35, 7:55, 1:4].permute(0, 3, 1, 2),
    }


@pytest.mark.parametrize("patch", [(16, 16), (8, 6)])
@pytest.mark.parametrize("name", list(views()))
def test_image_views(name: str, patch: tuple[int, int], hold: Hold) -> None:
    images = views()[name]
    tokens = 32 * 48 // (patch[0] * patch[1])
    weight, bias = normal(24, 3, *patch) / 16, normal(24)
    hold(LABEL, compare_all(images, weight, bias, normal(2, tokens, 24)), name)


@pytest.mark.parametrize("name", ["sliced", "two at once", "odd offset", "mirrored", "channels last, sliced"])
def test_image_gradient_into_a_view(name: str, hold: Hold) -> None:
    target = views()[name]
    whole = target if target._base is None else target._base
    whole.fill_(7.0)
    weight, grad_output = normal(24, 3, 16, 16), normal(2, 6, 24)
    ops.patch_embed_backward_images(grad_output, weight, target)
    exact, own = (
        run(theirs, torch.zeros(2, 3, 32, 48, dtype=dtype), weight.to(dtype), None, grad_output.to(dtype))[1]
        for dtype in (torch.float64, torch.float16)
    )
    hold(LABEL, [compare(target.clone(), exact, own, "grad_images")], name)
    target.fill_(7.0)
    assert (whole == 7.0).all(), "a pixel outside of the view was written"


def test_unaligned_weight(hold: Hold) -> None:
    for offset, patch in ((1, (8, 8)), (2, (8, 8)), (4, (8, 8)), (0, (5, 3))):
        size = 24 * 3 * patch[0] * patch[1]
        weight = (normal(size + offset) / 16)[offset:].view(24, 3, *patch)
        bias = normal(25)[1:]
        images = normal(2, 3, 3 * patch[0], 4 * patch[1])
        hold(LABEL, compare_all(images, weight, bias, normal(2, 12, 24)), offset)


# What is left free, in elements: before the first token, after each token, and after each image. The first case has
# room for a prefix token; in each of the others one number alone limits how many elements can move at once.
@pytest.mark.parametrize(
    "free", [(96, 0, 96), (4, 0, 0), (2, 0, 0), (3, 0, 0), (0, 4, 0), (0, 1, 0), (0, 0, 2), (0, 0, 1)]
)
@pytest.mark.parametrize("embed_dim", [96, 7])
def test_rows_of_a_bigger_token_buffer(free: tuple[int, int, int], embed_dim: int, hold: Hold) -> None:
    images, weight, bias = normal(3, 3, 32, 40), normal(embed_dim, 3, 8, 8) / 14, normal(embed_dim)
    token_stride = embed_dim + free[1]
    batch_stride = 20 * token_stride + free[2]
    buffer = normal(free[0] + 3 * batch_stride)
    output = buffer.as_strided((3, 20, embed_dim), (batch_stride, token_stride, 1), free[0])
    before = buffer.clone()
    grad_output = output.clone()
    exact = run(theirs, images.double(), weight.double(), bias.double(), grad_output.double())
    own = run(theirs, images, weight, bias, grad_output)
    # As a gradient, before it is written over.
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    grad_images = torch.empty_like(images)
    ops.patch_embed_backward_weight(output, images, grad_weight, grad_bias)
    ops.patch_embed_backward_images(output, weight, grad_images)
    ops.patch_embed_forward(images, weight, bias, output)
    names = ("output", "grad_images", "grad_weight", "grad_bias")
    results = (output, grad_images, grad_weight, grad_bias)
    hold(LABEL, [compare(*all_three, name) for name, *all_three in zip(names, results, exact, own, strict=True)])
    output.copy_(grad_output)
    assert torch.equal(buffer, before), "an element outside of the view was written"


def test_weight_gradient_without_bias() -> None:
    images, grad_output = normal(2, 3, 24, 40), normal(2, 15, 24)
    with_bias, without = (normal(24, 3, 8, 8) for _ in range(2))
    ops.patch_embed_backward_weight(grad_output, images, with_bias, normal(24))
    ops.patch_embed_backward_weight(grad_output, images, without, None)
    assert torch.equal(with_bias, without)


@pytest.mark.parametrize(("multiprocessors", "splits"), [(1, 1), (3, 3), (4, 4), (64, 5)])
def test_splits_of_the_weight_gradient(multiprocessors: int, splits: int, hold: Hold) -> None:
    """1100 tokens are 35 slices; at eight slices each no more than 5 blocks share them, for each of two tiles."""
    configure(multiprocessors)
    case = PatchEmbedCase(batch=4, grid=(11, 25), patch=(4, 4), embed_dim=136, dtype=torch.float16)
    tensors = case.tensors()
    images, grad_output = tensors["images"], tensors["grad_output"]
    assert images is not None
    assert grad_output is not None
    grad_weight, grad_bias = normal(136, 3, 4, 4), normal(136)
    cuda.patch_embed_backward_weight(grad_output, images, grad_weight, grad_bias)
    reduce_blocks = min(-(-136 * (48 // 4 + 1) // 256), 8 * multiprocessors)
    assert emulator.statistics()["blocks"] == 2 * splits + reduce_blocks
    again, again_bias = torch.empty_like(grad_weight), torch.empty_like(grad_bias)
    configure(multiprocessors, seed=multiprocessors + 7)
    cuda.patch_embed_backward_weight(grad_output, images, again, again_bias)
    assert torch.equal(grad_weight, again)
    assert torch.equal(grad_bias, again_bias)
    hold(LABEL, check_patch_embed(case, "cuda"), case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype: torch.dtype) -> None:
    tensors = PatchEmbedCase(grid=(9, 9), patch=(14, 14), embed_dim=96, dtype=dtype).tensors()
    given = [tensors[name] for name in ("images", "weight", "bias", "grad_output")]
    results = []
    for seed in (0, 1, 2):
        configure(seed=seed)
        results.append(run(ours, *given))  # type: ignore[arg-type]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_infinities_stay_where_they_belong() -> None:
    """What pads the last slice and the last tile is zero on both sides, so that an infinity makes no NaN elsewhere."""
    images, weight, grad_output = normal(1, 3, 5, 6), normal(9, 3, 5, 3), normal(1, 2, 9)
    weight[4, 0, 0, 0] = torch.inf
    grad_output[0, 1, 4] = torch.inf
    for actual, expected in zip(
        run(ours, images, weight, None, grad_output), run(theirs, images, weight, None, grad_output), strict=True
    ):
        assert torch.equal(actual.isfinite(), expected.isfinite())


def test_positions_end_at_thirty_two_bits() -> None:
    spec = PatchEmbedSpec(2**20, 3, 16, 16, 16, 16, 192, torch.float16, torch.device("cpu"))
    assert not cuda.patch_embed_why_not(spec)
    for changed, word in (
        (spec._replace(height=2**10 * 16, width=32), "tokens"),
        (spec._replace(in_channels=2**23), "channels"),
        (spec._replace(embed_dim=2**30 + 1), "embed_dim"),
        (spec._replace(embed_dim=2**26), "tiles"),
        (spec._replace(dtype=torch.float32), "dtype"),
    ):
        assert any(word in reason for reason in cuda.patch_embed_why_not(changed)), word
    images = normal(1, 1, 1, 1).expand(2**20, 1, 1, 2**11)
    tokens = normal(1, 1, 1).expand(2**20, 2**11, 1)
    weight = normal(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="count to 2\\^30"):
        ops.patch_embed_forward(images, weight, None, tokens)
    with pytest.raises(RuntimeError, match="count to 2\\^30"):
        ops.patch_embed_backward_weight(tokens, images, weight, None)
    images = normal(1, 1, 1, 1).expand(1, 1, 1, 2**22)
    weight = torch.empty(2**24, 1, 1, 1, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="tiles"):
        ops.patch_embed_forward(images, weight, None, weight.as_strided((1, 2**22, 2**24), (0, 0, 1)))
    with pytest.raises(RuntimeError, match="at least one patch"):
        ops.patch_embed_forward(normal(0, 1, 1, 1), weight[:1], None, normal(0, 1, 1))


def test_empty_batch() -> None:
    images, weight, bias = normal(0, 3, 16, 16), normal(8, 3, 8, 8), normal(8)
    output, grad_images, grad_weight, grad_bias = run(ours, images, weight, bias, normal(0, 4, 8))
    assert output.shape == (0, 4, 8)
    assert grad_images.shape == images.shape
    assert not grad_weight.any()
    assert not grad_bias.any()


def drawn(case: PatchEmbedCase) -> PatchEmbedCase:
    """Give a drawn case a dtype that the kernels take, and a device."""
    configure(multiprocessors=1 + case.seed % 5, seed=case.seed)
    return case if case.dtype in DTYPES else replace(case, dtype=DTYPES[case.seed % 2])


@fuzz(100, shrink=False)
@given(patch_embed_cases(max_grid=4))
def test_fuzz_forward(hold: Hold, case: PatchEmbedCase) -> None:
    hold("cuda patch_embed, fuzz, forward", check_patch_embed(drawn(case), "cuda", backward=False), case)


@fuzz(100, shrink=False)
@given(patch_embed_cases(max_grid=4))
def test_fuzz_backward(hold: Hold, case: PatchEmbedCase) -> None:
    hold("cuda patch_embed, fuzz, backward", check_patch_embed(drawn(case), "cuda"), case)
