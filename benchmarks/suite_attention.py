"""Attention: contests between our backends and the pinned peers, on packed projections or on separate tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import fastvit
from benchmarks import formulas, gates, peers
from benchmarks.cases import AttentionShape, Work
from benchmarks.harness import Contest
from benchmarks.timers import Call, Entry, first_line
from fastvit.testing import check_attention

Function = Callable[[list[Tensor], Tensor | None], Tensor]


def contest(work: Work, device: str, backends: Sequence[str], costly: bool = False) -> Contest:
    """Return the contest of one attention case; the gate has been applied to each backend."""
    shape: AttentionShape = work.details
    rules, absent = gate(shape, work.dtype, work.layout, device, backends)
    backward = shape.mode != "forward"
    others, reasons = peers.attention_peers(device, work.dtype, shape.bias, backward, costly)
    entry = partial(_entry, shape, work.dtype, work.layout, device)
    batch, heads, seqlen, dim = shape.batch, shape.heads, shape.seqlen, shape.head_dim
    itemsize, bias = work.dtype.itemsize, heads * seqlen**2 * shape.bias
    parts = {"forward": (1, 0), "backward": (0, 1), "forward + backward": (1, 1)}[shape.mode]
    flops = (
        formulas.attention_flop(batch, heads, seqlen, dim),
        formulas.attention_backward_flop(batch, heads, seqlen, dim),
    )
    sizes = (batch, heads, seqlen, dim, itemsize, bias)
    moved = formulas.attention_bytes(*sizes), formulas.attention_backward_bytes(*sizes)
    return Contest(
        work.suite,
        work.case,
        work.dtype,
        tuple(entry(name, _ours(name, work.layout)) for name in rules),
        tuple(entry(peer.name, _theirs(peer.load(), work.layout), peer.version()) for peer in others),
        rules,
        flop=sum(part * flop for part, flop in zip(parts, flops, strict=True)),
        moved=sum(part * size for part, size in zip(parts, moved, strict=True)),
        items=batch,
        layout=work.layout,
        absent=absent | reasons,
    )


def gate(
    shape: AttentionShape, dtype: torch.dtype, layout: str, device: str, backends: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return each backend's worst error as a part of what is allowed, and why another cannot run the case."""
    case = gates.attention(shape, dtype, layout, gates.Judge.of(device))
    rules, absent = {}, {}
    for backend in backends:
        try:
            results = check_attention(case, backend, device, backward=shape.mode != "forward")
            rules[backend] = max(result.ratio for result in results)
        except Exception as error:
            # Triton's own errors are no RuntimeErrors; whatever it is costs this backend alone.
            absent[backend] = first_line(error)
    return rules, absent


def _ours(backend: str, layout: str) -> Function:
    def packed(tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        return fastvit.attention_qkvpacked(tensors[0], bias=bias, backend=backend).flatten(2)

    def separate(tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        return fastvit.attention(*tensors, bias=bias, backend=backend)

    return packed if layout == "packed" else separate


def _theirs(attention: peers.Attention, layout: str) -> Function:
    def packed(tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        query, key, value = tensors[0].permute(2, 0, 3, 1, 4).unbind(0)
        return attention(query, key, value, bias).transpose(1, 2).flatten(2)

    def separate(tensors: list[Tensor], bias: Tensor | None) -> Tensor:
        return attention(tensors[0], tensors[1], tensors[2], bias)

    return packed if layout == "packed" else separate


def _entry(
    shape: AttentionShape,
    dtype: torch.dtype,
    layout: str,
    device: str,
    name: str,
    function: Function,
    version: str = "",
) -> Entry:
    def build() -> Call:
        # The same data for everyone, made anew: what one entry leaves in a cache or a graph is its own.
        tensors, bias, grad = data(shape, dtype, layout, device)
        return mode_call(partial(function, tensors, bias), tensors, grad, shape.mode)

    return Entry(name, build, version)


def data(
    shape: AttentionShape, dtype: torch.dtype, layout: str, device: str
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Return the inputs (one packed projection, or query, key, value), the bias and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    batch, heads, seqlen, dim = shape.batch, shape.heads, shape.seqlen, shape.head_dim

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    if layout == "packed":
        tensors, output = [normal(batch, seqlen, 3, heads, dim)], [batch, seqlen, heads * dim]
    else:
        tensors, output = [normal(batch, heads, seqlen, dim) for _ in range(3)], [batch, heads, seqlen, dim]
    bias = normal(1, heads, seqlen, seqlen) if shape.bias else None
    grad = normal(*output)
    return [tensor.requires_grad_(shape.mode != "forward") for tensor in tensors], bias, grad


def mode_call(forward: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor, mode: str) -> Call:
    """Return what is timed: the forward pass, the backward pass of one that was made before, or both."""
    if mode == "forward":
        return torch.no_grad()(forward)
    if mode == "forward + backward":
        return lambda: torch.autograd.grad(forward(), leaves, grad)
    output = forward()
    return lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)
