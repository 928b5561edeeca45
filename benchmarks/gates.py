"""The sizes at which a timed case is judged: few enough for float64, enough for the kernel that is timed.

The CUDA launchers choose by the number of heads or tiles against that of multiprocessors: a second stage of shared
memory, a backward pass that keeps a whole head, large tiles (csrc/cuda). A case that is judged on a few heads alone
would judge another kernel than the one timed; tests/test_benchmarks_gates.py holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import AttentionShape, ModelShape, PatchShape
from fastvit.testing import AttentionCase, PatchEmbedCase

# The float64 truth and torch's own softmax(QKᵀ)V hold N × N matrices, of so many elements on a CPU.
CPU_ELEMENTS = 1 << 25
# What a kernel may need of them on a GPU: a matrix in float64 is then 2 GiB, and about eight are alive at once, beside
# their like in the working dtype.
MOST_ELEMENTS = 1 << 28
BYTES_PER_ELEMENT = 100
# The most shared memory of a block on any device, 227 KB: where K and V of a head take more, no launcher can keep them.
SHARED_BYTES = 227 * 1024
# Blocks of short heads share a multiprocessor, up to a dozen of them, and each is to take several heads.
TURNS = 24
# Elements of Q beyond which no further heads are judged: drawing the tensors takes longest, here half a second.
DRAWN_ELEMENTS = 1 << 22
# Of fewer heads the streaming backward pass makes more parts, which are other launches.
FEWEST_HEADS = 24
LARGE_TILE = 128
# (frames per tubelet, frames of the video): Arnab et al. 2021, ViViT, section 3.2.
TUBELET, FRAMES = 2, 8
CPU_BATCH = 2


@dataclass(frozen=True)
class Judge:
    """What a device allows a gate: its multiprocessors, 0 on a CPU, and its memory in bytes."""

    multiprocessors: int = 0
    memory: int = 0

    @staticmethod
    def of(device: str) -> Judge:
        """Return that of a device that is here."""
        if device == "cpu":
            return Judge()
        properties = torch.cuda.get_device_properties(device)
        return Judge(properties.multi_processor_count, properties.total_memory)

    def most_elements(self) -> int:
        """Return how many elements of an N × N matrix over all heads the device has the memory for."""
        return min(MOST_ELEMENTS, self.memory // 2 // BYTES_PER_ELEMENT)


def attention(shape: AttentionShape, dtype: torch.dtype, layout: str, judge: Judge) -> AttentionCase:
    """Return the case in whose place a shape is judged: fewer of its heads."""
    batch, heads = _heads(shape, judge)
    seqlen, dim = shape.seqlen, shape.head_dim
    return AttentionCase(
        batch, heads, seqlen, seqlen, dim, dim, dtype,
        "additive" if shape.bias else None, (1, heads, seqlen, seqlen),
        layout="packed" if layout == "packed" else "bhnd",
    )  # fmt: skip


def _heads(shape: AttentionShape, judge: Judge) -> tuple[int, int]:
    square, heads = shape.seqlen**2, shape.heads
    if not judge.multiprocessors:
        batch = min(shape.batch, CPU_BATCH)
        while heads > 1 and batch * heads * square > CPU_ELEMENTS:
            batch, heads = 1, heads // 2 if batch == 1 else heads
        return batch, heads
    least, most = FEWEST_HEADS, judge.most_elements() // square
    if 4 * shape.seqlen * shape.head_dim <= SHARED_BYTES:
        least = judge.multiprocessors + 1
    drawn = DRAWN_ELEMENTS // (shape.seqlen * shape.head_dim)
    wanted = min(max(drawn, least), TURNS * judge.multiprocessors)
    batch = min(shape.batch, -(-wanted // heads), max(1, most // heads))
    return batch, heads if batch > 1 else min(heads, max(1, most))


def patch_embed(shape: PatchShape, dtype: torch.dtype, layout: str, judge: Judge) -> PatchEmbedCase:
    """Return the case in whose place a shape is judged: fewer images, and of a video its tubelets as images."""
    deep = shape.mode == "tubelet"
    grid, channels = shape.image // shape.patch, 3 * (TUBELET if deep else 1)
    batch = shape.batch * (FRAMES // TUBELET if deep else 1)
    least = CPU_BATCH
    if judge.multiprocessors:
        least = _images(grid**2, min(shape.embed_dim, channels * shape.patch**2), judge)
    return PatchEmbedCase(
        min(batch, least), channels, (grid, grid), (shape.patch, shape.patch), shape.embed_dim, dtype, layout=layout
    )


def _images(tokens: int, columns: int, judge: Judge) -> int:
    """Return how many images make as many large tiles as there are multiprocessors."""
    down = -(-judge.multiprocessors // -(-columns // LARGE_TILE))
    return -(-((down - 1) * LARGE_TILE + 1) // tokens)


def model_batch(shape: ModelShape, judge: Judge) -> int:
    """Return the batch in whose place a model is judged."""
    if not judge.multiprocessors:
        return min(shape.batch, CPU_BATCH)
    attention_shape, patches = parts(shape)
    heads = attention_shape.heads
    case = patch_embed(patches, torch.bfloat16, "nchw", judge)
    # Bytes per image that a training step keeps in float64: in each layer P and two of its like, some twenty rows per
    # token.
    layers = shape.vit.depth if shape.training else 1
    kept = layers * 8 * (3 * heads * attention_shape.seqlen**2 + 20 * attention_shape.seqlen * shape.vit.width)
    wanted = max(-(-(judge.multiprocessors + 1) // heads), case.batch)
    return max(1, min(shape.batch, wanted, judge.memory * 3 // 4 // kept))


def parts(shape: ModelShape) -> tuple[AttentionShape, PatchShape]:
    """Return the attention and the patch embedding that a model consists of."""
    vit = shape.vit
    heads = model_heads(shape.name, vit.width)
    mode = "forward + backward" if shape.training else "forward"
    seqlen = (vit.image // vit.patch) ** 2 + 1
    return (
        AttentionShape(shape.batch, heads, seqlen, vit.width // heads, mode),
        PatchShape(shape.batch, vit.image, vit.patch, vit.width, mode),
    )


def model_heads(name: str, width: int) -> int:
    """Return the number of heads of a ViT: 16 of 80 in ViT-H (Dosovitskiy et al. 2021, table 1), else of 64."""
    return 16 if "huge" in name else width // 64
