"""Attention as the paper writes it, O = softmax(scale Q Kᵀ + bias) V, and its gradient, with the N×N matrix in full.

Source: Vaswani et al. 2017, equation 1. Backward: dV = Pᵀ dO; dP = dO Vᵀ; dS = P ∘ (dP − Δ) with Δ = rowsum(P ∘ dP) −
dLSE; dQ = scale dS K; dK = scale dSᵀ Q. Computed one type wider than the inputs, as a specification should be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvit.kernels.reference.precision import wider


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    scores = scale * (query @ key.transpose(-2, -1))  # [B, H, Nq, Nk]
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, -torch.inf)
    elif bias is not None:
        scores = scores + bias
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores


def _softmax(scores: Tensor) -> Tensor:
    # A row with no key left has no distribution: torch defines its output as 0, and so do we. NaN is not such a row.
    empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> None:
    """Write softmax(scale QKᵀ + bias) V to ``output`` [B, H, Nq, Dv] and the row log-sum-exp to ``lse`` [B, H, Nq]."""
    query, key, value = (wider(tensor) for tensor in (query, key, value))
    scores = _scores(query, key, bias, is_causal, scale)
    lse.copy_(torch.logsumexp(scores, dim=-1))
    output.copy_(_softmax(scores) @ value)


def attention_backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    *,
    is_causal: bool,
    scale: float,
) -> None:
    """Write the gradients of query, key and value; the probabilities are recomputed, ``output`` is not needed."""
    del output, lse
    query, key, value, grad_output = (wider(tensor) for tensor in (query, key, value, grad_output))
    probabilities = _softmax(_scores(query, key, bias, is_causal, scale))
    grad_value.copy_(probabilities.transpose(-2, -1) @ grad_output)
    grad_probabilities = grad_output @ value.transpose(-2, -1)
    delta = (probabilities * grad_probabilities).sum(dim=-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    grad_scores = probabilities * (grad_probabilities - delta)
    grad_query.copy_(scale * (grad_scores @ key))
    grad_key.copy_(scale * (grad_scores.transpose(-2, -1) @ query))
