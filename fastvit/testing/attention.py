"""Attention under the tolerance rule: cases that are reproducible from their fields, and the check of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit.ops as ops
from fastvit.testing.precision import ieee_float32
from fastvit.testing.rule import Comparison, compare, runs_of

VIT_SEQLENS = (49, 50, 196, 197, 256, 257, 577, 785, 1025, 1370)


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem, reproducible from its fields.

    ``bias`` is None, "bool", "additive" (query's dtype) or "float32"; ``bias_shape`` has four sizes, 1 where it
    broadcasts. ``sharpness`` multiplies the queries, so that a wrong scale shows. ``layout`` is how query, key and
    value lie in memory: "packed" views of [B, N, 3, H, D] (needs equal lengths and head dims), "bnhd", "bhnd" or
    "bhdn".
    """

    batch: int = 2
    num_heads: int = 3
    seqlen_q: int = 197
    seqlen_k: int = 197
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: torch.dtype = torch.float32
    bias: str | None = None
    bias_shape: tuple[int, int, int, int] | None = None
    is_causal: bool = False
    scale: float | None = None
    sharpness: float = 1.0
    layout: str = "packed"
    seed: int = 0

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
        """Return query, key, value, bias, grad_output and grad_lse of this case."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        batch, heads, length, dim = self.batch, self.num_heads, self.seqlen_q, self.head_dim
        if self.layout == "packed" and (length, dim) == (self.seqlen_k, self.head_dim_v):
            packed = normal(batch, length, 3, heads, dim)
            packed[:, :, 0] *= self.sharpness
            query, key, value = packed.to(device, self.dtype).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            sizes = ((length, dim), (self.seqlen_k, dim), (self.seqlen_k, self.head_dim_v))
            query, key, value = (
                self._place(normal(batch, heads, n, d) * (self.sharpness if i == 0 else 1.0), device)
                for i, (n, d) in enumerate(sizes)
            )
        return {
            "query": query,
            "key": key,
            "value": value,
            "bias": self._bias(normal, device),
            "grad_output": normal(batch, heads, length, self.head_dim_v).to(device, self.dtype),
            "grad_lse": normal(batch, heads, length).to(
                device, torch.float64 if self.dtype == torch.float64 else torch.float32
            ),
        }

    def _place(self, tensor: Tensor, device: str | torch.device) -> Tensor:
        first, second = {"bhnd": (0, 0), "bhdn": (2, 3)}.get(self.layout, (1, 2))
        return tensor.to(device, self.dtype).transpose(first, second).contiguous().transpose(first, second)

    def _bias(self, normal: Callable[..., Tensor], device: str | torch.device) -> Tensor | None:
        if self.bias is None:
            return None
        shape = self.bias_shape or (1, self.num_heads, self.seqlen_q, self.seqlen_k)
        # Rounded to the working dtype, so that a float32 bias means the same to PyTorch's 16-bit implementation.
        values = normal(*shape).to(device, self.dtype)
        if self.bias == "bool":
            return values > -0.5
        return values if self.bias == "additive" else values.to(torch.float32)


@ieee_float32()
def check_attention(
    case: AttentionCase,
    backend: str | None = None,
    device: str | torch.device = "cpu",
    backward: bool = True,
    written_out: bool = False,
) -> list[Comparison]:
    """Run one case forward (and backward) on ``backend`` and apply the rule to output, LSE and each gradient.

    PyTorch's own implementations are ``scaled_dot_product_attention`` on the path that it takes on this device, and on
    its math path; with ``written_out`` also softmax(QKᵀ)V in the same dtype, operation by operation, as in
    flash-attention's tests. That is the yardstick for a GPU kernel in an interpreter: it rounds P and dS to 16 bits for
    the matrix units, as PyTorch's own GPU kernels do, while PyTorch's CPU paths keep them in float32.
    """
    tensors = case.tensors(device)

    def ours(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        output, lse = ops.attention(
            query, key, value, bias=bias, is_causal=case.is_causal, scale=case.scale, return_lse=True, backend=backend
        )
        return output, lse

    def theirs(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mask, causal = _torch_mask(bias, query, key, case.is_causal)
        output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=case.scale)
        return output, _torch_lse(query, key, mask, causal, case.scale)

    def math(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            output, _ = theirs(query, key, value, bias)
        # The math path scales query and key by the square root of the scale, before their product.
        root = (query.shape[-1] ** -0.5 if case.scale is None else case.scale) ** 0.5
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        mask, causal = _torch_mask(bias, query, key, case.is_causal)
        return output, _torch_lse(query.to(dtype) * root, key.to(dtype) * root, mask, causal, 1.0)

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mask, causal = _torch_mask(bias, query, key, case.is_causal)
        scores = _scores(query, key, mask, causal, case.scale)
        empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
        probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        return probabilities @ value, torch.logsumexp(scores.float(), dim=-1)

    exact = {name: None if t is None else t.double() if t.dtype != torch.bool else t for name, t in tensors.items()}
    actual, expected = _run_attention(ours, tensors, backward), _run_attention(theirs, exact, backward)
    peers = (theirs, math, plain) if written_out else (theirs, math)
    own = zip(*runs_of(peers, lambda peer: _run_attention(peer, tensors, backward)), strict=True)
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    return [compare(a, e, o, name) for name, a, e, o in zip(names, actual, expected, own, strict=False)]


def _torch_mask(bias: Tensor | None, query: Tensor, key: Tensor, is_causal: bool) -> tuple[Tensor | None, bool]:
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(query.dtype)
    if bias is None or not is_causal:
        return bias, is_causal
    allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    return (bias & allowed if bias.dtype == torch.bool else bias.masked_fill(~allowed, -torch.inf)), False


def _torch_lse(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.logsumexp(_scores(query.to(dtype), key.to(dtype), mask, is_causal, scale), dim=-1)


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores


def _run_attention(
    function: Callable[..., tuple[Tensor, Tensor]], tensors: dict[str, Tensor | None], backward: bool
) -> list[Tensor]:
    given = [tensors[name] for name in ("query", "key", "value")]
    leaves = [tensor.detach().requires_grad_(backward) for tensor in given if tensor is not None]
    output, lse = function(*leaves, tensors["bias"])
    if not backward:
        return [output.detach(), lse.detach()]
    return [output.detach(), lse.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])]


def vit_attention_cases(dtypes: Sequence[torch.dtype]) -> list[AttentionCase]:
    """Return the attention shapes of real vision transformers, with the features that they use, for each dtype."""
    plain = [AttentionCase(batch=2, num_heads=3, seqlen_q=n, seqlen_k=n, sharpness=4.0, seed=n) for n in VIT_SEQLENS]
    other_dims = [
        AttentionCase(batch=1, num_heads=2, seqlen_q=257, seqlen_k=257, head_dim=d, head_dim_v=d, seed=d)
        for d in (32, 72, 80, 88, 128)
    ]
    featured = [
        AttentionCase(seqlen_q=49, seqlen_k=49, head_dim=32, head_dim_v=32, bias="additive"),
        AttentionCase(bias="bool", bias_shape=(2, 1, 1, 197)),
        AttentionCase(seqlen_q=77, seqlen_k=77, is_causal=True),
        AttentionCase(seqlen_q=1, seqlen_k=257, layout="bnhd"),
    ]
    return [replace(case, dtype=dtype) for dtype in dtypes for case in plain + other_dims + featured]
