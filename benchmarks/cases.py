"""The contests: what is timed against what, each checked by the tolerance rule when it is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from benchmarks.harness import Contest, attention_flop, patch_embed_flop
from fastvit.testing import AttentionCase, PatchEmbedCase, check_attention, check_patch_embed, compare

# (batch, heads, seqlen, head_dim): ViT-B, batched; ViT-Ti; ViT-S/14; ViT-B at 384; long; ViT-H; DINOv2; windows.
ATTENTION_SHAPES = (
    (1, 12, 197, 64),
    (8, 12, 197, 64),
    (8, 3, 197, 64),
    (8, 6, 257, 64),
    (4, 12, 577, 64),
    (2, 16, 1025, 64),
    (2, 16, 257, 80),
    (1, 16, 1370, 64),
    (64, 3, 49, 32),
    (64, 3, 50, 32),
)
# (batch, image side, patch, embed_dim)
PATCH_EMBED_SHAPES = (
    (1, 224, 16, 768),
    (8, 224, 16, 768),
    (8, 224, 16, 192),
    (8, 224, 16, 384),
    (4, 224, 32, 768),
    (1, 384, 16, 768),
    (2, 518, 14, 384),
    (2, 224, 14, 1280),
)
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")


def attention_contests(
    dtype: torch.dtype, mode: str, shapes: tuple[tuple[int, int, int, int], ...] = ATTENTION_SHAPES
) -> Iterator[Contest]:
    """Yield attention on a packed projection, [B, N, 3, H, D] → [B, N, H·D], ``mode`` forward, bias or backward."""
    for batch, heads, seqlen, dim in shapes:
        backward = mode == "backward"
        shape = (1, heads, seqlen, seqlen)
        case = AttentionCase(
            min(batch, 2), heads, seqlen, seqlen, dim, dim, dtype, "additive" if mode == "bias" else None, shape
        )
        rule = max(result.ratio for result in check_attention(case, "cpu", backward=backward))
        packed = torch.randn(batch, seqlen, 3, heads, dim, dtype=dtype, requires_grad=backward)
        bias = torch.randn(shape, dtype=dtype) if mode == "bias" else None
        grad = torch.randn(batch, seqlen, heads * dim, dtype=dtype)
        yield Contest(
            f"attention {mode}",
            f"B{batch} H{heads} N{seqlen} D{dim}",
            dtype,
            _timed(_ours(packed, bias), packed, grad),
            {"SDPA": _timed(_sdpa(packed, bias), packed, grad)},
            attention_flop(batch, heads, seqlen, dim) * (3.5 if backward else 1.0),
            rule,
        )


def _ours(packed: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    return lambda: fastvit.attention_qkvpacked(packed, bias=bias, backend="cpu").flatten(2)


def _sdpa(packed: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    def call() -> Tensor:
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2)

    return call


def _timed(forward: Callable[[], Tensor], leaves: Tensor | tuple[Tensor, ...], grad: Tensor) -> Callable[[], object]:
    first = leaves[0] if isinstance(leaves, tuple) else leaves
    if not first.requires_grad:
        return torch.inference_mode()(forward)
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def patch_embed_contests(
    dtype: torch.dtype, mode: str, shapes: tuple[tuple[int, int, int, int], ...] = PATCH_EMBED_SHAPES
) -> Iterator[Contest]:
    """Yield patch embeddings of RGB images; ``mode`` forward, or backward (with forward; weight and bias)."""
    for batch, side, patch, embed_dim in shapes:
        backward = mode == "backward"
        grid = side // patch
        case = PatchEmbedCase(min(batch, 2), 3, (grid, grid), (patch, patch), embed_dim, dtype)
        rule = max(result.ratio for result in check_patch_embed(case, "cpu", backward=backward))
        images = torch.randn(batch, 3, side, side, dtype=dtype)
        weight = torch.randn(embed_dim, 3, patch, patch).mul((3 * patch**2) ** -0.5).to(dtype)
        bias, grad = torch.randn(embed_dim, dtype=dtype), torch.randn(batch, grid**2, embed_dim, dtype=dtype)
        leaves = (weight.requires_grad_(backward), bias.requires_grad_(backward))
        functions = {
            "ours": _patch_embed(images, weight, bias),
            "Conv2d": _conv(images, weight, bias),
            "unfold + Linear": _linear(images, weight, bias),
        }
        ours, *peers = [_timed(function, leaves, grad) for function in functions.values()]
        yield Contest(
            f"patch_embed {mode}",
            f"B{batch} {side}² P{patch} D{embed_dim}",
            dtype,
            ours,
            dict(zip(list(functions)[1:], peers, strict=True)),
            patch_embed_flop(batch, grid**2, embed_dim, 3 * patch**2) * (2.0 if backward else 1.0),
            rule,
        )


def _patch_embed(images: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: fastvit.patch_embed(images, weight, bias, backend="cpu")


def _conv(images: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: F.conv2d(images, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)


def _linear(images: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    patch = weight.shape[2]
    return lambda: F.linear(F.unfold(images, patch, stride=patch).transpose(1, 2), weight.flatten(1), bias)


def model_contests(dtype: torch.dtype, batches: tuple[int, ...] = (1, 8)) -> Iterator[Contest]:
    """Yield whole timm models, inference, as they are and swapped; the rule is applied to the logits."""
    import timm

    for name in MODELS:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(dtype)
        torch.nn.init.normal_(model.head.weight, std=0.02)
        swapped = copy.deepcopy(model)
        fastvit.swap(swapped, backend="cpu")
        for batch in batches:
            images = torch.randn(batch, 3, 224, 224, dtype=dtype)
            with torch.inference_mode():
                exact = copy.deepcopy(model).double()(images.double())
                rule = compare(swapped(images), exact, model(images)).ratio
            yield Contest(
                "model",
                f"{name} B{batch}",
                dtype,
                torch.inference_mode()(lambda images=images, swapped=swapped: swapped(images)),
                {"timm": torch.inference_mode()(lambda images=images, model=model: model(images))},
                0.0,
                rule,
            )
