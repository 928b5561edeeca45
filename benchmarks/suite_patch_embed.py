"""Patch embedding: contests against Conv2d and its substitutes, alone, as a whole stem, and as tubelets of a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastvit
from benchmarks import formulas, gates
from benchmarks.cases import PatchShape, Work
from benchmarks.gates import FRAMES, TUBELET
from benchmarks.harness import Contest
from benchmarks.suite_attention import mode_call
from benchmarks.timers import Call, Entry, first_line
from fastvit.testing import check_patch_embed


def contest(work: Work, device: str, backends: Sequence[str], costly: bool = False) -> Contest:
    """Return the contest of one patch-embedding case; the gate has been applied to each backend."""
    shape: PatchShape = work.details
    rules, absent = gate(shape, work.dtype, device, backends)
    functions = _functions(shape.mode)
    version = f"torch {torch.__version__}"

    def entry(name: str, function: Callable[..., Tensor], peer: bool) -> Entry:
        return Entry(
            name,
            partial(_build, shape, work.dtype, device, name, function),
            version if peer else "",
            floor=name == FLOOR,
        )

    ours = [entry(name, _ours(shape.mode, name), False) for name in rules]
    flop, moved = work_of(shape, work.dtype.itemsize)
    return Contest(
        work.suite,
        work.case,
        work.dtype,
        tuple(ours),
        tuple(entry(name, function, True) for name, function in functions.items()),
        rules,
        flop,
        moved,
        items=shape.batch,
        absent=absent,
    )


def work_of(shape: PatchShape, itemsize: int) -> tuple[float, float]:
    """Return the useful FLOP and the least bytes of one call."""
    deep = TUBELET if shape.mode == "tubelet" else 1
    batch = shape.batch * (FRAMES // TUBELET if shape.mode == "tubelet" else 1)
    sizes = (batch, (shape.image // shape.patch) ** 2, shape.embed_dim, 3 * deep * shape.patch**2)
    flop, moved = formulas.patch_embed_flop(*sizes), formulas.patch_embed_bytes(*sizes, itemsize)
    if shape.mode == "forward + backward":
        return 2 * flop, moved + formulas.patch_embed_backward_bytes(*sizes, itemsize)
    if shape.mode == "backward":
        return flop, formulas.patch_embed_backward_bytes(*sizes, itemsize)
    return flop, formulas.stem_bytes(*sizes, itemsize) if shape.mode.startswith("stem") else moved


def gate(
    shape: PatchShape, dtype: torch.dtype, device: str, backends: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return each backend's worst error as a part of what is allowed, and why another cannot run the case."""
    layout = "nhwc" if shape.mode == FORWARD_CHANNELS_LAST else "nchw"
    case = gates.patch_embed(shape, dtype, layout, gates.Judge.of(device))
    rules, absent = {}, {}
    for backend in backends:
        try:
            results = check_patch_embed(case, backend, device, backward="backward" in shape.mode)
            rules[backend] = max(result.ratio for result in results)
        except Exception as error:
            # Triton's own errors are no RuntimeErrors; whatever it is costs this backend alone.
            absent[backend] = first_line(error)
    return rules, absent


def _build(shape: PatchShape, dtype: torch.dtype, device: str, name: str, function: Callable[..., Tensor]) -> Call:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).to(dtype)

    side, patch, dim, backward = shape.image, shape.patch, shape.embed_dim, "backward" in shape.mode
    frames = (FRAMES,) if shape.mode == "tubelet" else ()
    depth = (TUBELET,) if shape.mode == "tubelet" else ()
    images = normal(shape.batch, 3, *frames, side, side)
    weight = normal(dim, 3, *depth, patch, patch) * (3 * patch**2) ** -0.5
    bias = normal(dim)
    tokens = (side // patch) ** 2 * (FRAMES // TUBELET if frames else 1)
    extra: tuple[Tensor, ...] = ()
    if shape.mode.startswith("stem"):
        extra = (normal(1, 1, dim), normal(1, tokens + 1, dim))
    grad = normal(shape.batch, tokens, dim) if backward else normal(1)
    leaves = [weight.requires_grad_(backward), bias.requires_grad_(backward)]
    if name == CHANNELS_LAST or shape.mode == FORWARD_CHANNELS_LAST:
        images = images.contiguous(memory_format=torch.channels_last)
        # As a model in channels_last has its weight, converted once.
        weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_(backward)
        leaves[0] = weight
    if name == FLOOR:
        images = F.unfold(images, patch, stride=patch).transpose(1, 2).contiguous()
    mode = shape.mode if backward else "forward"
    return mode_call(partial(function, images, weight, bias, *extra), leaves, grad, mode)


CHANNELS_LAST, FLOOR = "Conv2d channels_last", "Linear on ready patches"
# Images and weight in channels_last on both sides.
FORWARD_CHANNELS_LAST = "forward channels_last"


def _conv(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    # Not made contiguous, as in timm: ours is contiguous, and what Conv2d leaves to the next layer counts in "stem".
    return F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def _unfold(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    patch = weight.shape[2]
    return F.linear(F.unfold(images, patch, stride=patch).transpose(1, 2), weight.flatten(1), bias)


def _ready(patches: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(patches, weight.flatten(1), bias)


def _with_prefix(tokens: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    return torch.cat((class_token.expand(tokens.shape[0], -1, -1), tokens), dim=1) + positions


def _conv_stem(images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    return _with_prefix(_conv(images, weight, bias), class_token, positions)


def _conv3d(videos: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv3d(videos, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)


def _as_images(videos: Tensor) -> Tensor:
    """Return [B · T/2, 3 · 2, H, W]: a tubelet is a patch of an image with the channels of its frames (a copy)."""
    return videos.unflatten(2, (-1, TUBELET)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def _unfold_tubelets(videos: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _unfold(_as_images(videos), weight.flatten(1, 2), bias).unflatten(0, (videos.shape[0], -1)).flatten(1, 2)


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # The runner forgets compiled code before each contest: a function with many shapes is given up after eight.
    return torch.compile(function, dynamic=False)


def _functions(mode: str) -> dict[str, Callable[..., Tensor]]:
    """Return the peers of a mode."""
    if mode == FORWARD_CHANNELS_LAST:
        return {"Conv2d": _conv}
    if mode == "tubelet":
        return {"Conv3d": _conv3d, "unfold + Linear": _unfold_tubelets}
    if mode == "stem":
        return {"Conv2d stem": _conv_stem}
    if mode == "stem compiled":
        return {"Conv2d stem compiled": _compiled(_conv_stem), "Conv2d stem": _conv_stem}
    return {"Conv2d": _conv, "unfold + Linear": _unfold, CHANNELS_LAST: _conv, FLOOR: _ready}


def _our_stem(
    images: Tensor, weight: Tensor, bias: Tensor, class_token: Tensor, positions: Tensor, backend: str
) -> Tensor:
    return _with_prefix(fastvit.patch_embed(images, weight, bias, backend=backend), class_token, positions)


def _our_tubelets(videos: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    tokens = fastvit.patch_embed(_as_images(videos), weight.flatten(1, 2), bias, backend=backend)
    return tokens.unflatten(0, (videos.shape[0], -1)).flatten(1, 2)


def _ours(mode: str, backend: str) -> Callable[..., Tensor]:
    function = _OURS[mode]

    def call(*tensors: Tensor) -> Tensor:
        return function(*tensors, backend=backend)

    return _compiled(call) if mode == "stem compiled" else call


_OURS: dict[str, Callable[..., Tensor]] = {
    "forward": fastvit.patch_embed,
    FORWARD_CHANNELS_LAST: fastvit.patch_embed,
    "backward": fastvit.patch_embed,
    "forward + backward": fastvit.patch_embed,
    "stem": _our_stem,
    "stem compiled": _our_stem,
    "tubelet": _our_tubelets,
}
