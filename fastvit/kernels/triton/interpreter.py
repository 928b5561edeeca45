"""Repairs to Triton's interpreter, which tests use in place of a GPU: its arithmetic is not that of the hardware.

The interpreter keeps bfloat16 as 16-bit integers, multiplies those integers in ``tl.dot``, and truncates where hardware
rounds to nearest even. Its float32 products add in an order that depends on the tile's shape; compiled kernels add in
the order of the reduction, so that backward recomputes the very scores whose LSE forward saved: their errors cancel.
And it patches the language anew at every call of a function, which is most of its time: a launch has patched ``tl``,
and what the standard library's functions call (``tl.core``) stays patched once it is.
In Triton 3.6 it makes a scalar of an array in a way that NumPy 2.4 refuses.
Seen in Triton 3.8. Nothing here runs, or is imported, when kernels are compiled.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _narrow(data: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    # Rounding up may carry into the exponent, which is right: the next binade begins there.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16).reshape(data.shape)


def _fused_chain(left: np.ndarray, right: np.ndarray, accumulator: np.ndarray) -> np.ndarray:
    """Return accumulator + left right, one fused multiply-add after the other along the reduction.

    A product of two float32 is exact in float64, so each step rounds once, as hardware does.
    """
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    for k in range(left.shape[1]):
        accumulator = (accumulator + wide_left[:, k, None] * wide_right[k]).astype(np.float32)
    return accumulator


_patch_once = functools.cache(interpreter._patch_lang)


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call one ``@triton.jit`` function from another."""
    _patch_once(function.fn)
    return function.rewrite()(*arguments, **options)


def repair() -> None:
    """Make the interpreter's bfloat16 casts and dot products those of the hardware; safe to call again."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bfloat16_is_repaired", False):
        return
    original_cast, original_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        scalars = source.dtype.scalar, target_type.scalar
        if scalars == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_widen(source.data), tl.float32)
        if scalars == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_narrow(source.data), tl.bfloat16)
        return original_cast(self, source, target_type)

    def create_dot(self: Any, left: Any, right: Any, accumulator: Any, precision: Any, imprecise: Any) -> Any:
        if left.dtype.scalar == tl.float32:
            return interpreter.TensorHandle(_fused_chain(left.data, right.data, accumulator.data), tl.float32)
        left, right = (
            interpreter.TensorHandle(_widen(operand.data), tl.float32)
            if operand.dtype.scalar == tl.bfloat16
            else operand
            for operand in (left, right)
        )
        return original_dot(self, left, right, accumulator, precision, imprecise)

    original_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpretedFunction.__call__ = _call
    builder.bfloat16_is_repaired = True
