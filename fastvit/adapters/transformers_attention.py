"""The attention function that transformers' layers call by name, for swapped layers and for ``attn_implementation``.

Importing this module imports transformers (5.x).
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fastvit.adapters import TRANSFORMERS_NAME
from fastvit.kernels.spec import MAX_HEAD_DIM
from fastvit.modules.fused import FusedForward
from fastvit.ops import attention

try:
    # Private, and the only place that says so for every layer; a transformers without it is asked by keyword alone.
    from transformers.utils.output_capturing import _active_collector
except ImportError:
    _active_collector = None  # type: ignore[assignment]

EAGER, SDPA = "eager", "sdpa"
# What changes the scores or the choice of keys, and what torch's SDPA cannot do either: no other way to run the call.
REFUSED = ("softcap", "s_aux", "sinks", "indices", "block_indices")
# What transformers' function for SDPA computes and ours does not. Every other keyword it ignores, and so do we.
LEFT_TO_SDPA = ("position_bias", "cache")


def register() -> None:
    """Make ``attn_implementation="fastvit"`` a name that every transformers model knows, with SDPA's masks."""
    AttentionInterface.register(TRANSFORMERS_NAME, attention_forward)
    # Without a mask function of its own name a model drops its padding masks, silently.
    AttentionMaskInterface.register(TRANSFORMERS_NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(scaling QKᵀ + mask) V, with the signature of transformers' attention functions.

    Args:
        module: the attention layer; its ``is_causal`` and ``num_key_value_groups`` count.
        query: [B, H, Nq, D]; key, value: [B, H / num_key_value_groups, Nk, D].
        attention_mask: None, or broadcasts to [B, H, Nq, Nk]: bool (True = take part) or additive.
        scaling: softmax scale; 1/√D if None.
        dropout: of the attention weights; above zero transformers' own function runs, with a warning.
        is_causal: the layer's own if None; counts only without a mask and for more than one query, as with SDPA.
        kwargs: ``output_attentions=True`` runs the layer's eager function, with a warning.

    Returns:
        [B, Nq, H, D], contiguous, and the attention weights [B, H, Nq, Nk] if they were asked for, else None.

    Raises:
        ValueError: a keyword that changes the result and that torch's SDPA does not know either (``REFUSED``).

    Source: transformers 5.23, integrations/sdpa_attention.py for names and meaning.
    """
    if refused := [name for name in REFUSED if kwargs.get(name) is not None]:
        raise ValueError(
            f"{refused[0]}: attn_implementation='{TRANSFORMERS_NAME}' does not support it; accepted is None"
        )
    implementation = _implementation(module)
    causal = False
    # Eager attention knows no flag. The length is asked last and in a statement: it may be symbolic, the op takes a
    # bool, and torch.export knows nothing of the lengths of Qwen's windows, which are not causal.
    if implementation == SDPA and attention_mask is None:
        is_flagged = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if is_flagged and query.shape[2] > 1:
            causal = True
    if _weights_wanted(kwargs) and (eager := _eager_function(type(module))) is not None:
        _warn(module, "output_attentions asks for the attention weights")
        asked = dict(kwargs, scaling=scaling, dropout=dropout)
        return _with_weights(eager, module, query, key, value, attention_mask, causal, asked)
    if reason := _why_plain(module, query, value, attention_mask, dropout, kwargs):
        _warn(module, reason)
        plain = sdpa_attention_forward if implementation == SDPA else _eager_function(type(module))
        kwargs = kwargs if is_causal is None else dict(kwargs, is_causal=is_causal)
        return cast(Any, plain)(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if query.shape[0] == 1 and key.shape[0] != 1:
        query = query.expand(key.shape[0], -1, -1, -1)  # learned queries, which SDPA broadcasts too
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if torch.compiler.is_compiling():
        # Qwen's layers split key and value by lengths that each reads from a tensor: equal, and two to a trace.
        torch._check(key.shape[2] == value.shape[2])
    backend = getattr(module, "_fastvit_backend", None)
    heads = attention(query, key, value, bias=attention_mask, is_causal=causal, scale=scaling, backend=backend)
    return cast(Tensor, heads).transpose(1, 2), None


def _implementation(module: nn.Module) -> str:
    """Return whose meaning the masks of this module have: "eager" or "sdpa"."""
    # Under the public name the model makes SDPA's masks.
    name = getattr(module.__dict__.get("config"), "_attn_implementation", TRANSFORMERS_NAME)
    return EAGER if name in (None, EAGER) else SDPA


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    # Some layers (SigLIP's) pass no keywords on: what is being collected says it. dynamo cannot read a ContextVar, and
    # this one is a plain global while a whole model is compiled.
    if _active_collector is None or (torch.compiler.is_compiling() and not _active_collector.compiling):
        return False
    collected = _active_collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def _why_plain(
    module: nn.Module,
    query: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    if dropout > 0.0:
        return "attention dropout has no kernel yet"
    if (head_dim := max(query.shape[3], value.shape[3])) > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is above {MAX_HEAD_DIM}"
    if attention_mask is not None and attention_mask.requires_grad and torch.is_grad_enabled():
        return "attention_mask requires grad, which has no kernel yet"
    if given := [name for name in LEFT_TO_SDPA if kwargs.get(name) is not None]:
        return f"{given[0]} has no kernel yet"
    return weight_readers(module)


def weight_readers(module: nn.Module) -> str | None:
    """Return why a hook on the layer may need the attention weights: only eager attention returns them."""
    if _implementation(module) == EAGER:
        # transformers' own hooks stay for good once a model has been asked for any hidden state.
        hooks = [getattr(hook, "__module__", "") for hook in module._forward_hooks.values()]
        if any(origin != "transformers.utils.output_capturing" for origin in hooks):
            return "a hook may read the attention weights that eager attention returns"
    return None


def _eager_function(kind: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the eager function of the file that the layer's class comes from; they differ in their rounding."""
    # A loop, because dynamo in torch 2.11 cannot trace a generator that assigns.
    for base in kind.__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return cast(Callable[..., tuple[Tensor, Tensor]], function)
    return None


def _with_weights(
    eager: Callable[..., tuple[Tensor, Tensor]],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    causal: bool,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return output and weights by eager attention, with SDPA's meaning of a mask: additive, and 0 for an empty row."""
    if _implementation(module) == EAGER:
        return eager(module, query, key, value, attention_mask, **kwargs)
    if causal:
        attention_mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    if attention_mask is None:
        return eager(module, query, key, value, None, **kwargs)
    lowest = torch.finfo(query.dtype).min
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, -torch.inf)
    empty = (attention_mask == -torch.inf).all(dim=-1, keepdim=True)  # [B, 1 or H, Nq, 1]
    output, weights = eager(module, query, key, value, attention_mask.clamp_min(lowest), **kwargs)
    return output.masked_fill(empty.transpose(1, 2), 0.0), weights.masked_fill(empty, 0.0)


def _warn(module: nn.Module, reason: str) -> None:
    if isinstance(module, FusedForward):
        module._warn_fallback(reason)
    elif not torch.compiler.is_compiling():
        _warn_once(type(module).__name__, reason)


@functools.cache
def _warn_once(kind: str, reason: str) -> None:
    warnings.warn(f"{kind}: {reason}, so its calls run transformers' own attention", stacklevel=4)
