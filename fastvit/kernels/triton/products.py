"""Matrix products whose float32 sums are short: what the kernels of both ops are built from.

C = A B with A [M, K], B [K, N]. Full float32 has no matrix instruction on NVIDIA: every element of C is one chain of K
fused multiply-adds, whose error grows with K, while a CPU's product sums blocks. So K is cut: each slice is summed from
0 and the slices are added, and at K = 256 in slices of 32 the error is two fifths. 16 bits, and tf32, do not see it.
"""

# ruff: noqa: N803 - Triton's constexpr parameters are constants and are written as such.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(accumulator, left, right, PRECISION: tl.constexpr):
    """Return accumulator + left right; in full float32 the product is summed by itself, then added."""
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # The compiler would turn x + dot(a, b) into a chain that begins at x; a product with a limit on inexact
        # accumulation, which only fp8 heeds, is left alone. ``aot.py`` checks that it stays so.
        accumulator += tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=left.shape[1])
    else:
        accumulator = tl.dot(left, right, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def sliced_product(
    left_base, left_start, left_stride, left_limit, right_base, right_start, right_stride, right_limit,
    DIM: tl.constexpr, SLICE: tl.constexpr, BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr,
):  # fmt: skip
    """Return Left Rightᵀ of two tiles of full float32 rows, read SLICE columns at a time.

    Without matrix instructions a thread holds whole rows and columns of both factors; of a slice they fit in registers.
    """
    dims = tl.arange(0, SLICE)[None, :]
    left_rows = left_start + tl.arange(0, BLOCK_LEFT)[:, None]
    right_rows = right_start + tl.arange(0, BLOCK_RIGHT)[:, None]
    left_base += left_rows.to(tl.int64) * left_stride + dims
    right_base += right_rows.to(tl.int64) * right_stride + dims
    left_mask, right_mask = left_rows < left_limit, right_rows < right_limit
    product = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], tl.float32)
    for first in tl.range(0, DIM, SLICE, num_stages=1):
        if DIM % SLICE == 0:
            left = tl.load(left_base + first, mask=left_mask, other=0.0)
            right = tl.load(right_base + first, mask=right_mask, other=0.0)
        else:
            inside = dims < DIM - first
            left = tl.load(left_base + first, mask=left_mask & inside, other=0.0)
            right = tl.load(right_base + first, mask=right_mask & inside, other=0.0)
        product = add_product(product, left, tl.trans(right), "ieee")
    return product
