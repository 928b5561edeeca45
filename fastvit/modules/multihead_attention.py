"""torch.nn.MultiheadAttention around the fused op: every call form, and torch's own forward where the op cannot."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec
from fastvit.modules.fused import FusedForward, has_hooks, own_obstacles
from fastvit.ops import attention, attention_qkvpacked
from fastvit.ops.checks import is_bias_dtype

PARTS = frozenset(
    {
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
        "out_proj",
        "bias_k",
        "bias_v",
    }
)


class Weights(NamedTuple):
    """The Parameters in front of the attention: packed or separate projections, and the rows appended to key, value."""

    in_proj: Tensor | None
    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


class Layout(NamedTuple):
    """What shapes the call beside its tensors."""

    num_heads: int
    batch_first: bool
    add_zero_attn: bool
    backend: str | None


# One leaf for symbolic traces, because a trace knows no shapes, and nn.MultiheadAttention itself is a leaf there.
@torch.fx.wrap
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Weights,
    layout: Layout,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Return the heads' outputs side by side, in the layout of ``query``: what ``out_proj`` reads."""
    weights, layout = Weights(*weights), Layout(*layout)
    if query.is_nested:
        return _attend_nested(query, weights, layout)
    if query.dim() == 2:
        batched = _with_batch(query, key, value)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        layout = layout._replace(batch_first=True)
        return _attend(*batched, weights, layout, key_padding_mask, attn_mask, is_causal)[0]
    batch = query.shape[0 if layout.batch_first else 1]
    added = int(weights.bias_k is not None) + int(layout.add_zero_attn)
    bias, is_causal = score_bias(key_padding_mask, attn_mask, is_causal, batch, layout.num_heads, added)
    if query is key is value and weights.in_proj is not None and not added:
        qkv = _split(F.linear(query, weights.in_proj, weights.bias), 3, layout)  # [B, N, 3, H, D]
        heads = attention_qkvpacked(qkv, bias=bias, is_causal=is_causal, backend=layout.backend)
    else:
        q, k, v = _project(query, key, value, weights, layout)  # each [B, N, H, D]
        if weights.bias_k is not None and weights.bias_v is not None:
            k, v = _append(k, weights.bias_k), _append(v, weights.bias_v)
        if layout.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        heads = attention(q, k, v, bias=bias, is_causal=is_causal, backend=layout.backend).transpose(1, 2)
    return (heads if layout.batch_first else heads.transpose(0, 1)).flatten(2)


def _with_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each with a batch of one; what was one tensor stays one, because that saves projections."""
    batched_query = query[None]
    batched_key = batched_query if key is query else key[None]
    return batched_query, batched_key, batched_key if value is key else value[None]


def _split(projected: Tensor, parts: int, layout: Layout) -> Tensor:
    """Return [B, N, parts, H, D], a view of a projection [B, N, parts · E] or, sequence first, [N, B, parts · E]."""
    split = projected.unflatten(-1, (parts, layout.num_heads, projected.shape[-1] // (parts * layout.num_heads)))
    return split if layout.batch_first else split.transpose(0, 1)


def _project(
    query: Tensor, key: Tensor, value: Tensor, weights: Weights, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value as [B, N, H, D], with as few matrix products as their identities allow."""
    if weights.in_proj is None:
        each = cast(tuple[Tensor, Tensor, Tensor], (weights.query, weights.key, weights.value))
    elif query is key is value:
        q, k, v = _split(F.linear(query, weights.in_proj, weights.bias), 3, layout).unbind(2)
        return q, k, v
    elif key is value:
        width = query.shape[-1]
        of_query, of_both = weights.in_proj.split((width, 2 * width))
        bias, bias_of_both = (None, None) if weights.bias is None else weights.bias.split((width, 2 * width))
        q = _split(F.linear(query, of_query, bias), 1, layout).squeeze(2)
        k, v = _split(F.linear(key, of_both, bias_of_both), 2, layout).unbind(2)
        return q, k, v
    else:
        each = cast(tuple[Tensor, Tensor, Tensor], weights.in_proj.chunk(3))
    biases = (None, None, None) if weights.bias is None else weights.bias.chunk(3)
    q, k, v = (
        _split(F.linear(tensor, weight, bias), 1, layout).squeeze(2)
        for tensor, weight, bias in zip((query, key, value), each, biases, strict=True)
    )
    return q, k, v


def _append(tensor: Tensor, row: Tensor) -> Tensor:
    batch, _, heads, head_dim = tensor.shape
    return torch.cat([tensor, row.to(tensor.dtype).view(1, 1, heads, head_dim).expand(batch, -1, -1, -1)], 1)


def score_bias(
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    batch: int,
    num_heads: int,
    added: int,
) -> tuple[Tensor | None, bool]:
    """Return nn.MultiheadAttention's masks as one bias of the op, as small as broadcasting allows, and ``is_causal``.

    Args:
        key_padding_mask: [B, S], attn_mask: [L, S] or [B·H, L, S]; bool (True = blocked) or added to the scores.
        is_causal: ``attn_mask`` is the causal mask; it is not read then.
        batch, num_heads: B and H. added: keys appended after S, which no mask blocks.

    Returns:
        A bias that broadcasts to [B, H, L, S + added]: bool (True = take part) if both masks are, else additive.
    """
    if is_causal and (key_padding_mask is None or not added):
        # torch counts appended keys as keys of the future where the hint is all it reads, and so does the op.
        attn_mask = None
    else:
        is_causal = False
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (batch, num_heads)) if attn_mask.dim() == 3 else attn_mask[None, None])
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if added:
        masks = [F.pad(mask, (0, added)) for mask in masks]
    if len(masks) == 2:
        masks = [_merge(*masks)]
    if not masks:
        return None, is_causal
    return (~masks[0] if masks[0].dtype == torch.bool else masks[0]), is_causal


def _merge(first: Tensor, second: Tensor) -> Tensor:
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first | second
    if first.dtype == torch.bool:
        return torch.where(first, -torch.inf, second)
    if second.dtype == torch.bool:
        return torch.where(second, -torch.inf, first)
    return first + second


def _attend_nested(query: Tensor, weights: Weights, layout: Layout) -> Tensor:
    """Attend within each sequence of a nested tensor, which nn.TransformerEncoder makes of padded ones."""
    projected = F.linear(query, cast(Tensor, weights.in_proj), weights.bias)
    lengths = query._nested_tensor_size()[:, 0].to(query.device)
    padded = projected.to_padded_tensor(0.0)  # [B, longest, 3 · E]
    there = torch.arange(padded.shape[1], device=query.device) < lengths[:, None]
    heads = attention_qkvpacked(_split(padded, 3, layout), bias=there[:, None, None], backend=layout.backend)
    return torch._nested_tensor_from_mask(heads.flatten(2), there, mask_check=False)


class FusedMultiheadAttention(FusedForward, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention after a swap: the same Parameters, arguments and results.

    The input projection runs once for self-attention, and once for key and value where they are one tensor; the op
    reads its parts in place. As in torch, ``out_proj``'s weights are read and the child itself is never called.

    A query whose keys are all blocked attends to nothing and gives ``out_proj``'s bias, as torch's does while training
    or recording gradients (its inference path answers NaN to bool masks).
    """

    fastvit_kind = "attention"

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = own_obstacles(module, PARTS)
        if (head_dim := cast(int, getattr(module, "head_dim", 0))) > MAX_HEAD_DIM:
            obstacles.append(f"head_dim {head_dim}: at most {MAX_HEAD_DIM}")
        return obstacles

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, torch's own forward would run."""
        # Its callers decide: torchvision asks for no weights, and transformers' pooling heads no longer once swapped.
        fallbacks = ["need_weights=True, the default of a call, runs the plain forward"]
        if dropout := cast(float, module.dropout):
            fallbacks.append(f"dropout p={dropout:g} runs the plain forward in training")
        if has_hooks(cast(nn.Module, module.out_proj)):
            fallbacks.append("torch never calls out_proj, so the hook on it stays silent")
        return fallbacks

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        """Return a self-attention of 14×14 patches and a class token."""
        heads, head_dim = cast(int, module.num_heads), cast(int, module.head_dim)
        return AttentionSpec(1, heads, 197, 197, head_dim, head_dim, dtype, None, False, device)

    def _why_plain(self, need_weights: bool, *masks: Tensor | None) -> str | None:
        if need_weights:
            return "need_weights=True asks for the attention matrix"
        if self.dropout > 0 and self.training:
            return f"attention dropout (p={self.dropout:g}) has no kernel yet"
        if torch.is_grad_enabled() and any(isinstance(mask, Tensor) and mask.requires_grad for mask in masks):
            return "a mask requires grad, which has no kernel yet"
        return None

    def _fits(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Return whether this is a call that torch documents; any other one is torch's to refuse, in its words."""
        if not isinstance(query, Tensor):
            return True  # a symbolic trace
        if is_causal and attn_mask is None:
            return False
        if query.is_nested or key.is_nested or value.is_nested:
            return self._fits_nested(query, key, value, key_padding_mask, attn_mask)
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            return False
        is_batched = query.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (is_batched and query.shape[batch_dim] != key.shape[batch_dim]):
            return False
        batch, sequence_dim = (query.shape[batch_dim], 1 - batch_dim) if is_batched else (1, 0)
        seqlen_q, seqlen_k = query.shape[sequence_dim], key.shape[sequence_dim]
        padding_shape = (batch, seqlen_k) if is_batched else (seqlen_k,)
        mask_shapes = ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k))
        return _is_mask(key_padding_mask, (padding_shape,), query) and _is_mask(attn_mask, mask_shapes, query)

    def _fits_nested(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor | None) -> bool:
        is_self = query is key and key is value and self.in_proj_weight is not None
        is_plain = self.bias_k is None and not self.add_zero_attn and all(mask is None for mask in masks)
        records = torch.is_grad_enabled() and (query.requires_grad or any(p.requires_grad for p in self.parameters()))
        return (
            is_self and is_plain and self.batch_first and not records and not self.training and query.dim() == 3
        ) and query.layout == torch.strided

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended tokens, and the attention weights if they are asked for.

        Args:
            query: [B, L, E] with batch_first, else [L, B, E]; or [L, E].
            key, value: likewise with S tokens of kdim and vdim channels.
            key_padding_mask: [B, S] (or [S]), attn_mask: [L, S] or [B·H, L, S]; bool, True = BLOCKED, or additive.
            need_weights: torch's own forward computes them, with a warning.
            average_attn_weights: of the weights, over the heads.
            is_causal: a promise that ``attn_mask`` is the causal mask, which is then not read.

        Returns:
            The tokens in the layout of ``query``, contiguous, and the weights or None.

        Raises:
            What torch raises for arguments that do not fit together.
        """
        rest: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if not self._fits(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(query, key, value, **rest)
        if reason := self._why_plain(need_weights, key_padding_mask, attn_mask):
            self._warn_fallback(reason)
            return super().forward(query, key, value, **rest)
        projections = (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = Weights(*projections, self.in_proj_bias, self.bias_k, self.bias_v)
        layout = Layout(self.num_heads, self.batch_first, self.add_zero_attn, self._fastvit_backend)
        heads = _attend(query, key, value, weights, layout, key_padding_mask, attn_mask, is_causal)
        return F.linear(heads, self.out_proj.weight, self.out_proj.bias), None


def _is_mask(mask: Tensor | None, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> bool:
    if mask is None:
        return True
    return tuple(mask.shape) in shapes and is_bias_dtype(mask, query)
