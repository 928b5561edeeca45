"""The tolerance rule and its cases: for our tests, for ``fastvit check``, and for other people's kernels.

The rule: against float64, the error of an implementation is at most 2 × the error of PyTorch's own implementation in
the same dtype (the largest over the tensor), plus one rounding of the output dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit.ops as ops

VIT_SEQLENS = (49, 50, 196, 197, 256, 257, 577, 785, 1025, 1370)


@dataclass(frozen=True)
class Comparison:
    """The outcome of the rule for one tensor.

    ``error`` and ``torch_error`` are the largest absolute errors against float64; ``ratio`` is the worst quotient of
    error and allowed error (1.0 is the limit), met at ``worst_index`` by ``actual`` where ``expected`` was right.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    error: float
    torch_error: float
    ratio: float
    passed: bool
    worst_index: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "MISS"
        return (
            f"{self.name or 'tensor'} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}: {verdict}, error "
            f"{self.error:.3e}, PyTorch's {self.torch_error:.3e}, {self.ratio:.2f} of what is allowed, worst at "
            f"{list(self.worst_index)}: got {self.actual!r}, expected {self.expected!r}"
        )


def compare(actual: Tensor, expected: Tensor, torch_result: Tensor, name: str = "") -> Comparison:
    """Apply the rule.

    Args:
        actual: the result under test, any shape, float32, float16 or bfloat16 (float64 has no wider truth here).
        expected: the float64 result of the same shape.
        torch_result: PyTorch's own result in ``actual``'s dtype.
        name: what the tensor is, for the message.

    NaN must meet NaN and an infinity the same infinity (also one that appears when ``expected`` is rounded to the
    dtype); such a mismatch has an infinite ratio. An empty tensor passes.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if not actual.shape == expected.shape == torch_result.shape:
        raise ValueError(
            f"actual: got shape {tuple(actual.shape)}; expected has {tuple(expected.shape)} and torch_result "
            f"{tuple(torch_result.shape)}, and all three must be equal"
        )
    if expected.dtype != torch.float64 or actual.dtype != torch_result.dtype or actual.dtype == torch.float64:
        raise ValueError(
            f"expected: got {expected.dtype}; accepted is float64, with actual ({actual.dtype}) and torch_result "
            f"({torch_result.dtype}) of one narrower dtype"
        )
    if actual.numel() == 0:
        return Comparison(name, tuple(actual.shape), actual.dtype, 0.0, 0.0, 0.0, True, (), 0.0, 0.0)
    expected, actual64, torch64 = (tensor.detach().cpu().double() for tensor in (expected, actual, torch_result))
    rounded = expected.to(actual.dtype).double()
    finite = rounded.isfinite()
    error = torch.where(finite, (actual64 - expected).abs(), 0.0)
    torch_error = torch.where(finite & torch64.isfinite(), (torch64 - expected).abs(), 0.0).max()
    info = torch.finfo(actual.dtype)
    # Half an ulp: relative for normal numbers, absolute in the subnormal range.
    rounding = (expected.abs() * (info.eps / 2)).clamp_min(info.smallest_normal * info.eps / 2)
    ratio = torch.where(finite, error / (2 * torch_error + rounding), 0.0).nan_to_num(torch.inf, torch.inf)
    same = finite | (rounded == actual64) | (rounded.isnan() & actual64.isnan())
    ratio = torch.where(same, ratio, torch.inf)
    index = tuple(int(i) for i in torch.unravel_index(ratio.argmax(), ratio.shape))
    worst = ratio[index].item()
    return Comparison(
        name,
        tuple(actual.shape),
        actual.dtype,
        error.nan_to_num(torch.inf).max().item(),
        torch_error.item(),
        worst,
        worst <= 1.0,
        index,
        actual64[index].item(),
        expected[index].item(),
    )


def assert_close(actual: Tensor, expected: Tensor, torch_result: Tensor, name: str = "") -> Comparison:
    """Apply the rule of :func:`compare` and raise AssertionError, with the worst coordinate, when it is missed."""
    comparison = compare(actual, expected, torch_result, name)
    if not comparison.passed:
        raise AssertionError(str(comparison))
    return comparison


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem, reproducible from its fields.

    ``bias`` is None, "bool", "additive" (query's dtype) or "float32"; ``bias_shape`` has four sizes, 1 where it
    broadcasts. ``sharpness`` multiplies the queries, so that a wrong scale shows. ``layout`` is how query, key and
    value lie in memory: "packed" views of [B, N, 3, H, D] (needs equal lengths and head dims), "bnhd" or "bhnd".
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
            flip = self.layout != "bhnd"
            query, key, value = (
                self._place(normal(batch, heads, n, d) * (self.sharpness if i == 0 else 1.0), flip, device)
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

    def _place(self, tensor: Tensor, flip: bool, device: str | torch.device) -> Tensor:
        tensor = tensor.to(device, self.dtype)
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if flip else tensor

    def _bias(self, normal: Callable[..., Tensor], device: str | torch.device) -> Tensor | None:
        if self.bias is None:
            return None
        shape = self.bias_shape or (1, self.num_heads, self.seqlen_q, self.seqlen_k)
        # Rounded to the working dtype, so that a float32 bias means the same to PyTorch's 16-bit implementation.
        values = normal(*shape).to(device, self.dtype)
        if self.bias == "bool":
            return values > -0.5
        return values if self.bias == "additive" else values.to(torch.float32)


def check_attention(
    case: AttentionCase,
    backend: str | None = None,
    device: str | torch.device = "cpu",
    backward: bool = True,
    written_out: bool = False,
) -> list[Comparison]:
    """Run one case forward (and backward) on ``backend`` and apply the rule to output, LSE and each gradient.

    PyTorch's own implementation is ``scaled_dot_product_attention``, whatever path it takes on this device; with
    ``written_out`` it is softmax(QKᵀ)V in the same dtype, operation by operation, as in flash-attention's tests. That
    is the yardstick for a GPU kernel in an interpreter: it rounds P and dS to 16 bits for the matrix units, as
    PyTorch's own GPU kernels do, while PyTorch's CPU path keeps them in float32.
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

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        mask, causal = _torch_mask(bias, query, key, case.is_causal)
        scores = _scores(query, key, mask, causal, case.scale)
        empty = (scores == -torch.inf).all(dim=-1, keepdim=True)
        probabilities = torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
        return probabilities @ value, torch.logsumexp(scores.float(), dim=-1)

    exact = {name: None if t is None else t.double() if t.dtype != torch.bool else t for name, t in tensors.items()}
    results = (
        _run_attention(ours, tensors, backward),
        _run_attention(theirs, exact, backward),
        _run_attention(plain if written_out else theirs, tensors, backward),
    )
    names = ("output", "lse", "grad_query", "grad_key", "grad_value")
    return [compare(actual, expected, own, name) for name, actual, expected, own in zip(names, *results, strict=False)]


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


@dataclass(frozen=True)
class PatchEmbedCase:
    """One patch-embedding problem, reproducible from its fields; ``layout`` is "nchw" or "nhwc" (channels_last)."""

    batch: int = 2
    in_channels: int = 3
    grid: tuple[int, int] = (14, 14)
    patch: tuple[int, int] = (16, 16)
    embed_dim: int = 192
    dtype: torch.dtype = torch.float32
    has_bias: bool = True
    layout: str = "nchw"
    seed: int = 0

    def tensors(self, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
        """Return images, weight, bias and grad_output of this case."""
        generator = torch.Generator().manual_seed(self.seed)
        fan_in = self.in_channels * self.patch[0] * self.patch[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        images = normal(self.batch, self.in_channels, self.grid[0] * self.patch[0], self.grid[1] * self.patch[1])
        if self.layout == "nhwc":
            images = images.contiguous(memory_format=torch.channels_last)
        return {
            "images": images,
            "weight": normal(self.embed_dim, self.in_channels, *self.patch) * fan_in**-0.5,
            "bias": normal(self.embed_dim) if self.has_bias else None,
            "grad_output": normal(self.batch, self.grid[0] * self.grid[1], self.embed_dim),
        }


def check_patch_embed(
    case: PatchEmbedCase,
    backend: str | None = None,
    device: str | torch.device = "cpu",
    backward: bool = True,
) -> list[Comparison]:
    """Run one case forward (and backward) on ``backend`` and apply the rule to the tokens and each gradient."""
    tensors = case.tensors(device)

    def ours(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.patch_embed(images, weight, bias, backend=backend)

    def theirs(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(images, weight, bias, stride=case.patch).flatten(2).transpose(1, 2)

    exact = {name: None if tensor is None else tensor.double() for name, tensor in tensors.items()}
    names = ("output", "grad_images", "grad_weight", "grad_bias")
    results = (
        _run_patch_embed(ours, tensors, backward),
        _run_patch_embed(theirs, exact, backward),
        _run_patch_embed(theirs, tensors, backward),
    )
    return [compare(actual, expected, own, name) for name, actual, expected, own in zip(names, *results, strict=False)]


def _run_patch_embed(
    function: Callable[..., Tensor], tensors: dict[str, Tensor | None], backward: bool
) -> list[Tensor]:
    given = [tensors[name] for name in ("images", "weight", "bias")]
    leaves = [tensor.detach().requires_grad_(backward) for tensor in given if tensor is not None]
    output = function(*leaves)
    if not backward:
        return [output.detach()]
    return [output.detach(), *torch.autograd.grad(output, leaves, tensors["grad_output"])]


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


def vit_patch_embed_cases(dtypes: Sequence[torch.dtype]) -> list[PatchEmbedCase]:
    """Return the patch embeddings of real vision transformers for each dtype."""
    cases = [
        PatchEmbedCase(patch=(16, 16)),
        PatchEmbedCase(patch=(16, 16), layout="nhwc"),
        PatchEmbedCase(patch=(14, 14), grid=(16, 16)),
        PatchEmbedCase(patch=(32, 32), grid=(7, 7), embed_dim=768, batch=1),
        PatchEmbedCase(patch=(8, 8), grid=(28, 28)),
        PatchEmbedCase(patch=(4, 4), grid=(56, 56), embed_dim=96, batch=1),
        PatchEmbedCase(patch=(14, 16), grid=(5, 7)),
    ]
    return [replace(case, dtype=dtype) for dtype in dtypes for case in cases]
