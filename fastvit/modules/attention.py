"""Multi-head self-attention with timm's constructor, parameters and keys, around the fused op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvit.kernels.spec import MAX_HEAD_DIM, AttentionSpec
from fastvit.modules.fused import FusedForward, has_global_hooks, has_hooks, has_own_forward, hook_on, own_obstacles
from fastvit.ops import attention, attention_qkvpacked
from fastvit.ops.backends import check_backend_name

CHILDREN = frozenset({"qkv", "q_norm", "k_norm", "attn_drop", "softmax", "norm", "gate", "proj", "proj_drop"})

# In a symbolic trace each is one node. Only calls by this module's own names for them are: hence the methods below.
torch.fx.wrap("attention")
torch.fx.wrap("attention_qkvpacked")


class FusedAttentionForward(FusedForward):
    """The fused forward of a self-attention module, for any class with ``qkv``, ``proj`` and ``num_heads``.

    ``qkv`` writes query, key and value in this order, each as num_heads × head_dim; ``head_dim`` is a third of its
    width over ``num_heads`` unless the class says otherwise, and ``scale`` 1/√head_dim. Optional children are used
    where they exist: q_norm, k_norm, attn_drop, softmax, norm, gate, proj_drop. Without q_norm and k_norm the op reads
    query, key and value where ``qkv`` wrote them and writes what ``proj`` reads.

    For a class of that shape ``class Fused(FusedAttentionForward, Plain): pass`` is a whole adapter, to be handed to
    :func:`fastvit.register_swap`; an instance with further parameters, buffers or children is left alone.

    Where the op does not compute what the plain forward does (dropout of attention weights, a hook that reads the
    attention matrix, a mask that requires grad, …) the plain class's own forward runs, with one warning.
    """

    fastvit_kind = "attention"
    fastvit_parts: ClassVar[frozenset[str]] = CHILDREN
    fastvit_needs: ClassVar[tuple[str, ...]] = ("qkv", "proj", "num_heads")
    num_heads: int
    head_dim: int
    scale: float
    qkv: Any
    proj: Any
    q_norm: Any
    k_norm: Any

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` cannot take this forward at all; empty means that it can."""
        obstacles = own_obstacles(module, cls.fastvit_parts)
        if missing := [name for name in cls.fastvit_needs if not hasattr(module, name)]:
            obstacles.append(f"it lacks {', '.join(missing)}")
        elif (head_dim := cls.fastvit_head_dim(module)) > MAX_HEAD_DIM:
            obstacles.append(f"head_dim {head_dim}: at most {MAX_HEAD_DIM}")
        return obstacles

    @classmethod
    def fastvit_head_dim(cls, module: nn.Module) -> int:
        """Return the width of one head: the module's own word for it, or a third of ``qkv`` over the heads."""
        if (given := getattr(module, "head_dim", None)) is not None:
            return cast(int, given)
        return cast(nn.Linear, module.qkv).out_features // (3 * cast(int, module.num_heads))

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return in which situations, as the module stands now, the plain forward would run."""
        drop = getattr(module, "attn_drop", None)
        fallbacks = []
        if isinstance(drop, nn.Dropout) and drop.p > 0:
            fallbacks.append(f"attn_drop p={drop.p:g} runs the plain forward in training")
        return fallbacks + [f"{reason}: runs the plain forward" for reason in _matrix_readers(module)]

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> AttentionSpec:
        """Return a self-attention of 14×14 patches and a class token."""
        heads, head_dim = cast(int, module.num_heads), cls.fastvit_head_dim(module)
        return AttentionSpec(1, heads, 197, 197, head_dim, head_dim, dtype, None, False, device)

    def _why_plain(self, attn_mask: Tensor | None, is_causal: bool) -> str | None:
        drop = getattr(self, "attn_drop", None)
        # timm's fused path asks the module itself, its written-out path the dropout child (Monte Carlo dropout).
        asked = self if getattr(self, "fused_attn", False) else drop
        if isinstance(drop, nn.Dropout) and drop.p > 0 and asked is not None and asked.training:
            return f"attention dropout (p={drop.p:g}) has no kernel yet"
        if readers := _matrix_readers(self):
            return readers[0]
        if (head_dim := self.fastvit_head_dim(self)) > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
        # Both may be proxies of a symbolic trace, which have no truth value.
        if attn_mask is not None and is_causal is True:
            return "attn_mask and is_causal are both given"
        if isinstance(attn_mask, Tensor) and attn_mask.requires_grad and torch.is_grad_enabled():
            return "attn_mask requires grad, which has no kernel yet"
        return None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attended tokens.

        Args:
            x: [B, N, dim], the dtype of the weights or, under autocast, any floating dtype.
            attn_mask: None, or broadcasts to [B, H, N, N]: bool (True = take part) or additive.
            is_causal: token i sees tokens j <= i.

        Returns:
            [B, N, dim_out].
        """
        if attn_mask is None and is_causal is False and self._has_only_projections():
            return cast(Tensor, self.proj(self._attend_packed(self._packed(x)).flatten(2)))
        if reason := self._why_plain(attn_mask, is_causal):
            self._warn_fallback(reason)
            unmasked = attn_mask is None and is_causal is False
            return super().forward(x) if unmasked else super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        gate = self._gate(x)
        return self._finish(self._attend_projected(self._packed(x), attn_mask, is_causal), gate)

    def _has_only_projections(self) -> bool:
        """Return whether the forward is qkv, attention and proj, and nobody listens to anything between them.

        So it is in most models, and between GEMMs that empty the caches each line of Python counts: one image through
        ViT-Ti takes 1 % less time for it.
        """
        for name, child in self._modules.items():
            if name == "qkv" or name == "proj" or child is None:
                continue
            kind = type(child)
            if (
                (kind is not nn.Identity and (kind is not nn.Dropout or child.p))
                or has_hooks(child)
                or has_own_forward(child)
            ):
                return False
        return self.fastvit_head_dim(self) <= MAX_HEAD_DIM and not has_global_hooks()

    def _packed(self, x: Tensor) -> Tensor:
        """Return query, key and value of the tokens, [B, N, 3, H, D]."""
        batch, seqlen, _ = x.shape
        return cast(Tensor, self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, self.fastvit_head_dim(self)))

    def _gate(self, x: Tensor) -> Tensor | None:
        gate = getattr(self, "gate", None)
        return None if gate is None else cast(Tensor, gate(x).sigmoid())

    def _softmax_scale(self) -> float | None:
        # torch's attention always takes 1/sqrt(head_dim), and so does timm's while fused_attn is on.
        return None if getattr(self, "fused_attn", False) else getattr(self, "scale", None)

    def _attend_projected(self, qkv: Tensor, bias: Tensor | None, is_causal: bool) -> Tensor:
        """Return the heads [B, N, H, D] of a packed projection [B, N, 3, H, D], normalised per head where asked."""
        q_norm, k_norm = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
        if is_no_op(q_norm) and is_no_op(k_norm):
            return self._attend_packed(qkv, bias, is_causal)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        return self._attend(self.q_norm(query), self.k_norm(key), value, bias, is_causal)

    def _attend_packed(self, qkv: Tensor, bias: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the heads [B, N, H, D] of a packed projection [B, N, 3, H, D]."""
        scale, backend = self._softmax_scale(), self._fastvit_backend
        return cast(Tensor, attention_qkvpacked(qkv, bias=bias, is_causal=is_causal, scale=scale, backend=backend))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the heads [B, Nq, H, D] of query, key and value [B, H, N, D]."""
        scale, backend = self._softmax_scale(), self._fastvit_backend
        heads = attention(query, key, value, bias=bias, is_causal=is_causal, scale=scale, backend=backend)
        return cast(Tensor, heads).transpose(1, 2)

    def _finish(self, heads: Tensor, gate: Tensor | None = None) -> Tensor:
        """Return what the output projection makes of the heads [B, N, H, D]."""
        x = heads.flatten(2)
        norm = getattr(self, "norm", None)
        x = x if norm is None else norm(x)
        x = x if gate is None else x * gate
        x = self.proj(x)
        proj_drop = getattr(self, "proj_drop", None)
        return x if proj_drop is None else proj_drop(x)


def _matrix_readers(module: nn.Module) -> list[str]:
    readers = []
    for name, plain_types in (("attn_drop", (nn.Dropout, nn.Identity)), ("softmax", (nn.Softmax,))):
        child = module._modules.get(name)
        if child is None:
            continue
        if type(child) not in plain_types or has_own_forward(child):
            readers.append(f"{name} is a {type(child).__name__} of its own making")
        elif has_hooks(child):
            readers.append(f"a hook on {name} wants the attention matrix")
        # A hook on every module was not meant for this one: it misses what the plain forward would call, no more.
        elif has_global_hooks() and not (name == "attn_drop" and getattr(module, "fused_attn", False)):
            readers.append(f"a global hook fires on {name} only if it is called")
    return readers


def is_no_op(norm: nn.Module | None) -> bool:
    """Return whether a normalisation is absent, or an Identity that nobody listens to."""
    return norm is None or (type(norm) is nn.Identity and hook_on(norm) is None)


class _PlainAttention(nn.Module):
    """The forward of timm.layers.Attention in torch alone, which the fused one steps back to."""

    num_heads: int
    head_dim: int
    attn_dim: int
    scale: float
    fused_attn: bool
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    gate: Any
    proj: Any
    proj_drop: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attended tokens by torch's attention, written out if a hook or ``fused_attn`` asks for it."""
        batch, seqlen, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        qkv = self.qkv(x).reshape(batch, seqlen, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.fused_attn and not _matrix_readers(self):
            dropout_p = getattr(self.attn_drop, "p", 0.0) if self.training else 0.0
            heads = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
        else:
            heads = self._written_out(query, key, value, attn_mask, is_causal)
        x = self.norm(heads.transpose(1, 2).reshape(batch, seqlen, self.attn_dim))
        x = x if gate is None else x * gate
        return self.proj_drop(self.proj(x))

    def _written_out(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        scores = (query * self.scale) @ key.transpose(-2, -1)  # [B, H, N, N]
        if is_causal:
            attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            is_bool = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
        return self.attn_drop(scores.softmax(dim=-1)) @ value


class Attention(FusedAttentionForward, _PlainAttention):
    """timm.layers.Attention with the fused op: same constructor, attributes, state_dict keys and forward.

    Args:
        dim, num_heads: width of the tokens and number of heads.
        attn_head_dim: head_dim, if not dim / num_heads. dim_out: width of the output, if not dim.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm, scale_norm, norm_layer: normalise query and key per head, and the heads' output, with this class.
        gated: multiply the heads' output by a sigmoid gate of the input.
        attn_drop: dropout of the attention weights; training with it runs torch's own attention.
        proj_drop: dropout after the output projection.
        device, dtype: of the parameters.
        backend: run on this backend or raise; None chooses from the measured order.

    ``timm.create_model(name, attn_layer=fastvit.modules.Attention)`` builds a model with it and loads stock weights.
    Raises ValueError when the heads do not divide ``dim`` or ``norm_layer`` is missing.
    Source: Vaswani et al. 2017, section 3.2.2; timm 1.0.31 for names.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}; it must divide dim {dim}, unless attn_head_dim is given")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer: got None; qk_norm and scale_norm need a normalisation class")
        check_backend_name(backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        self.attn_dim = self.num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = True

        self.qkv = nn.Linear(dim, 3 * self.attn_dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if norm_layer and qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if norm_layer and qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **factory) if norm_layer and scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if backend is not None:
            self._fastvit_backend = backend
