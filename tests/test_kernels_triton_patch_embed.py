"""The Triton patch embedding, executed by Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvit.kernels import triton as kernels
from fastvit.kernels.triton import configs
from fastvit.testing import assert_close
from tests.test_kernels_triton import DTYPES, NAN, normal, poisoned

# See test_kernels_triton.py.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PATCH_CASES = [
    # channels, grid, patch, embed_dim, stride where the patches do not tile
    (3, (3, 5), (4, 4), 48, None),
    (3, (2, 3), (8, 8), 130, None),
    (3, (3, 2), (14, 14), 64, None),
    (3, (2, 2), (16, 16), 192, None),
    (1, (1, 2), (32, 32), 40, None),
    (3, (2, 3), (14, 16), 17, None),
    (5, (13, 11), (2, 1), 1, None),
    (3, (5, 7), (7, 7), 96, (4, 4)),
    (3, (3, 4), (16, 16), 64, (16, 8)),
    (3, (4, 5), (4, 6), 33, (7, 3)),
    (4, (4, 5), (3, 2), 40, (5, 4)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("case", PATCH_CASES, ids=lambda case: "x".join(map(str, case[2] + (case[4] or ()))))
def test_patch_embed(case: tuple, layout: str, dtype: torch.dtype) -> None:
    channels, (rows, columns), (height, width), embed_dim, stride = case
    down, right = stride or (height, width)
    # Beyond the last patch of those that do not tile there is less than another one.
    spare = 0 if stride is None else min(down, right) - 1
    lines, line = (rows - 1) * down + height + spare, (columns - 1) * right + width + spare
    images = normal(2, channels, lines, line, dtype=dtype, seed=1)
    if layout == "channels_last":
        images = images.contiguous(memory_format=torch.channels_last)
    elif layout == "slice":
        # Three of four interleaved channels, every other row: no stride follows from another.
        images = normal(2, 2 * lines, line, channels + 1, dtype=dtype, seed=1)
        images = images[:, ::2, :, :channels].permute(0, 3, 1, 2)
    weight = normal(embed_dim, channels, height, width, dtype=dtype, seed=2) * (channels * height * width) ** -0.5
    bias = normal(embed_dim, dtype=dtype, seed=3) if layout != "slice" else None
    grad_output = normal(2, rows * columns, embed_dim, dtype=dtype, seed=4)

    def by_torch(kind: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(kind).requires_grad_() for tensor in (images, weight, bias) if tensor is not None]
        convolved = F.conv2d(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, stride=(down, right))
        output = convolved.flatten(2).transpose(1, 2)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(kind))]

    # The output leaves room for prefix tokens, as a model's buffer does.
    output = torch.full((2, rows * columns + 1, embed_dim), NAN, dtype=dtype)[:, 1:]
    grads = [poisoned(images), poisoned(weight), None if bias is None else poisoned(bias)]
    kernels.patch_embed_forward(images, weight, bias, output, stride)
    kernels.patch_embed_backward_weight(grad_output, images, grads[1], grads[2], stride)
    if stride is None:
        kernels.patch_embed_backward_images(grad_output, weight, grads[0])
    actual = [output, *(grad for grad in grads if grad is not None)]
    for name, ours, exact, own in zip(
        ("output", "dX", "dW", "db"), actual, by_torch(torch.float64), by_torch(dtype), strict=False
    ):
        # Where patches overlap or leave gaps the op takes torch's gradient of the images.
        if name != "dX" or stride is None:
            assert_close(ours, exact, own, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient_is_split_and_deterministic(dtype: torch.dtype) -> None:
    """800 tokens are summed in several spans, and an expanded gradient has a stride of 0."""
    images = normal(2, 3, 80, 80, dtype=dtype, seed=1)
    grad_output = normal(32, dtype=dtype, seed=2).expand(2, 400, 32)
    assert configs.tokens_per_split(800, 1, 64) < 800
    runs = []
    for _ in range(2):
        grad_weight, grad_bias = torch.full((32, 3, 4, 4), NAN, dtype=dtype), torch.full((32,), NAN, dtype=dtype)
        kernels.patch_embed_backward_weight(grad_output, images, grad_weight, grad_bias)
        runs.append((grad_weight, grad_bias))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    results = []
    for kind in (torch.float64, dtype):
        weight = torch.zeros(32, 3, 4, 4, dtype=kind, requires_grad=True)
        output = F.conv2d(images.to(kind), weight, stride=4).flatten(2).transpose(1, 2)
        results.append(torch.autograd.grad(output, weight, grad_output.to(kind))[0])
    assert_close(runs[0][0], *results, "dW")
