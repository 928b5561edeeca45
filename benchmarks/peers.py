"""The other ways to compute attention, pinned one at a time, with their version or the reason why they are absent.

Each takes query, key and value as views [B, H, N, D] (of a packed projection or of separate tensors) and an additive
bias, and returns [B, H, N, D]; what a peer has to copy to get there is its own time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.roofline import installed
from benchmarks.timers import first_line

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation: ``load`` returns it or raises; ``refuses`` says why a call is not for it, or "".

    ``costly`` peers compile for each shape, for seconds on a GPU and most of a minute on a CPU.
    """

    name: str
    load: Callable[[], Attention]
    version: Callable[[], str]
    refuses: Callable[[torch.dtype, bool], str] = lambda dtype, bias: ""
    costly: bool = False


def _torch_version() -> str:
    return f"torch {torch.__version__}"


def _cudnn_version() -> str:
    return f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"


def _pinned(backend: SDPBackend | None) -> Callable[[], Attention]:
    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, value, bias)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, bias)

    return lambda: attention


@functools.cache
def _flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return compiled(query, key, value)
        table = bias[0]

        def add_bias(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return score + table[head, row, column]

        return compiled(query, key, value, score_mod=add_bias)

    return attention


@functools.cache
def _xformers() -> Attention:
    operations = importlib.import_module("xformers.ops")

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        if bias is not None:
            # It broadcasts nothing, and wants rows that begin at multiples of 8 elements.
            batch, heads, seqlen = query.shape[:3]
            padded = F.pad(bias, (0, -seqlen % 8))[..., :seqlen]
            bias = padded.expand(batch, heads, seqlen, seqlen)
        views = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return operations.memory_efficient_attention(*views, attn_bias=bias).transpose(1, 2)

    return attention


def _flash_attn(module: str) -> Callable[[], Attention]:
    def load() -> Attention:
        function = importlib.import_module(module).flash_attn_func

        def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
            result = function(*(tensor.transpose(1, 2) for tensor in (query, key, value)))
            # Versions 3 and 4 may return the LSE beside the output.
            return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

        return attention

    return functools.cache(load)


def _sixteen_bits_without_bias(dtype: torch.dtype, bias: bool) -> str:
    if bias:
        return "takes no additive bias"
    return "takes float16 and bfloat16 only" if dtype == torch.float32 else ""


def _sixteen_bits(dtype: torch.dtype, bias: bool) -> str:
    return "takes float16 and bfloat16 only" if dtype == torch.float32 else ""


def _version_of(package: str) -> Callable[[], str]:
    return lambda: f"{package} {installed(package) or '?'}"


_MATH = Peer("SDPA math", _pinned(SDPBackend.MATH), _torch_version)
_FLEX = Peer("FlexAttention compiled", _flex, _torch_version, costly=True)
PEERS: dict[str, tuple[Peer, ...]] = {
    "cuda": (
        Peer("SDPA cuDNN", _pinned(SDPBackend.CUDNN_ATTENTION), _cudnn_version, _sixteen_bits),
        Peer("SDPA flash", _pinned(SDPBackend.FLASH_ATTENTION), _torch_version, _sixteen_bits_without_bias),
        Peer("SDPA mem-efficient", _pinned(SDPBackend.EFFICIENT_ATTENTION), _torch_version),
        _MATH,
        _FLEX,
        Peer("xformers", _xformers, _version_of("xformers")),
        Peer("flash-attn 2", _flash_attn("flash_attn"), _version_of("flash-attn"), _sixteen_bits_without_bias),
        Peer(
            "flash-attn 3",
            _flash_attn("flash_attn_interface"),
            _version_of("flash-attn-3"),
            _sixteen_bits_without_bias,
        ),
        Peer("flash-attn 4", _flash_attn("flash_attn.cute"), _version_of("flash-attn-4"), _sixteen_bits_without_bias),
    ),
    # On a CPU torch's own choice is its flash kernel, or the product form where that has no answer.
    "cpu": (Peer("SDPA", _pinned(None), _torch_version), _MATH, _FLEX),
}


def absence(peer: Peer) -> str:
    """Return why a peer cannot be loaded here, "" if it can."""
    try:
        peer.load()
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        return f"not importable: {first_line(error)}"
    return ""


@functools.cache
def availability(device: str) -> dict[str, str]:
    """Return, for each peer, its version, or why it is absent."""
    return {peer.name: absence(peer) or peer.version() for peer in PEERS[device]}


def attention_peers(
    device: str, dtype: torch.dtype, bias: bool, backward: bool, costly: bool
) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers for a call, and why each of the others is not among them."""
    chosen, absent = [], {}
    for peer in PEERS[device]:
        reason = absence(peer) or peer.refuses(dtype, bias)
        if not reason and peer.costly and device == "cpu" and backward:
            reason = "has no backward pass on a CPU"
        if not reason and peer.costly and not costly:
            reason = "compiles for each shape: timed for the most telling cases, or with --all-peers"
        if reason:
            absent[peer.name] = reason
        else:
            chosen.append(peer)
    return chosen, absent
