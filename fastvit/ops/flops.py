"""How many operations the ops do, for ``torch.utils.flop_counter``.

Counted as torch counts its own attention and convolution: two per multiply-add of the matrix products, softmax, scale,
bias, masks and the skipped half of a causal call left out. Source: torch.utils.flop_counter (sdpa_flop_count and
sdpa_backward_flop_count); Dao 2023 (FlashAttention-2), section 4.1, for backward = 2.5 × forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from fastvit.kernels.spec import patch_grid

Shape = tuple[int, ...]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_: Any, __: Any, query: Shape, key: Shape, value: Shape, *___: Any, **____: Any) -> int:
    # S = QKᵀ again, dQ = dS K, dK = dSᵀ Q over the head dim; dP = dO Vᵀ, dV = Pᵀ dO over the value's head dim.
    return 2 * prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def _unpacked(qkv: Shape) -> Shape:
    batch, seqlen, _, heads, head_dim = qkv
    return batch, heads, seqlen, head_dim


def _attention_qkvpacked(qkv: Shape, *_: Any, **__: Any) -> int:
    return _attention(*[_unpacked(qkv)] * 3)


def _attention_qkvpacked_backward(grad_output: Any, grad_lse: Any, qkv: Shape, *_: Any, **__: Any) -> int:
    return _attention_backward(grad_output, grad_lse, *[_unpacked(qkv)] * 3)


def _patch_embed(
    images: Shape, weight: Shape, bias: Any, backend: Any, stride: Sequence[int] | None = None, **_: Any
) -> int:
    return 2 * images[0] * prod(patch_grid(images[2:], weight[2:], stride)) * prod(weight)


def _patch_embed_backward(
    _: Any, images: Shape, weight: Shape, backend: Any, stride: Sequence[int] | None = None, **__: Any
) -> int:
    return _patch_embed(images, weight, None, backend, stride)


def register_flops() -> None:
    """Tell torch's counter of each op and its backward."""
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.fastvit
    for op, formula in (
        (ops.attention, _attention),
        (ops.attention_backward, _attention_backward),
        (ops.attention_qkvpacked, _attention_qkvpacked),
        (ops.attention_qkvpacked_backward, _attention_qkvpacked_backward),
        (ops.patch_embed, _patch_embed),
        (ops.patch_embed_backward_weight, _patch_embed_backward),
        (ops.patch_embed_backward_images, _patch_embed_backward),
    ):
        register_flop_formula(op)(formula)  # type: ignore[arg-type]
