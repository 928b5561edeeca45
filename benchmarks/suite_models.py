"""Whole timm models, as they are and swapped: inference and a training step, eager, compiled and as a CUDA graph."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastvit
from benchmarks import formulas, gates
from benchmarks.cases import ModelShape, Work
from benchmarks.formulas import VitShape
from benchmarks.harness import Contest
from benchmarks.roofline import installed
from benchmarks.timers import Call, Entry, first_line
from fastvit.testing import compare


def peer(mode: str) -> str:
    """Return what the unswapped model is called in a row of this mode."""
    return "timm" if mode == "eager" else f"timm {mode}"


def contest(work: Work, device: str, backends: Sequence[str], costly: bool = False) -> Contest:
    """Return the contest of one model in one mode, like against like: swapped and not, both compiled, and so on."""
    shape: ModelShape = work.details
    try:
        model = create(shape.name, shape.vit, shape.training, work.dtype, device)
    except ImportError as error:
        return Contest(work.suite, work.case, work.dtype, (), (), {}, absent={"timm": first_line(error)})
    rules, absent = gate(model, shape, work.dtype, device, backends)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    factor = 3.0 if shape.training else 1.0

    def entry(name: str, backend: str | None, version: str) -> Entry:
        # "eager" is timed as the host launches it, and "compiled" too: a graph would hide what the mode is about.
        return Entry(
            name,
            lambda: _build(model, shape, work.dtype, device, backend),
            version,
            graph=shape.mode == "graphed",
            follows_itself=True,
        )

    return Contest(
        work.suite,
        work.case,
        work.dtype,
        tuple(entry(name, name, "") for name in rules),
        (entry(peer(shape.mode), None, f"timm {installed('timm')}, torch {torch.__version__}"),),
        rules,
        flop=factor * formulas.vit_flop(shape.vit, shape.batch),
        moved=factor * formulas.vit_bytes(shape.vit, shape.batch, work.dtype.itemsize, parameters),
        items=shape.batch,
        absent=absent,
    )


# Batches and modes of one model follow one another; drawing the weights of a large one takes many seconds.
@functools.lru_cache(maxsize=1)
def create(name: str, vit: VitShape, training: bool, dtype: torch.dtype, device: str) -> nn.Module:
    """Return the timm model with random weights, its head drawn too: zeros would hide every error."""
    import timm

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": vit.image, "patch_size": vit.patch, "num_classes": vit.classes}
    # timm has no name for every size, patch and resolution together: any name of this width takes both as options.
    base = name.replace("patch14_518", "patch16_224")
    for suffix in ("384", "224"):
        name = base if timm.is_model(base) else f"{base.rsplit('_', 1)[0]}_{suffix}"
        if timm.is_model(name):
            with torch.device(device):
                model = timm.create_model(name, **sizes)
            break
    else:
        raise ImportError(f"this timm has no {name}")
    nn.init.normal_(model.get_parameter("head.weight"), std=0.02)
    return model.to(device, dtype).train(training)


def gate(
    model: nn.Module, shape: ModelShape, dtype: torch.dtype, device: str, backends: Sequence[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """Apply the rule to the logits, and for training to the gradients of the first block's projection and the patches.

    PyTorch's own error is the largest of its attention paths (see tests/test_swap.py: in a chain of a dozen layers a
    single run's error is a draw of luck).
    """
    images = _images(gates.model_batch(shape, gates.Judge.of(device)), shape, dtype, device)
    exact = _run(copy.deepcopy(model).double(), images.double(), shape.training)
    runs = [_run(model, images, shape.training)]
    with sdpa_kernel(SDPBackend.MATH):
        runs.append(_run(model, images, shape.training))
    with _written_out(model):
        runs.append(_run(model, images, shape.training))
    own = [max(run, key=lambda t: (t[0].double() - t[1]).abs().max().item())[0] for run in
           ([(r[i], truth) for r in runs] for i, truth in enumerate(exact))]  # fmt: skip
    rules, absent = {}, {}
    for backend in backends:
        swapped = copy.deepcopy(model)
        try:
            if not fastvit.swap(swapped, backend=backend).swapped:
                raise RuntimeError("nothing in this model was swapped")
            results = _run(swapped, images, shape.training)
            rules[backend] = max(compare(*three).ratio for three in zip(results, exact, own, strict=True))
        except Exception as error:
            # Triton's own errors are no RuntimeErrors; whatever it is costs this backend alone.
            absent[backend] = first_line(error)
    return rules, absent


def _run(model: nn.Module, images: Tensor, training: bool) -> list[Tensor]:
    if not training:
        with torch.inference_mode():
            return [model(images)]
    watched: list[Any] = [
        model.get_parameter("blocks.0.attn.qkv.weight"),
        model.get_parameter("patch_embed.proj.weight"),
    ]
    output = model(images)
    loss = F.cross_entropy(output.to(output.dtype), _labels(images))
    return [output.detach(), *torch.autograd.grad(loss, watched)]


def _labels(images: Tensor) -> Tensor:
    return torch.arange(images.shape[0], device=images.device) % 1000


@contextmanager
def _written_out(model: nn.Module) -> Iterator[None]:
    """Have timm's attention take its own operations instead of SDPA."""
    attentions = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for attention in attentions:
        setattr(attention, "fused_attn", False)  # noqa: B010 - nn.Module types an attribute as a tensor or module.
    try:
        yield
    finally:
        for attention in attentions:
            setattr(attention, "fused_attn", True)  # noqa: B010


def _images(batch: int, shape: ModelShape, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(batch, 3, shape.vit.image, shape.vit.image, generator=generator, device=device).to(dtype)


def _build(model: nn.Module, shape: ModelShape, dtype: torch.dtype, device: str, backend: str | None) -> Call:
    own = copy.deepcopy(model)
    if backend is not None:
        fastvit.swap(own, backend=backend)
    images = _images(shape.batch, shape, dtype, device)
    call: Callable[..., Any] = torch.compile(own, dynamic=False) if shape.mode == "compiled" else own
    if not shape.training:
        return torch.inference_mode()(lambda: call(images))
    # Of a graph the optimizer's number of steps has to be on the device.
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-5, fused=True, capturable=shape.mode == "graphed")
    labels = _labels(images)

    def step() -> None:
        loss = F.cross_entropy(call(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
