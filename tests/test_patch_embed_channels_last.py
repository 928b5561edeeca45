"""Images and weights in channels_last: the same tokens and gradients, read in place where that is possible."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from fastvit.kernels import native
from fastvit.ops.channels_last import as_one_channel, reads_as_one_channel, weight_as_one_channel
from fastvit.testing import compare

BACKENDS = ("cpu", "reference")
LAST = torch.channels_last
# patch, stride, embed_dim: both sides of the number of patches (30), from which on a weight is copied.
CASES = [((4, 4), None, 16), ((4, 4), None, 48), ((3, 5), None, 48), ((7, 7), (4, 4), 16), ((2, 3), (3, 4), 48)]


def tensors(patch: tuple[int, int], stride: tuple[int, int] | None, dim: int, channels: int = 3) -> list[Tensor]:
    down, right = stride or patch
    height, width = 4 * down + patch[0], 5 * right + patch[1]
    weight = torch.randn(dim, channels, *patch) * (channels * patch[0] * patch[1]) ** -0.5
    return [torch.randn(2, channels, height, width), weight, torch.randn(dim)]


def gradients(function: Callable[..., Tensor], images: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (images, weight, bias)]
    output = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", ["images", "weight", "both"])
@pytest.mark.parametrize(("patch", "stride", "dim"), CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rule_and_the_layouts(
    backend: str, patch: tuple, stride: tuple | None, dim: int, last: str, dtype: torch.dtype
) -> None:
    images, weight, bias = (tensor.to(dtype) for tensor in tensors(patch, stride, dim))
    images = images if last == "weight" else images.contiguous(memory_format=LAST)
    weight = weight if last == "images" else weight.contiguous(memory_format=LAST)

    def conv(*three: Tensor) -> Tensor:
        return F.conv2d(*three, stride=stride or patch).flatten(2).transpose(1, 2)

    def unfold(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(F.unfold(images, patch, stride=stride or patch).transpose(1, 2), weight.flatten(1), bias)

    ours = gradients(lambda *three: fastvit.patch_embed(*three, stride=stride, backend=backend), images, weight, bias)
    truth = gradients(conv, images.double(), weight.double(), bias.double())
    own = [gradients(each, images, weight, bias) for each in (conv, unfold)]
    for index, name in enumerate(("output", "images", "weight", "bias")):
        result = compare(ours[index], truth[index], [each[index] for each in own], name)
        assert result.passed, result
    assert ours[1].stride() == images.stride()
    assert ours[2].stride() == weight.stride()


def test_what_lies_in_channels_last_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def forward(images: Tensor, weight: Tensor, *rest: object) -> None:
        seen.update(images=images.data_ptr(), weight=weight.data_ptr(), shape=tuple(images.shape))
        plain(images, weight, *rest)

    plain = native.patch_embed_forward
    monkeypatch.setattr(native, "patch_embed_forward", forward)
    images, weight, bias = tensors((4, 4), None, 48)
    images, weight = images.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    fastvit.patch_embed(images, weight, bias, backend="cpu")
    assert seen == {"images": images.data_ptr(), "weight": weight.data_ptr(), "shape": (2, 1, 20, 24 * 3)}


def test_when_a_weight_is_copied() -> None:
    images, weight, _ = tensors((4, 4), None, 48)
    last = images.contiguous(memory_format=LAST)
    assert reads_as_one_channel(last, weight.contiguous(memory_format=LAST), 30)
    assert not reads_as_one_channel(last, weight, 47)
    assert reads_as_one_channel(last, weight, 48)
    assert not reads_as_one_channel(images, weight, 48)
    # One channel, and one column of pixels, lie in both orders; every second column in neither.
    assert not reads_as_one_channel(last[:, :1], weight[:, :1], 48)
    assert not reads_as_one_channel(last[:, :, :, :1], weight, 48)
    assert not reads_as_one_channel(last[:, :, :, ::2], weight, 48)
    # A crop of an image still has its pixels side by side.
    crop = last[:, :, 4:12, 4:16]
    assert reads_as_one_channel(crop, weight, 48)
    assert as_one_channel(crop).data_ptr() == crop.data_ptr()
    torch.testing.assert_close(
        F.conv2d(as_one_channel(crop), weight_as_one_channel(weight), stride=(4, 12)), F.conv2d(crop, weight, stride=4)
    )


def test_an_image_has_the_same_bits_in_any_batch() -> None:
    for dim in (16, 48):
        images, weight, bias = tensors((4, 4), None, dim)
        images = images.contiguous(memory_format=LAST)
        together = fastvit.patch_embed(images, weight, bias)
        assert all(torch.equal(fastvit.patch_embed(images[i : i + 1], weight, bias)[0], together[i]) for i in range(2))


@pytest.mark.parametrize("stride", [None, (2, 3)])
@pytest.mark.parametrize("dim", [16, 48])
def test_opcheck_and_compile(dim: int, stride: tuple | None) -> None:
    images, weight, bias = tensors((4, 4), stride, dim)
    images, weight = images.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    grad = torch.randn(2, 30, dim)
    for op, arguments in (
        (torch.ops.fastvit.patch_embed, (images, weight, bias, None, stride)),
        (torch.ops.fastvit.patch_embed_backward_weight, (grad, images, weight, None, stride)),
        (torch.ops.fastvit.patch_embed_backward_images, (grad, images, weight, None, stride)),
    ):
        torch.library.opcheck(op.default, arguments)
    eager = gradients(lambda *three: fastvit.patch_embed(*three, stride=stride), images, weight, bias)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *three: fastvit.patch_embed(*three, stride=stride), fullgraph=True, backend="aot_eager"
    )
    for mine, theirs in zip(gradients(compiled, images, weight, bias), eager, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()


def test_an_empty_batch() -> None:
    images = torch.randn(0, 3, 8, 8).contiguous(memory_format=LAST)
    weight = torch.randn(5, 3, 4, 4).contiguous(memory_format=LAST)
    output, *grads = gradients(fastvit.patch_embed, images, weight, torch.randn(5))
    assert output.shape == (0, 4, 5)
    assert grads[0].shape == images.shape
    assert (grads[1] == 0).all()
    assert grads[1].stride() == weight.stride()


def test_a_parameter_in_channels_last_trains_in_its_layout() -> None:
    module = torch.nn.Conv2d(3, 48, 4, 4).to(memory_format=LAST)
    images = torch.randn(2, 3, 20, 24).contiguous(memory_format=LAST)
    fastvit.patch_embed(images, module.weight, module.bias).square().sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.is_contiguous(memory_format=LAST)
