"""FLOP and byte formulas: the useful work of one call, and the least traffic with memory that it can have.

A multiply-add is two FLOP. Bytes count each operand read once and each result written once: what a kernel moves with a
cache that forgets nothing. Softmax, layer norms and activations are not counted, as in the papers named below.
"""

from __future__ import annotations

from dataclasses import dataclass


def attention_flop(batch: int, heads: int, seqlen: int, head_dim: int) -> float:
    """Return the FLOP of a forward pass, QKᵀ and PV: 4 B H N² D (Dao 2023, FlashAttention-2, section 4.1)."""
    return 4.0 * batch * heads * seqlen**2 * head_dim


def attention_backward_flop(batch: int, heads: int, seqlen: int, head_dim: int) -> float:
    """Return the FLOP of a backward pass, five products where forward has two: 10 B H N² D (same section)."""
    return 2.5 * attention_flop(batch, heads, seqlen, head_dim)


def attention_bytes(batch: int, heads: int, seqlen: int, head_dim: int, itemsize: int, bias: int = 0) -> float:
    """Return the bytes of a forward pass: Q, K, V read, O written, and ``bias`` elements read.

    Source: Dao et al. 2022 (FlashAttention), section 3.2, in the limit of a fast memory that holds K and V.
    """
    return float(itemsize) * (4 * batch * heads * seqlen * head_dim + bias)


def attention_backward_bytes(batch: int, heads: int, seqlen: int, head_dim: int, itemsize: int, bias: int = 0) -> float:
    """Return the bytes of a backward pass: Q, K, V, O, dO and the float32 LSE read, dQ, dK, dV written.

    Source: Dao et al. 2022 (FlashAttention), algorithm 4, in the same limit.
    """
    return float(itemsize) * (8 * batch * heads * seqlen * head_dim + bias) + 4.0 * batch * heads * seqlen


def patch_embed_flop(batch: int, tokens: int, embed_dim: int, patch_elements: int) -> float:
    """Return the FLOP of the projection, 2 B N D K (Dosovitskiy et al. 2021, equation 1).

    The backward pass of weight and bias is as much again: one product of the same three sizes.
    """
    return 2.0 * batch * tokens * embed_dim * patch_elements


def patch_embed_bytes(batch: int, tokens: int, embed_dim: int, patch_elements: int, itemsize: int) -> float:
    """Return the bytes of a forward pass: images, weight and bias read, tokens written (counted from equation 1)."""
    images, weight, output = batch * tokens * patch_elements, embed_dim * patch_elements, batch * tokens * embed_dim
    return float(itemsize) * (images + weight + embed_dim + output)


def patch_embed_backward_bytes(batch: int, tokens: int, embed_dim: int, patch_elements: int, itemsize: int) -> float:
    """Return the bytes of dW and db: images and grad_output read, grad_weight and grad_bias written: as many again."""
    return patch_embed_bytes(batch, tokens, embed_dim, patch_elements, itemsize)


def stem_bytes(batch: int, tokens: int, embed_dim: int, patch_elements: int, itemsize: int) -> float:
    """Return the bytes of patches + class token + positions in one pass: the output has a row more per image.

    Source: Dosovitskiy et al. 2021, equation 1; class token [D] and positions [N + 1, D] are read once.
    """
    extra = batch * embed_dim + embed_dim + (tokens + 1) * embed_dim
    return patch_embed_bytes(batch, tokens, embed_dim, patch_elements, itemsize) + float(itemsize) * extra


@dataclass(frozen=True)
class VitShape:
    """What the cost of a plain ViT depends on; ``prefix`` counts class and register tokens."""

    image: int
    patch: int
    width: int
    mlp: int
    depth: int
    classes: int = 1000
    prefix: int = 1

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image // self.patch) ** 2


def vit_flop(shape: VitShape, batch: int) -> float:
    """Return the FLOP of a forward pass of a ViT: projections, MLPs, attention, patches and head.

    Per token and block 2 · (4 D² + 2 D M), per block 4 N² D for attention (Chowdhery et al. 2022, PaLM, appendix B,
    forward part, with the MLP's width M spelled out). Training is three times this (same place).
    """
    seqlen = shape.patches + shape.prefix
    projections = 2.0 * seqlen * (4 * shape.width**2 + 2 * shape.width * shape.mlp)
    block = projections + attention_flop(1, 1, seqlen, shape.width)
    patches = patch_embed_flop(1, shape.patches, shape.width, 3 * shape.patch**2)
    return batch * (shape.depth * block + patches + 2.0 * shape.width * shape.classes)


def vit_bytes(shape: VitShape, batch: int, itemsize: int, parameters: int) -> float:
    """Return the least bytes of a forward pass: every parameter and every pixel read once, logits written.

    A floor that matters at batch 1 only: activations that leave the chip are not counted (Pope et al. 2022, section 2).
    """
    return float(itemsize) * (parameters + batch * (3 * shape.image**2 + shape.classes))


def bound(flop: float, moved: float, peak_gflops: float, peak_gbs: float) -> tuple[str, float]:
    """Return the roof that a call is under, "memory" or "arithmetic", and the seconds that it allows.

    Source: Williams et al. 2009 (Roofline): attainable = min(peak, bandwidth · intensity). Without a measured peak, or
    without work to count, ("", 0.0).
    """
    if not (peak_gflops > 0 and peak_gbs > 0 and (flop > 0 or moved > 0)):
        return "", 0.0
    arithmetic, memory = flop / peak_gflops / 1e9, moved / peak_gbs / 1e9
    return ("memory", memory) if memory > arithmetic else ("arithmetic", arithmetic)
