"""transformers' pooling heads around nn.MultiheadAttention, whose attention weights are asked for and dropped."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torchs_module

from fastvit.modules.fused import FusedForward, own_obstacles
from fastvit.modules.multihead_attention import FusedMultiheadAttention


class _HeadView:
    """A pooling head as its own forward sees it: all is the head's, but ``attention`` is asked for no weights."""

    def __init__(self, head: FusedPoolingHeadForward) -> None:
        self._fastvit_head = head

    def attention(self, *args: Any, **options: Any) -> Any:
        """Call the head's attention, hooks and all, as it is called there."""
        return self._fastvit_head.attention(*args, **{"need_weights": False, **options})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_fastvit_head"], name)


class FusedPoolingHeadForward(FusedForward):
    """The fused forward of a head that pools by ``attention``, an nn.MultiheadAttention, and drops its weights.

    nn.MultiheadAttention returns them unless it is told not to, and computes the attention matrix for it. The head's
    own forward runs on: what a learned probe attends to, its masks, the norm and the MLP are not written anew.
    """

    fastvit_kind = "pooling head"
    fastvit_container = True
    # The head's own class. A name, because dynamo cannot take a function out of ``super()``.
    fastvit_plain: ClassVar[Any]
    attention: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.fastvit_plain = next(kind for kind in cls.__mro__ if not issubclass(kind, FusedForward))

    @classmethod
    def fastvit_obstacles(cls, module: nn.Module) -> list[str]:
        """Return why ``module`` would gain nothing or cannot take this forward; empty means that it can."""
        if obstacles := own_obstacles(module):
            return obstacles
        attention = module._modules.get("attention")
        if type(attention) not in (nn.MultiheadAttention, FusedMultiheadAttention):
            return [f"its attention is a {type(attention).__module__}.{type(attention).__qualname__}"]
        if FusedMultiheadAttention.fastvit_obstacles(cast(nn.Module, attention)):
            return ["its attention is left alone"]
        return []

    @classmethod
    def fastvit_fallbacks(cls, module: nn.Module) -> list[str]:
        """Return what a reader of the report should know: which weights are not computed, or who keeps them."""
        if reason := _why_weights(cast(nn.Module, module.attention)):
            return [f"{reason}: runs the plain forward"]
        return ["asks attention for no weights, which it drops"]

    @classmethod
    def fastvit_spec(cls, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Return None: the op belongs to ``attention``, which has a row of its own."""
        return

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Return the pooled token.

        Args:
            hidden_state: [B, N, dim].

        Returns:
            [B, dim].
        """
        return self._pooled(hidden_state)

    def _pooled(self, *args: Tensor | None) -> Tensor:
        """Return what the head's own forward makes of the same arguments, with no attention weights computed.

        Whatever has taken the place of ``attention`` since the swap is called as the head itself calls it.
        """
        if reason := _why_weights(self.attention):
            self._warn_fallback(reason)
            return cast(Tensor, self.fastvit_plain.forward(self, *args))
        return cast(Tensor, self.fastvit_plain.forward(_HeadView(self), *args))


class FusedMaskedPoolingHeadForward(FusedPoolingHeadForward):
    """The fused forward of a pooling head that takes the padding of its tokens."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the pooled token.

        Args:
            hidden_state: [B, N, dim].
            attention_mask: [B, N], 1 or True = take part; None where the head itself takes None.

        Returns:
            [B, dim].
        """
        return self._pooled(hidden_state, attention_mask)


def _why_weights(attention: nn.Module) -> str | None:
    # parametrize and fully_shard derive a class of their own from the fused one; other subclasses do as they like.
    if type(attention) is not nn.MultiheadAttention and not isinstance(attention, FusedMultiheadAttention):
        return f"attention is a {type(attention).__name__}, which may want its weights"
    if attention._forward_hooks:
        return "a hook on attention may read the attention weights"
    return "a global hook may read the attention weights" if torchs_module._global_forward_hooks else None
