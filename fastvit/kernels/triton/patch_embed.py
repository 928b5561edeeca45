"""Patch embedding as an implicit matrix product: pixels are gathered by address, no im2col buffer exists.

With X [B·N, K] the flattened patches, W [D, K] the weight and K = C·Ph·Pw:
    Y = X Wᵀ + b;  dW = dYᵀ X;  dX = dY W, scattered back to the pixels (of patches that tile the image, each once).
The order of K follows the memory of the images, so that neighbours in K are neighbours in memory: a patch is OUTER
slabs of ROWS rows of RUN elements, (C, Ph, Pw) for NCHW and (1, Ph, Pw·C) for channels_last, and the kernels know no
other difference. A patch begins DOWN rows and ALONG elements from its neighbours: ROWS and RUN where the patches tile
the image, less where they overlap, more where there are gaps. Source: Dosovitskiy et al. 2021, equation 1.
"""

# ruff: noqa: N803, N806 - Triton's constexpr parameters are constants and are written as such.
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvit.kernels.spec import PatchEmbedSpec, patch_grid
from fastvit.kernels.triton import configs
from fastvit.kernels.triton.products import add_product


@triton.jit
def patch_offsets(tokens, image_strides, grid_height, grid_width, DOWN: tl.constexpr, ALONG: tl.constexpr):
    """Return where the patches of ``tokens`` (64-bit) begin, DOWN rows and ALONG elements of a run from one another.

    image_strides are those of (batch, outer, row, run).
    """
    column = tokens % grid_width
    row = tokens // grid_width % grid_height
    batch = tokens // grid_width // grid_height
    return batch * image_strides[0] + row * DOWN * image_strides[2] + column * ALONG * image_strides[3]


@triton.jit
def pixel_offsets(k, image_strides, ROWS: tl.constexpr, RUN: tl.constexpr):
    """Return where element ``k`` of a patch lies, from the beginning of the patch."""
    outer = (k // (ROWS * RUN)).to(tl.int64) * image_strides[1]
    row = (k // RUN % ROWS).to(tl.int64) * image_strides[2]
    return outer + row + (k % RUN).to(tl.int64) * image_strides[3]


@triton.jit
def token_offsets(tokens, strides, grid_height, grid_width):
    """Return where the rows of ``tokens`` begin in a tensor [B, N, D] with these strides of (batch, token)."""
    patches = grid_height * grid_width
    return tokens // patches * strides[0] + tokens % patches * strides[1]


@triton.jit(do_not_specialize=["num_tokens", "grid_height", "grid_width"])
def forward_kernel(
    image_ptr, weight_ptr, bias_ptr, output_ptr, image_strides, output_strides, num_tokens, grid_height, grid_width,
    EMBED_DIM: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, DOWN: tl.constexpr,
    ALONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens times BLOCK_N outputs. Programs that share pixels are neighbours, for the L2."""
    PATCH: tl.constexpr = OUTER * ROWS * RUN
    num_blocks_n: tl.constexpr = (EMBED_DIM + BLOCK_N - 1) // BLOCK_N
    tokens = (tl.program_id(0) // num_blocks_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.program_id(0) % num_blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Past the end the last token and the last output are read again, so that the loop needs no mask; nothing is stored.
    patches = patch_offsets(tl.minimum(tokens, num_tokens - 1), image_strides, grid_height, grid_width, DOWN, ALONG)
    weight_rows = tl.minimum(dims, EMBED_DIM - 1).to(tl.int64) * PATCH
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for start in tl.range(0, PATCH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        image_pointers = image_ptr + (patches[:, None] + pixel_offsets(k, image_strides, ROWS, RUN)[None, :])
        weight_pointers = weight_ptr + (weight_rows[:, None] + k[None, :])
        if PATCH % BLOCK_K == 0:
            pixels = tl.load(image_pointers)
            weight = tl.load(weight_pointers)
        else:
            pixels = tl.load(image_pointers, mask=(k < PATCH)[None, :], other=0.0)
            weight = tl.load(weight_pointers, mask=(k < PATCH)[None, :], other=0.0)
        accumulator = add_product(accumulator, pixels, tl.trans(weight), PRECISION)

    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + dims, mask=dims < EMBED_DIM, other=0.0).to(tl.float32)[None, :]
    rows = token_offsets(tokens, output_strides, grid_height, grid_width)
    mask = (tokens < num_tokens)[:, None] & (dims < EMBED_DIM)[None, :]
    tl.store(output_ptr + (rows[:, None] + dims[None, :]), accumulator.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split", "grid_height", "grid_width"])
def backward_weight_kernel(
    grad_output_ptr, image_ptr, partial_ptr, grad_output_strides, image_strides, num_tokens, tokens_per_split,
    grid_height, grid_width,
    EMBED_DIM: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, DOWN: tl.constexpr,
    ALONG: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N by BLOCK_K of dW over one span of tokens; the spans are added up by a second pass."""
    PATCH: tl.constexpr = OUTER * ROWS * RUN
    num_blocks_n: tl.constexpr = (EMBED_DIM + BLOCK_N - 1) // BLOCK_N
    num_blocks_k: tl.constexpr = (PATCH + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0) % (num_blocks_n * num_blocks_k)
    split = (tl.program_id(0) // (num_blocks_n * num_blocks_k)).to(tl.int64)
    dims = block // num_blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block % num_blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)

    pixels_in_patch = pixel_offsets(tl.minimum(k, PATCH - 1), image_strides, ROWS, RUN)
    first_token = split * tokens_per_split
    end = tl.minimum(first_token + tokens_per_split, num_tokens)
    accumulator = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)

    for start in tl.range(0, tokens_per_split, BLOCK_M):
        tokens = first_token + start + tl.arange(0, BLOCK_M)
        # Both operands are masked: 0 times a NaN read past the end would be NaN.
        inside = (tokens < end)[:, None]
        patches = patch_offsets(tokens, image_strides, grid_height, grid_width, DOWN, ALONG)
        pixels = tl.load(image_ptr + (patches[:, None] + pixels_in_patch[None, :]), mask=inside, other=0.0)
        rows = token_offsets(tokens, grad_output_strides, grid_height, grid_width)
        grad_pointers = grad_output_ptr + (rows[:, None] + dims[None, :])
        grad_output = tl.load(grad_pointers, mask=inside & (dims < EMBED_DIM)[None, :], other=0.0)
        accumulator = add_product(accumulator, tl.trans(grad_output), pixels, PRECISION)

    pointers = partial_ptr + ((split * EMBED_DIM + dims)[:, None] * PATCH + k[None, :])
    tl.store(pointers, accumulator, mask=(dims < EMBED_DIM)[:, None] & (k < PATCH)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "grid_height", "grid_width"])
def backward_images_kernel(
    grad_output_ptr, weight_ptr, grad_image_ptr, grad_output_strides, image_strides, num_tokens, grid_height,
    grid_width,
    EMBED_DIM: tl.constexpr, OUTER: tl.constexpr, ROWS: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K pixels of BLOCK_M patches, reduced over the outputs BLOCK_N at a time."""
    PATCH: tl.constexpr = OUTER * ROWS * RUN
    num_blocks_k: tl.constexpr = (PATCH + BLOCK_K - 1) // BLOCK_K
    tokens = (tl.program_id(0) // num_blocks_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % num_blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)

    rows = token_offsets(tl.minimum(tokens, num_tokens - 1), grad_output_strides, grid_height, grid_width)
    columns = tl.minimum(k, PATCH - 1)
    accumulator = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)

    for start in tl.range(0, EMBED_DIM, BLOCK_N):
        dims = start + tl.arange(0, BLOCK_N)
        grad_pointers = grad_output_ptr + (rows[:, None] + dims[None, :])
        weight_pointers = weight_ptr + (dims.to(tl.int64)[:, None] * PATCH + columns[None, :])
        if EMBED_DIM % BLOCK_N == 0:
            grad_output = tl.load(grad_pointers)
            weight = tl.load(weight_pointers)
        else:
            grad_output = tl.load(grad_pointers, mask=(dims < EMBED_DIM)[None, :], other=0.0)
            weight = tl.load(weight_pointers, mask=(dims < EMBED_DIM)[:, None], other=0.0)
        accumulator = add_product(accumulator, grad_output, weight, PRECISION)

    patches = patch_offsets(tokens, image_strides, grid_height, grid_width, ROWS, RUN)
    pointers = grad_image_ptr + (patches[:, None] + pixel_offsets(k, image_strides, ROWS, RUN)[None, :])
    mask = (tokens < num_tokens)[:, None] & (k < PATCH)[None, :]
    tl.store(pointers, accumulator.to(grad_image_ptr.dtype.element_ty), mask=mask)


def why_not(spec: PatchEmbedSpec) -> list[str]:
    """Return the reasons why these kernels cannot run ``spec``; empty means that they can."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    return configs.device_why_not(spec.device, spec.dtype, interpreted=interpreted)


class PatchLayout(NamedTuple):
    """A patch as OUTER slabs of ROWS rows of RUN elements, and the image's strides of (batch, outer, row, run).

    ``down`` and ``along`` are the rows and the elements of a run from one patch to the next.
    """

    outer: int
    rows: int
    run: int
    down: int
    along: int
    strides: tuple[int, int, int, int]
    channels_last: bool

    @classmethod
    def of(cls, images: Tensor, weight: Tensor, stride: Sequence[int] | None = None) -> PatchLayout:
        """Return the layout in which neighbours of a run are neighbours in memory, where the strides allow it."""
        channels = images.shape[1]
        rows, columns = weight.shape[2:]
        down, right = weight.shape[2:] if stride is None else stride
        batch, channel, row, column = images.stride()
        if channels > 1 and channel == 1 and column == channels:
            return cls(1, rows, columns * channels, down, right * channels, (batch, 0, row, 1), True)
        return cls(channels, rows, columns, down, right, (batch, channel, row, column), False)

    @property
    def is_aligned(self) -> bool:
        """Whether every 16 elements of a run lie together, from an address divisible by 16: loads are vectors then."""
        return self.strides[3] == 1 and all(step % 16 == 0 for step in (self.run, self.along, *self.strides[:3]))

    def pack_weight(self, weight: Tensor) -> Tensor:
        """Return the weight [D, C, Ph, Pw] in the order of K: itself, or a copy of its few megabytes."""
        return weight.permute(0, 2, 3, 1).contiguous() if self.channels_last else weight.contiguous()

    def unpack_weight(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Return a view [D, C, Ph, Pw] of a weight [D, K] in the order of K."""
        embed_dim, channels, patch_height, patch_width = shape
        if self.channels_last:
            return packed.view(embed_dim, patch_height, patch_width, channels).permute(0, 3, 1, 2)
        return packed.view(shape)


def _config(kernel: str, layout: PatchLayout, weight: Tensor) -> configs.Config:
    family = configs.device_family(weight.device)
    config = configs.patch_embed_config(kernel, weight.element_size(), layout.is_aligned, family)
    return config.fitted(n=weight.shape[0], k=weight[0].numel())


def patch_embed_forward(
    images: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, stride: Sequence[int] | None = None
) -> None:
    """Write the tokens [B, N, D] of ``images`` [B, C, H, W] under ``weight`` [D, C, Ph, Pw] to ``output``.

    float32, float16 or bfloat16, accumulated in float32. Images and output have any strides (output's last one is 1);
    NCHW and channels_last are read in place. ``stride``: pixels from one patch to the next, (down, right); None is the
    patch.
    """
    embed_dim = weight.shape[0]
    layout = PatchLayout.of(images, weight, stride)
    grid_height, grid_width = patch_grid(images.shape[2:], weight.shape[2:], stride)
    num_tokens = images.shape[0] * grid_height * grid_width
    config = _config("patch_embed_forward", layout, weight)
    with torch.cuda.device_of(images):
        forward_kernel[configs.grid(-(-embed_dim // config.block_n), num_tokens, config.block_m)](
            images, layout.pack_weight(weight), bias, output, layout.strides, output.stride()[:2],
            num_tokens, grid_height, grid_width, embed_dim, layout.outer, layout.rows, layout.run, layout.down,
            layout.along, config.block_m, config.block_n, config.block_k, bias is not None,
            configs.dot_precision(images),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip


def patch_embed_backward_weight(
    grad_output: Tensor,
    images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: Sequence[int] | None = None,
) -> None:
    """Write the gradients of the weight [D, C, Ph, Pw] and, unless it is None, of the bias [D].

    The tokens are cut into spans, each span is summed in order, and the spans are summed in order: deterministic.
    """
    embed_dim = grad_weight.shape[0]
    layout = PatchLayout.of(images, grad_weight, stride)
    grid_height, grid_width = patch_grid(images.shape[2:], grad_weight.shape[2:], stride)
    num_tokens, patch = images.shape[0] * grid_height * grid_width, grad_weight[0].numel()
    config = _config("patch_embed_backward_weight", layout, grad_weight)
    tiles = -(-embed_dim // config.block_n) * -(-patch // config.block_k)
    tokens_per_split = configs.tokens_per_split(num_tokens, tiles, config.block_m)
    splits = -(-num_tokens // tokens_per_split)
    partial = torch.empty(splits, embed_dim, patch, dtype=torch.float32, device=images.device)
    with torch.cuda.device_of(images):
        backward_weight_kernel[configs.grid(splits, tiles, 1)](
            grad_output, images, partial, grad_output.stride()[:2], layout.strides, num_tokens, tokens_per_split,
            grid_height, grid_width, embed_dim, layout.outer, layout.rows, layout.run, layout.down, layout.along,
            config.block_m, config.block_n, config.block_k, configs.dot_precision(images),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    grad_weight.copy_(layout.unpack_weight(partial.sum(dim=0), grad_weight.shape))
    if grad_bias is not None:
        grad_bias.copy_(grad_output.sum(dim=(0, 1), dtype=torch.float32))


def patch_embed_backward_images(grad_output: Tensor, weight: Tensor, grad_images: Tensor) -> None:
    """Write the gradient of the images [B, C, H, W], any strides, which the patches tile."""
    embed_dim = weight.shape[0]
    layout = PatchLayout.of(grad_images, weight)
    grid_height, grid_width = patch_grid(grad_images.shape[2:], weight.shape[2:])
    num_tokens, patch = grad_images.shape[0] * grid_height * grid_width, weight[0].numel()
    config = _config("patch_embed_backward_images", layout, weight)
    with torch.cuda.device_of(weight):
        backward_images_kernel[configs.grid(-(-patch // config.block_k), num_tokens, config.block_m)](
            grad_output, layout.pack_weight(weight), grad_images, grad_output.stride()[:2], layout.strides,
            num_tokens, grid_height, grid_width, embed_dim, layout.outer, layout.rows, layout.run,
            config.block_m, config.block_n, config.block_k, configs.dot_precision(weight),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
