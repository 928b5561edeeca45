"""What is measured, as data: the same lists for a CPU and a GPU, in order of value.

A case says its ``tier``: 0 are the most telling (the goals, and what the README shows), 1 the sweeps over N and d, 2
the grid behind the heat maps, 3 everything else. A run takes tier after tier, so that whenever the time ends what was
measured is what matters most. A CPU takes the cases whose work fits it (``CPU_FLOP``), with smaller batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.formulas import VitShape, attention_flop
from benchmarks.harness import short

SEQLENS = (49, 50, 64, 196, 197, 256, 257, 577, 785, 1024, 1025, 1370, 4096)
HEAD_DIMS = (32, 64, 72, 80, 96, 128)
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
MODES = ("forward", "backward", "forward + backward")
LAYOUTS = ("packed", "separate")
# The FLOP that a case of the sweeps is given by its batch, and the most that a CPU takes on.
SWEEP_FLOP = {"cpu": 1e9, "cuda": 1.2e11}
CPU_FLOP = 2e10
CPU_IMAGES = 16


@dataclass(frozen=True)
class Work:
    """One thing to measure. ``suite`` and ``case`` are its columns in the rows; ``details`` what it is made from."""

    suite: str
    case: str
    dtype: torch.dtype
    tier: int
    kind: str
    details: Any
    layout: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The columns that name it."""
        return self.suite, self.case, short(self.dtype), self.layout

    @property
    def label(self) -> str:
        """The columns that name it, in one line."""
        return " ".join(filter(None, self.key))


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of self-attention, and what is timed of it."""

    batch: int
    heads: int
    seqlen: int
    head_dim: int
    mode: str = "forward"
    bias: bool = False

    @property
    def case(self) -> str:
        """Its column in the rows."""
        return f"B{self.batch} H{self.heads} N{self.seqlen} D{self.head_dim}"


@dataclass(frozen=True)
class PatchShape:
    """Sizes of a patch embedding; ``mode`` also "forward channels_last", "stem", "stem compiled", "tubelet"."""

    batch: int
    image: int
    patch: int
    embed_dim: int
    mode: str = "forward"

    @property
    def case(self) -> str:
        """Its column in the rows."""
        return f"B{self.batch} {self.image}² P{self.patch} D{self.embed_dim}"


@dataclass(frozen=True)
class ModelShape:
    """A timm model; ``mode`` is eager, compiled or graphed, ``training`` a whole step instead of inference."""

    name: str
    vit: VitShape
    batch: int
    mode: str = "eager"
    training: bool = False

    @property
    def case(self) -> str:
        """Its column in the rows."""
        return f"{self.name} B{self.batch}"


# (batch, heads, seqlen, head_dim) of the CPU's goals: ViT-B, batched; windows; ViT-Ti; ViT-S/14; ViT-B at 384; long;
# ViT-H; DINOv2; windows with a class token.
CPU_ATTENTION: tuple[tuple[int, int, int, int], ...] = (
    (1, 12, 197, 64), (8, 12, 197, 64), (64, 3, 49, 32), (8, 3, 197, 64), (8, 6, 257, 64), (4, 12, 577, 64),
    (2, 16, 1025, 64), (2, 16, 257, 80), (1, 16, 1370, 64), (64, 3, 50, 32),
)  # fmt: skip
# (batch, heads, seqlen, head_dim, bias). On a GPU: the goals of the project, in its order.
TELLING: dict[str, tuple[tuple[int, int, int, int, bool], ...]] = {
    "cpu": tuple((*sizes, bias) for bias in (False, True) for sizes in CPU_ATTENTION),
    "cuda": (
        (256, 12, 197, 64, False), (64, 16, 257, 80, False), (2048, 12, 49, 32, True), (4, 16, 577, 64, False),
        (64, 16, 257, 64, False), (16, 16, 1025, 64, False), (16, 16, 1370, 64, False), (2, 12, 4096, 64, False),
        (64, 12, 577, 64, False), (1, 12, 197, 64, False),
    ),
}  # fmt: skip
# (batch, image side, patch, embed_dim)
PATCHES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "cpu": (
        (1, 224, 16, 768), (8, 224, 16, 768), (8, 224, 16, 192), (8, 224, 16, 384), (4, 224, 32, 768),
        (1, 384, 16, 768), (2, 518, 14, 384), (2, 224, 14, 1280),
    ),
    "cuda": (
        (256, 224, 16, 768), (64, 518, 14, 1024), (256, 224, 14, 1280), (256, 224, 16, 192), (64, 384, 16, 768),
        (256, 224, 32, 768), (256, 224, 8, 384), (1, 224, 16, 768),
    ),
}  # fmt: skip
# name, width, mlp, depth
_SIZES = {
    "tiny": (192, 768, 12), "small": (384, 1536, 12), "base": (768, 3072, 12), "large": (1024, 4096, 24),
    "huge": (1280, 5120, 32),
}  # fmt: skip


def _vit(size: str, image: int, patch: int) -> VitShape:
    width, mlp, depth = _SIZES[size]
    return VitShape(image, patch, width, mlp, depth)


# The timm names; an image size that the name does not have is given to create_model.
MODELS: tuple[tuple[str, VitShape], ...] = (
    ("vit_base_patch16_224", _vit("base", 224, 16)),
    ("vit_base_patch16_384", _vit("base", 384, 16)),
    # Without LayerScale, so that its formula is that of a plain ViT: the 224 model at the size of DINOv2.
    ("vit_base_patch14_518", _vit("base", 518, 14)),
    ("vit_large_patch16_224", _vit("large", 224, 16)),
    ("vit_small_patch16_224", _vit("small", 224, 16)),
    ("vit_tiny_patch16_224", _vit("tiny", 224, 16)),
    ("vit_huge_patch14_224", _vit("huge", 224, 14)),
    ("vit_large_patch16_384", _vit("large", 384, 16)),
    ("vit_small_patch16_384", _vit("small", 384, 16)),
    ("vit_tiny_patch16_384", _vit("tiny", 384, 16)),
    # 384 is no multiple of 14.
    ("vit_huge_patch14_378", _vit("huge", 378, 14)),
)
MODEL_BATCHES = {"cpu": (1, 8), "cuda": (256, 1, 32, 8)}
# The models that come first.
TELLING_MODELS = {
    "cpu": ("vit_base_patch16_224", "vit_small_patch16_224", "vit_tiny_patch16_224"),
    "cuda": ("vit_base_patch16_224", "vit_base_patch16_384", "vit_base_patch14_518"),
}


def attention(device: str) -> Iterator[Work]:
    """Yield the attention suite."""
    first = DTYPES[device][0]
    for tier, works in ((0, _telling(device)), (1, _sweeps(device)), (2, _grid(device)), (3, _everything(device))):
        for dtype, layout, shape in works:
            # Backward alone says more than forward + backward only where it is a goal of its own: the first shape.
            apart = shape.mode == "backward" and (shape.batch, shape.heads, shape.seqlen) != TELLING[device][0][:3]
            # On a CPU the 16-bit forward passes are goals too, without a bias.
            other = dtype != first and (device != "cpu" or shape.bias)
            late = tier == 0 and (other or layout != "packed" or apart)
            yield attention_work(shape, dtype, layout, 1 if late else tier)


def attention_work(shape: AttentionShape, dtype: torch.dtype, layout: str, tier: int) -> Work:
    """Return the case of one shape."""
    suite = f"attention {shape.mode}" + ", bias" * shape.bias
    return Work(suite, shape.case, dtype, tier, "attention", shape, layout)


Shapes = Iterator[tuple[torch.dtype, str, AttentionShape]]


def _telling(device: str) -> Shapes:
    first = DTYPES[device][0]
    for mode in ("forward", "forward + backward", "backward"):
        for batch, heads, seqlen, dim, bias in TELLING[device]:
            if mode == "forward" or not bias:
                yield first, "packed", AttentionShape(batch, heads, seqlen, dim, mode, bias)
    # With a bias the other dtypes are no goal: a few shapes show them.
    biased = [sizes for sizes in TELLING[device] if sizes[-1]][:3]
    for dtype in DTYPES[device][1:]:
        for sizes in TELLING[device]:
            if not sizes[-1] or sizes in biased:
                batch, heads, seqlen, dim, bias = sizes
                yield dtype, "packed", AttentionShape(batch, heads, seqlen, dim, "forward", bias)


def sized(device: str, seqlen: int, head_dim: int, mode: str = "forward", bias: bool = False) -> AttentionShape:
    """Return a case of the sweeps: the width of ViT-B, with about the same FLOP as the others."""
    heads = max(1, 768 // head_dim)
    batch = max(1, round(SWEEP_FLOP[device] / attention_flop(1, heads, seqlen, head_dim)))
    return AttentionShape(batch, heads, seqlen, head_dim, mode, bias)


def _sweeps(device: str) -> Shapes:
    dtype = DTYPES[device][0]
    for mode in ("forward", "backward"):
        for seqlen in SEQLENS:
            yield dtype, "packed", sized(device, seqlen, 64, mode)
        for head_dim in HEAD_DIMS:
            yield dtype, "packed", sized(device, 257, head_dim, mode)
    for seqlen in (49, 197, 577, 1025):
        yield dtype, "packed", sized(device, seqlen, 64, bias=True)
        yield dtype, "separate", sized(device, seqlen, 64)


def _grid(device: str) -> Shapes:
    for mode in ("forward", "backward"):
        for head_dim in HEAD_DIMS:
            for seqlen in SEQLENS:
                yield DTYPES[device][0], "packed", sized(device, seqlen, head_dim, mode)


def _everything(device: str) -> Shapes:
    for dtype in DTYPES[device]:
        for mode in MODES:
            for bias in (False, True):
                for layout in LAYOUTS:
                    for head_dim in HEAD_DIMS:
                        for seqlen in SEQLENS:
                            yield dtype, layout, sized(device, seqlen, head_dim, mode, bias)


def patch_embed(device: str) -> Iterator[Work]:
    """Yield the patch-embedding suite."""
    modes = ("forward", "forward channels_last", "stem compiled", "stem", "tubelet", "backward", "forward + backward")
    for index, dtype in enumerate(DTYPES[device]):
        for mode in modes:
            for number, sizes in enumerate(PATCHES[device]):
                shape = PatchShape(*sizes, mode)
                if mode == "tubelet":
                    shape = replace(shape, batch=max(1, shape.batch // 8))
                # The compiled stem takes seconds to compile per shape, most of a minute on a CPU.
                slow = mode == "stem compiled" and device == "cpu"
                telling = mode == "forward" and (index == 0 or device == "cpu")
                telling |= mode == "forward + backward" and index == 0 and device == "cpu"
                tier = (0 if telling else 1) + 2 * slow
                if number >= (8 if mode == "forward" or telling else 2):
                    tier = 3
                yield Work(f"patch_embed {mode}", shape.case, dtype, tier, "patch_embed", shape)


def models(device: str) -> Iterator[Work]:
    """Yield whole models: inference in each mode, and a training step."""
    dtype = DTYPES[device][0]
    for number, (name, vit) in enumerate(MODELS):
        for batch in MODEL_BATCHES[device]:
            for mode in ("eager", "compiled", "graphed"):
                if mode == "graphed" and device == "cpu":
                    continue
                shape = ModelShape(name, vit, batch, mode)
                telling = mode == ("eager" if device == "cpu" else "compiled") and batch in MODEL_BATCHES[device][:2]
                tier = (0 if name in TELLING_MODELS[device] and telling else 1 if telling else 2) + 2 * (
                    mode != "eager" and device == "cpu"
                )
                if device == "cpu" and vit.image > 224:
                    tier = 3
                yield Work(f"model inference, {mode}", shape.case, dtype, min(tier, 3), "models", shape)
        for mode in ("eager", "compiled", "graphed"):
            if mode == "graphed" and device == "cpu":
                continue
            batch = 64 if device == "cuda" else 4
            shape = ModelShape(name, vit, batch, mode, training=True)
            tier = (1 if number == 0 and mode == "eager" else 2) + (mode != "eager" and device == "cpu")
            yield Work(f"model training step, {mode}", shape.case, dtype, tier, "models", shape)


OVERHEADS = ("eager call", "eager call, backward", "import", "first call")


def overhead(device: str) -> Iterator[Work]:
    """Yield what is paid before any arithmetic: a tiny eager call, the import, the first call of a process."""
    for index, what in enumerate(OVERHEADS):
        # Processes that load a CUDA context each, dozens of them, come when all else is done.
        tier = 3 if device == "cuda" and what in OVERHEADS[2:] else int(index > 0)
        # In a dtype that every backend of the device takes: the CUDA kernels have no float32.
        yield Work(f"overhead {what}", "B1 H1 N16 D64", DTYPES[device][0], tier, "overhead", what)


SUITES = {"attention": attention, "patch_embed": patch_embed, "models": models, "overhead": overhead}
# How many cases of a suite come in a turn of it.
TURNS = {"attention": 3}
# Where a peer is timed that compiles for each shape: seconds for each on a GPU.
COSTLY = (
    "attention forward B256 H12 N197 D64", "attention forward B4 H16 N577 D64", "attention forward B16 H16 N1025 D64",
    "attention forward, bias B2048 H12 N49 D32", "attention backward B256 H12 N197 D64",
    "attention backward B16 H16 N1025 D64",
)  # fmt: skip
# Two cases of each op, for a look and for CI.
QUICK = {
    "cpu": ("B1 H12 N197 D64", "B64 H3 N49 D32", "B1 224² P16 D768"),
    "cuda": ("B256 H12 N197 D64", "B2048 H12 N49 D32", "B256 224² P16 D768", "vit_base_patch16_224 B256"),
}


def head_dim(work: Work) -> int | None:
    """Return the head_dim of the attention in a work, None where there is none."""
    if isinstance(work.details, AttentionShape):
        return work.details.head_dim
    if isinstance(work.details, ModelShape):
        # timm's ViT-H has 16 heads.
        return 80 if work.details.vit.width == 1280 else 64
    return None


def is_costly(work: Work, device: str) -> bool:
    """Return whether peers that compile for each shape are timed in a case without being asked for."""
    return work.layout == "packed" and work.dtype == DTYPES[device][0] and f"{work.suite} {work.case}" in COSTLY


def fits(work: Work, device: str) -> bool:
    """Return whether a CPU can take a case on: work per call and images per batch are bounded there."""
    if device != "cpu":
        return True
    shape = work.details
    if isinstance(shape, AttentionShape):
        return attention_flop(shape.batch, shape.heads, shape.seqlen, shape.head_dim) <= CPU_FLOP
    return getattr(shape, "batch", 1) <= CPU_IMAGES and "huge" not in getattr(shape, "name", "")


def select(
    device: str, suites: Sequence[str] = tuple(SUITES), words: str = "", last_tier: int = 3, quick: bool = False
) -> list[Work]:
    """Return the works of some suites that fit the device, tier by tier, each once.

    ``words``: only works whose label has all of these words (as pytest's -k with "and").
    """
    found: dict[tuple[str, ...], Work] = {}
    order: dict[tuple[str, ...], tuple[int, float]] = {}
    for name in suites:
        counts = [0] * (last_tier + 1)
        for work in SUITES[name](device):
            wanted = all(word.lower() in f"{work.kind} {work.label}".lower() for word in words.split())
            if work.tier <= last_tier and wanted and fits(work, device) and work.key not in found:
                found[work.key] = work
                order[work.key] = (work.tier, counts[work.tier] / TURNS.get(name, 1))
                counts[work.tier] += 1
    # Within a tier the suites take turns, so that a short run has something of each.
    works = sorted(found.values(), key=lambda work: order[work.key])
    if quick:
        works = [work for work in works if work.tier == 0 and work.case in QUICK[device]]
    return works
