"""What ``fastvit demo`` looks at: a model, its swapped and its float64 copy, a photograph, what the layers receive."""

from __future__ import annotations

import argparse
import copy
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvit.commands import BadInputError
from fastvit.commands.pictures import crop, load_photograph
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec, Spec
from fastvit.ops.backends import explain
from fastvit.swap import SwapReport, swap

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 0


@dataclass
class Subject:
    """Everything about one run: the model three times, its input, and what its layers really received.

    The models are torch modules whose attributes depend on the model, hence Any.
    """

    name: str
    weights: str
    photograph: Image
    images: Tensor
    original: Any
    swapped: Any
    exact: Any
    report: SwapReport
    backend: str | None
    notes: list[str]
    crowded: bool = False
    attention: str | None = None
    patch_embed: str | None = None
    attention_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    qkv: Tensor | None = None
    patch_call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    specs: dict[str, Spec] = field(default_factory=dict)


def check_backend(name: str | None, specs: dict[str, Spec]) -> None:
    """Raise BadInputError if the backend was asked for by name and cannot run one of the calls."""
    for op, spec in specs.items():
        lines = {line.backend: line for line in explain(spec)}
        if name is not None and lines[name].reasons:
            able = ", ".join(other for other, line in lines.items() if not line.reasons)
            why = "; ".join(lines[name].reasons)
            what = f"{op} on {spec.device}"
            raise BadInputError(f"--backend: got {name!r}, which cannot run {what} ({why}); accepted: {able}")


def prepare(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Subject:
    """Return the subject that the arguments describe, nothing run yet. Raises BadInputError."""
    photograph = load_photograph(arguments.image)
    model = _build(arguments.model)
    if not isinstance(getattr(model, "pretrained_cfg", None), dict) or model.pretrained_cfg["input_size"][0] != 3:
        raise BadInputError(f"--model: got {arguments.model!r}; accepted are timm's models of images with 3 channels")
    weights = f"random (seed {SEED})"
    if arguments.checkpoint:
        _load_checkpoint(model, arguments.checkpoint, arguments.model)
        weights = f"from {arguments.checkpoint}"
    notes = _wake_head(model)
    original = model.eval().to(device, dtype)
    photograph = crop(photograph, *model.pretrained_cfg["input_size"][1:])
    images = _normalised(photograph, model.pretrained_cfg).repeat(arguments.batch, 1, 1, 1)
    images[1::2] = images[1::2].flip(-1)
    if arguments.batch > 1:
        notes.append(f"the batch is the photograph {arguments.batch} times, every second one mirrored")
    swapped, exact = copy.deepcopy(original), copy.deepcopy(original).double()
    report = swap(swapped, backend=arguments.backend)
    if not report.swapped:
        raise BadInputError(
            f"--model: got {arguments.model!r}, in which fastvit finds no layer to swap; accepted are timm models "
            "built of timm.layers.Attention or PatchEmbed, such as vit_base_patch16_224"
        )
    return Subject(
        arguments.model, weights, photograph, images.to(device, dtype), original, swapped, exact, report,
        arguments.backend, notes,
    )  # fmt: skip


def _build(name: str) -> Any:
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise BadInputError(f"--model: got {name!r}; accepted are timm's models, such as vit_base_patch16_224{hint}")
    torch.manual_seed(SEED)
    return timm.create_model(name, pretrained=False)


def _load_checkpoint(model: nn.Module, path: str, name: str) -> None:
    from timm.models import load_state_dict

    accepted = f"accepted is a .safetensors file or a timm checkpoint of {name}"
    if not Path(path).is_file():
        raise BadInputError(f"--checkpoint: got {path!r}, which is no file; {accepted}")
    try:
        given = load_state_dict(path)
        given = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    except Exception as error:  # Each reader has errors of its own for a file that it cannot read.
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInputError(f"--checkpoint: got {path!r}, which cannot be read ({cause}); {accepted}") from None
    own = model.state_dict()
    problems = [
        _some("misses", [key for key in own if key not in given]),
        _some("has besides", [key for key in given if key not in own]),
        _some("has in another shape", [
            f"{key} {list(given[key].shape)} for {list(value.shape)}"
            for key, value in own.items() if key in given and given[key].shape != value.shape
        ]),
    ]  # fmt: skip
    if problems := [problem for problem in problems if problem]:
        raise BadInputError(f"--checkpoint: got {path!r}, which does not fit: it {'; it '.join(problems)}; {accepted}")
    model.load_state_dict(given)


def _some(verb: str, keys: list[str]) -> str:
    shown = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{verb} {len(keys)} ({shown})" if keys else ""


def _wake_head(model: Any) -> list[str]:
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    if not isinstance(head, nn.Linear) or head.weight.abs().max() > 0:
        return []
    generator = torch.Generator().manual_seed(SEED)
    nn.init.normal_(head.weight, std=head.in_features**-0.5, generator=generator)
    return ["the head's weights were all zero, so every logit was; they were drawn anew to have something to compare"]


def _normalised(photograph: Image, config: dict[str, Any]) -> Tensor:
    import numpy as np

    pixels = torch.from_numpy(np.array(photograph)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return ((pixels - mean) / std).unsqueeze(0)


def receive(subject: Subject) -> None:
    """Run the original once and keep what the last attention layer and the patch embedding are really called with."""
    _name_layers(subject)
    calls: dict[str, Any] = {}
    hooks = []

    def keep(key: str) -> Any:
        return lambda module, args, kwargs: calls.__setitem__(key, (args, kwargs))

    for key, name in (("attention", subject.attention), ("patch_embed", subject.patch_embed)):
        if name is not None:
            layer = subject.original.get_submodule(name)
            hooks.append(layer.register_forward_pre_hook(keep(key), with_kwargs=True))
    projection = getattr(subject.original.get_submodule(subject.attention), "qkv", None) if subject.attention else None
    if isinstance(projection, nn.Module):
        hooks.append(projection.register_forward_hook(lambda module, args, output: calls.__setitem__("qkv", output)))
    subject.original(subject.images)
    for hook in hooks:
        hook.remove()
    if subject.attention is not None:
        layer = subject.original.get_submodule(subject.attention)
        subject.attention_call = calls["attention"]
        if "qkv" in calls:
            subject.qkv = calls["qkv"].unflatten(-1, (3, layer.num_heads, -1))
            subject.specs["attention"] = _attention_spec(subject.qkv)
        else:
            # Some read the weights of their projection, or have three.
            subject.notes.append(
                "the attention core has no row of its own: the layer does not call a packed projection"
            )
    if subject.patch_embed is not None:
        subject.patch_call = calls["patch_embed"]
        layer = subject.original.get_submodule(subject.patch_embed)
        subject.specs["patch_embed"] = _patch_embed_spec(subject.patch_call[0][0], getattr(layer, "proj", layer))


def _patch_embed_spec(images: Tensor, convolution: Any) -> PatchEmbedSpec:
    batch, channels, height, width = images.shape
    embed_dim, _, *patch = convolution.weight.shape
    stride = None if convolution.stride == convolution.kernel_size else convolution.stride
    if stride is not None:
        height, width = height + 2 * convolution.padding[0], width + 2 * convolution.padding[1]
    sizes = (batch, channels, height, width, patch[0], patch[1], embed_dim)
    return PatchEmbedSpec(*sizes, images.dtype, images.device, stride)


def _attention_spec(qkv: Tensor) -> AttentionSpec:
    batch, seqlen, _, heads, dim = qkv.shape
    return AttentionSpec(batch, heads, seqlen, seqlen, dim, dim, qkv.dtype, None, False, qkv.device)


def _name_layers(subject: Subject) -> None:
    for row in subject.report.swapped:
        name = "" if row.name == "(root)" else row.name
        layer = subject.swapped.get_submodule(name)
        if layer.fastvit_kind == "attention" and hasattr(layer, "qkv"):
            subject.attention = name
        elif layer.fastvit_kind == "patch embedding" and subject.patch_embed is None:
            subject.patch_embed = name
