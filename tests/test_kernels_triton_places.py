"""Where the Triton kernels read and write: addresses past 2³¹ elements, grids past 65,535 heads, blocks at the end."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastvit.kernels import triton as kernels
from fastvit.kernels.triton import configs
from tests.test_kernels_triton import NAN, arguments_for, kernel_results, normal, poisoned

# See test_kernels_triton.py.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def lazy_buffer(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages exist only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


@pytest.fixture
def no_copy_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the interpreter from copying each storage onto itself after a launch: that would touch every page."""
    executor = sys.modules["triton.runtime.interpreter"].GridExecutor
    monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)


@pytest.mark.usefixtures("no_copy_back")
@pytest.mark.parametrize(
    "strides",
    [(2**31 + 64, 1024, 16, 1), (64, 2**31 + 128, 16, 1), (4096, 2048, 2**30 + 16, 1)],
    ids=["batch", "head", "row"],
)
def test_attention_past_two_billion_elements(strides: tuple[int, ...]) -> None:
    shape = (2, 2, 3, 16)
    elements = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    arguments = arguments_for(3, 3, 16, 16, torch.float16)
    far = {}
    for name in ("query", "key", "value", "grad_output"):
        far[name] = lazy_buffer(elements, torch.float16).as_strided(shape, strides)
        far[name].copy_(arguments[name])
    outputs = [lazy_buffer(elements, torch.float16).as_strided(shape, strides).fill_(NAN) for _ in range(4)]
    lse = torch.full((2, 2, 3), NAN)
    options = {"is_causal": False, "scale": 0.25}
    inputs = [far[name] for name in ("query", "key", "value")]
    kernels.attention_forward(*inputs, None, outputs[0], lse, **options)
    kernels.attention_backward(
        far["grad_output"], arguments["grad_lse"], *inputs, None, outputs[0], lse, *outputs[1:], **options
    )
    near = kernel_results(arguments)
    for actual, expected in zip((outputs[0], lse, *outputs[1:]), near, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("no_copy_back")
@pytest.mark.parametrize("strides", [(2**31 + 64, 64, 8, 1), (192, 2**30 + 32, 8, 1)], ids=["batch", "channel"])
def test_patch_embed_past_two_billion_elements(strides: tuple[int, ...]) -> None:
    shape = (2, 3, 8, 8)
    elements = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    near = normal(*shape, dtype=torch.float16, seed=1)
    far = lazy_buffer(elements, torch.float16).as_strided(shape, strides)
    far.copy_(near)
    weight = normal(24, 3, 4, 4, dtype=torch.float16, seed=2)
    grad_output = normal(2, 4, 24, dtype=torch.float16, seed=3)
    results = []
    for images in (near, far):
        output, grad_weight = torch.full((2, 4, 24), NAN, dtype=torch.float16), poisoned(weight)
        kernels.patch_embed_forward(images, weight, None, output)
        kernels.patch_embed_backward_weight(grad_output, images, grad_weight, None)
        grad_images = lazy_buffer(elements, torch.float16).as_strided(shape, strides).fill_(NAN)
        kernels.patch_embed_backward_images(grad_output, weight, grad_images if images is far else images)
        results.append((output, grad_weight, grad_images if images is far else images))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_grid_is_one_dimensional_past_65535_heads() -> None:
    assert configs.grid(70_000, 49, 64) == (70_000,)
    assert configs.grid(70_000, 197, 128) == (140_000,)
    with pytest.raises(ValueError, match="programs"):
        configs.grid(2**31, 1, 64)


def test_programs_past_65535_heads_find_their_head() -> None:
    """Only the last programs of a launch with 70,000 heads run: the interpreter would need an hour for all."""
    from fastvit.kernels.triton import attention_fwd

    executor = sys.modules["triton.runtime.interpreter"].GridExecutor
    heads, first = 70_000, 69_997
    query = normal(1, heads, 1, 16, seed=1)
    output, lse = poisoned(query), torch.full((1, heads, 1), NAN)
    original: Callable = executor.__call__

    def last_programs(self: object, *arguments: object, **options: object) -> None:
        builder = sys.modules["triton.runtime.interpreter"].interpreter_builder
        set_index = builder.set_grid_idx
        self.grid = (self.grid[0] - first,)
        builder.set_grid_idx = lambda x, y, z: set_index(x + first, y, z)
        try:
            builder.set_grid_dim, set_dim = (lambda *_: set_dim(heads, 1, 1)), builder.set_grid_dim
            original(self, *arguments, **options)
        finally:
            builder.set_grid_idx, builder.set_grid_dim = set_index, set_dim

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", last_programs)
        attention_fwd.attention_forward(query, query, query, None, output, lse, is_causal=False, scale=0.25)
    assert torch.equal(output[:, first:], query[:, first:])
    assert output[:, :first].isnan().all()


@pytest.mark.parametrize(("seqlen", "tail"), [(64, 16), (65, 16), (197, 16), (90, 32), (49, 64), (127, 64)])
def test_tail_blocks_fit_what_is_left(seqlen: int, tail: int) -> None:
    assert configs.tail_block(seqlen, 64) == tail
