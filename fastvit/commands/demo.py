"""``fastvit demo``: a photograph through a timm model before and after the swap: same result, and how fast."""

from __future__ import annotations

import argparse
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvit.ops as ops
from fastvit.commands import (
    DTYPES,
    BadInputError,
    check_device,
    check_json_path,
    make_console,
    make_table,
    need,
    short,
    write_json,
)
from fastvit.commands.env import cpu_name, environment, explanation_row, standard_specs
from fastvit.commands.pictures import draw_attention, draw_times
from fastvit.commands.subject import Subject, check_backend, prepare, receive
from fastvit.commands.timing import Clock, Race, race, ratio_text
from fastvit.ops.backends import Explanation, explain
from fastvit.testing import Comparison, compare

MODEL_SECONDS, LAYER_SECONDS = 12.0, 2.5
NEEDED = {"timm": "timm", "safetensors": "safetensors", "PIL": "pillow", "matplotlib": "matplotlib",
          "skimage": "scikit-image"}  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the demo, print what came out, and return 1 if the tolerance rule was missed."""
    need("demo", "models,viz", NEEDED)
    check_json_path(arguments.json)
    device = check_device(arguments.device)
    dtype = DTYPES[arguments.dtype]
    check_backend(arguments.backend, standard_specs(device, dtype))
    threads = torch.get_num_threads()
    try:
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        with torch.no_grad(), warnings.catch_warnings():
            # Which backend ran, and why, stands in a table of its own.
            warnings.filterwarnings("ignore", message="fastvit runs its plain-torch reference")
            return _run(arguments, device, dtype)
    finally:
        torch.set_num_threads(threads)


def _run(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> int:
    subject = prepare(arguments, device, dtype)
    out = _make_folder(arguments.out)
    console = make_console(arguments.json)
    _print_subject(console, subject)
    receive(subject)
    check_backend(subject.backend, subject.specs)
    comparisons = _errors(subject)
    console.print(_error_table(comparisons))
    del subject.exact
    clock = Clock()
    races = _races(subject, arguments.repeats)
    crowd = _company(device, clock.processors_busy_elsewhere()) or _neighbours(races)
    subject.crowded, subject.notes = bool(crowd), subject.notes + crowd
    console.print(_time_table(races))
    console.print(_backend_table(subject))
    pictures = _draw(subject, races, out)
    for note in subject.notes:
        console.print(f"note: {note}")
    for picture in pictures.values():
        if picture:
            console.print(f"picture: {picture}")
    passed = all(comparison.passed for comparison in comparisons)
    if not passed:
        console.print("MISS: an error is larger than the tolerance rule allows", style="bold red")
    write_json(_figures(arguments, subject, comparisons, races, pictures), arguments.json)
    return 0 if passed else 1


def _company(device: torch.device, others: float) -> list[str]:
    """Return a note if other processes left too few processors: the threads then wait for each other at every layer."""
    processors = os.cpu_count() or 1
    if device.type != "cpu" or others + torch.get_num_threads() <= processors + 0.25:
        return []
    return [
        f"other processes kept {others:.1f} of {processors} processors busy meanwhile, so the times say little: try "
        "again when the machine is idle, or with fewer --threads"
    ]


def _neighbours(races: list[Race]) -> list[str]:
    """Return a note if the processor was slow in between: others' work on the same cores, which nobody else shows."""
    names = [race.name for race in races if race.disturbed]
    if not names:
        return []
    return [
        f"the processor was much slower than at its best in most rounds of: {', '.join(names)}. On a virtual machine "
        "others use the same cores unseen, else it may be hot: the times say little, try again"
    ]


def _make_folder(path: str) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = error.strerror
        raise BadInputError(f"--out: got {path!r}, which cannot be made ({cause}); accepted is a folder") from None
    return Path(path)


def _core_torch(qkv: Tensor) -> Tensor:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def _core_fastvit(qkv: Tensor, backend: str | None) -> Tensor:
    output = ops.attention_qkvpacked(qkv, backend=backend)
    assert isinstance(output, Tensor)
    return output.flatten(2)


def _errors(subject: Subject) -> list[Comparison]:
    images = subject.images
    what = "logits" if getattr(subject.original, "num_classes", 0) else "features (the model has no head)"
    comparisons = [compare(subject.swapped(images), subject.exact(images.double()), subject.original(images), what)]
    if subject.qkv is not None:
        ours = _core_fastvit(subject.qkv, subject.backend)
        comparisons.append(
            compare(ours, _core_torch(subject.qkv.double()), _core_torch(subject.qkv), "attention core, last layer")
        )
    if subject.patch_embed is not None:
        results = (
            model.get_submodule(subject.patch_embed)(images.double() if model is subject.exact else images)
            for model in (subject.swapped, subject.exact, subject.original)
        )
        # Some return the size of the grid beside the tokens.
        ours, exact, own = (result[0] if isinstance(result, tuple) else result for result in results)
        comparisons.append(compare(ours, exact, own, "patch embedding"))
    return comparisons


def _races(subject: Subject, rounds: int | None) -> list[Race]:
    original, swapped, device = subject.original, subject.swapped, subject.images.device

    def add(name: str, pytorch: Any, fastvit: Any, budget: float = LAYER_SECONDS) -> None:
        races.append(race(name, pytorch, fastvit, device, budget, rounds))

    def layers(name: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, Any]:
        (args, kwargs), both = call, (original.get_submodule(name), swapped.get_submodule(name))
        return lambda: both[0](*args, **kwargs), lambda: both[1](*args, **kwargs)

    races: list[Race] = []
    add("whole model", lambda: original(subject.images), lambda: swapped(subject.images), MODEL_SECONDS)
    if subject.attention is not None:
        add("attention layer (with projections)", *layers(subject.attention, subject.attention_call))
    if (qkv := subject.qkv) is not None:
        backend = subject.backend
        add("attention core (no projections)", lambda: _core_torch(qkv), lambda: _core_fastvit(qkv, backend))
    if subject.patch_embed is not None:
        add("patch embedding", *layers(subject.patch_embed, subject.patch_call))
    return races


def _attention_map(subject: Subject) -> tuple[Tensor, str] | None:
    """Return the last layer's attention of one query over the patches, [H, rows, columns], times N, and whose it is.

    One row of softmax(scale Q Kᵀ) is exp(scale q Kᵀ − LSE), with the LSE that the fused op returns: no N×N matrix.
    """
    if subject.attention is None:
        subject.notes.append("no picture of the attention: the swap found no attention layer of timm's")
        return None
    layer = subject.swapped.get_submodule(subject.attention)
    (_, *others), named = subject.attention_call
    # A mask, a rotation, whatever the layer is given beside its tokens; and what some keep to add to the scores.
    given = [value for value in (*others, *named.values()) if value is not None and value is not False]
    if subject.qkv is None or given or getattr(layer, "relative_position_bias_table", None) is not None:
        subject.notes.append("no picture of the attention: the layer does more with query and key than is drawn here")
        return None
    query, key, value = subject.qkv[:1].permute(2, 0, 3, 1, 4).unbind(0)
    query, key = (getattr(layer, name, nn.Identity())(tensor) for name, tensor in (("q_norm", query), ("k_norm", key)))
    prefix, seqlen = getattr(subject.original, "num_prefix_tokens", 0), key.shape[2]
    grid = getattr(getattr(subject.original, "patch_embed", None), "grid_size", None)
    if not grid or grid[0] * grid[1] != seqlen - prefix:
        subject.notes.append(f"no picture of the attention: its {seqlen} tokens are not the grid of patches")
        return None
    if getattr(subject.original, "cls_token", None) is not None:
        row, whose = query[:, :, :1], "CLS token"
    else:
        row, whose = query[:, :, prefix:].mean(dim=2, keepdim=True), "mean query (there is no CLS token)"
    result = ops.attention(row, key, value, return_lse=True, backend=subject.backend)
    scores = row.shape[-1] ** -0.5 * (row.float() @ key.float().transpose(-2, -1))  # [1, H, 1, N]
    weights = torch.exp(scores - result[1].unsqueeze(-1))[0, :, 0]  # [H, N]
    return (weights[:, prefix:] * seqlen).unflatten(-1, tuple(grid)).cpu(), whose


def _draw(subject: Subject, races: list[Race], out: Path) -> dict[str, str | None]:
    pictures: dict[str, str | None] = {"attention": None, "times": str(out / "times.png")}
    is_random = subject.weights.startswith("random")
    title = f"{subject.name}, {'random weights' if is_random else 'weights of the checkpoint'}"
    # One that an earlier run left would be taken for this run's.
    (out / "attention.png").unlink(missing_ok=True)
    if mapped := _attention_map(subject):
        weights, whose = mapped
        pictures["attention"] = str(out / "attention.png")
        says = "untrained: the pattern means nothing, it shows that the machinery works" if is_random else ""
        subtitle = f"attention of the {whose} in the last layer" + (f"; {says}" if says else "")
        draw_attention(out / "attention.png", subject.photograph, weights.numpy(), title, subtitle)
    images = subject.images
    batch, _, height, width = images.shape
    subtitle = f"batch {batch}, {height}×{width} pixels, {short(images.dtype)}, {_where(subject)}"
    subtitle += "; NOT IDLE: other processes ran meanwhile" if subject.crowded else ""
    draw_times(out / "times.png", races, f"{subject.name}: PyTorch and fastvit", subtitle)
    return pictures


def _where(subject: Subject) -> str:
    device = subject.images.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def _ran(subject: Subject, op: str) -> str:
    if subject.backend:
        return subject.backend
    return next((line.backend for line in explain(subject.specs[op]) if line.automatic), "none")


def _print_subject(console: Any, subject: Subject) -> None:
    images = subject.images
    console.print(f"{subject.name}, batch {images.shape[0]}, {short(images.dtype)}, on {_where(subject)}")
    console.print(f"weights: {subject.weights}", style="bold")
    if subject.weights.startswith("random"):
        console.print("An untrained model predicts nothing, so no prediction is shown; errors and times are real.")
    table = make_table("What the swap replaced", "layers", "type", "what happened", "why", numbers=())
    groups: dict[tuple[str, str, str, str], int] = {}
    for row in subject.report.rows:
        key = (re.sub(r"\b\d+\b", "*", row.name), row.original_type, row.action, row.reason)
        groups[key] = groups.get(key, 0) + 1
    for (name, *rest), count in groups.items():
        table.add_row(f"{name} ×{count}" if count > 1 else name, *rest)
    console.print()
    console.print(table)


def _error_table(comparisons: list[Comparison]) -> Any:
    table = make_table(
        "Largest error against a float64 run", "of", "PyTorch (before)", "fastvit (after)", "share of allowed", "rule",
        numbers=("PyTorch (before)", "fastvit (after)", "share of allowed"),
    )  # fmt: skip
    for one in comparisons:
        verdict = "pass" if one.passed else "MISS"
        table.add_row(one.name, f"{one.torch_error:.2e}", f"{one.error:.2e}", f"{one.ratio:.2f}", verdict)
    return table


def _time_table(races: list[Race]) -> Any:
    numbers = ("PyTorch p50", "fastvit p50", "p20–p80 ", "p20–p80", "ratio", "runs")
    table = make_table(
        "Milliseconds, taken in turn; ratio = PyTorch / fastvit, above 1 fastvit is faster",
        "of", "PyTorch p50", "p20–p80 ", "fastvit p50", "p20–p80", "ratio", "runs", numbers=numbers,
    )  # fmt: skip
    for one in races:
        cells = []
        for timing in (one.pytorch, one.fastvit):
            digits = 1 if timing.p50 >= 100 else 3
            cells += [f"{timing.p50:.{digits}f}", f"{timing.p20:.{digits}f} to {timing.p80:.{digits}f}"]
        table.add_row(one.name, *cells, ratio_text(one.ratio), str(one.pytorch.rounds))
    return table


def _backend_table(subject: Subject) -> Any:
    table = make_table("Which backend ran, and why the others did not", "ops", "backend", "ran", "why")
    rows: dict[tuple[str, str, str], list[str]] = {}
    for op, spec in subject.specs.items():
        for line in explain(spec):
            ran = "yes" if line.backend == _ran(subject, op) else "no"
            rows.setdefault((line.backend, ran, _why(subject, op, line)), []).append(op)
    for row, ops_of_row in rows.items():
        table.add_row(", ".join(ops_of_row), *row)
    return table


def _why(subject: Subject, op: str, line: Explanation) -> str:
    winner = _ran(subject, op)
    if line.backend == winner:
        return "asked for by name" if subject.backend else f"first that can in the automatic order: {line.evidence}"
    if line.reasons:
        return f"cannot: {'; '.join(line.reasons)}"
    return f"can, but {winner} was {'asked for' if subject.backend else 'chosen'}; try --backend {line.backend}"


def _figures(
    arguments: argparse.Namespace,
    subject: Subject,
    comparisons: list[Comparison],
    races: list[Race],
    pictures: dict[str, str | None],
) -> dict[str, Any]:
    images = subject.images
    return {
        **environment(),
        "command": "demo",
        "model": subject.name,
        "image": arguments.image,
        "images": list(images.shape),
        "dtype": short(images.dtype),
        "device": str(images.device),
        "where": _where(subject),
        "threads": torch.get_num_threads(),
        "weights": subject.weights,
        "swap": [vars(row) for row in subject.report.rows],
        "errors": [
            {**vars(one), "shape": list(one.shape), "dtype": short(one.dtype), "worst_index": list(one.worst_index)}
            for one in comparisons
        ],
        "times": [one.figures() for one in races],
        "backends": {
            op: {"ran": _ran(subject, op), "asked_for": subject.backend, "spec": [str(part) for part in spec],
                 "explanations": [explanation_row(line) for line in explain(spec)]}
            for op, spec in subject.specs.items()
        },
        "pictures": pictures,
        "machine_was_idle": not subject.crowded,
        "notes": subject.notes,
    }  # fmt: skip
