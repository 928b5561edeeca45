"""``fastvit env``: what is installed, what was built, and for each backend what it can do here and why not."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastvit.commands import check_json_path, make_console, make_table, short, write_json
from fastvit.kernels import cuda, native
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec, Spec
from fastvit.ops.backends import BACKENDS, MEASURED_ORDER, Explanation, automatic_order, device_family, explain
from fastvit.ops.patch_embed import patch_embed
from fastvit.version import __version__

LIBRARIES = ("torch", "triton", "numpy", "timm", "transformers", "safetensors", "rich", "pillow", "matplotlib")
VARIABLES = ("FASTVIT_", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_CUDA_ARCH_LIST")


def run(arguments: argparse.Namespace) -> int:
    """Print the environment, and write it as JSON if asked."""
    check_json_path(arguments.json)
    console = make_console(arguments.json)
    figures = {**environment(), "backends": [_explained(device) for device in devices()]}
    if "scratch per thread" in figures["built"]:
        # Measured by a call, which only this command makes: the others have the environment in their JSON.
        figures["built"]["scratch per thread"] += f"; {_patch_scratch()}"

    table = make_table("Environment", "what", "value")
    for name, value in figures["versions"].items():
        table.add_row(name, value or "not installed")
    for name, value in figures["machine"].items():
        table.add_row(name, str(value))
    for name, value in figures["built"].items():
        table.add_row(f"fastvit._C: {name}" if name != "fastvit._C" else name, str(value))
    console.print(table)
    for backends in figures["backends"]:
        console.print(_backend_table(backends))
    write_json(figures, arguments.json)
    return 0


def environment() -> dict[str, Any]:
    """Return versions, machine and build, for the JSON of every command."""
    return {
        "versions": {"fastvit": __version__, "python": platform.python_version()}
        | {library: _version(library) for library in LIBRARIES},
        "machine": _machine(),
        "built": _built(),
    }


def devices() -> list[torch.device]:
    """Return the devices of this machine: the CPU, then every GPU."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def standard_specs(device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Spec]:
    """Return the call that each op is asked about: ViT-B/16 at 224×224, float32 on a CPU and bfloat16 on a GPU."""
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    return {
        "attention": AttentionSpec(1, 12, 197, 197, 64, 64, dtype, None, False, device),
        "patch_embed": PatchEmbedSpec(1, 3, 224, 224, 16, 16, 768, dtype, device),
    }


def why_nothing_runs(backend: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> list[str]:
    """Return why a backend runs no typical call in any of the dtypes on a device; empty if it runs them in one."""
    by_dtype = [
        [why for spec in standard_specs(device, dtype).values() for why in BACKENDS[backend].why_not(spec)]
        for dtype in dtypes
    ]
    if not all(by_dtype):
        return []
    return list(dict.fromkeys(why for reasons in by_dtype for why in reasons))


def explanation_row(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON figures."""
    return {
        "backend": explanation.backend,
        "can_run": not explanation.reasons,
        "why_not": list(explanation.reasons),
        "automatic": explanation.automatic,
        "evidence": explanation.evidence,
    }


def cpu_name() -> str:
    """Return the processor's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.platform(),
        "python executable": sys.executable,
        "cpu": cpu_name(),
        "logical cpus": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "torch's cuda / hip": f"{torch.version.cuda or 'none'} / {torch.version.hip or 'none'}",
        "float32 matmul precision": torch.get_float32_matmul_precision(),
    }
    for device in devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        machine[str(device)] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    if len(devices()) == 1:
        machine["cuda devices"] = "none: torch finds no GPU"
    else:
        machine["driver"] = _driver()
    given = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    machine["variables"] = " ".join(f"{name}={value}" for name, value in sorted(given.items())) or "none that matter"
    return machine


def _driver() -> str:
    from torch.utils import collect_env

    return collect_env.get_nvidia_driver_version(collect_env.run) or "unknown"


def _built() -> dict[str, Any]:
    if error := native.load_error():
        return {"fastvit._C": f"not usable: {error}"}
    _C = import_module("fastvit._C")  # noqa: N806 - its name, and a compiled module has no types to import.

    sets = [f"{name} ({_C.cpu_capability_why_not(name) or 'runs here'})" for name, _ in _C.cpu_capabilities()]
    return {
        "fastvit._C": "loaded",
        "compiler": _C.compiler(),
        "instruction set": _C.cpu_capability(),
        "instruction sets built": ", ".join(sets),
        "scratch per thread": _scratch(_C.attention_scratch(197, 197, 64, 64)),
        "cuda architectures": _C.cuda_architectures() or "none: built without CUDA",
        "cuda kernels": f"{len(cuda.built_kernels())} instantiations, by nvcc {_C.cuda_compiler() or '(none)'}",
    }


def _scratch(figures: list[int]) -> str:
    forward, backward, *_ = (size / 2**10 for size in figures)
    return f"{forward:.0f} KiB forward, {backward:.0f} KiB backward (attention, N = 197, D = 64, float32; linear in N)"


def patch_embed_scratch(batch: int = 1, embed_dim: int = 768, patch: int = 16, side: int = 224) -> tuple[int, int]:
    """Return the bytes of scratch that a thread of the CPU kernels holds after forward, and after backward too.

    Its sums and operands are of one task, so they depend on the patch and on ``embed_dim`` up to the size of a task,
    not on the number of images or patches. Measured, by a call in float32 in a thread of its own.
    """
    _C = import_module("fastvit._C")  # noqa: N806

    def call() -> tuple[int, int]:
        shapes = ((batch, 3, side, side), (embed_dim, 3, patch, patch), (embed_dim,))
        leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        tokens = patch_embed(*leaves, backend="cpu")
        forward = _C.held_scratch()
        torch.autograd.grad(tokens.sum(), leaves)
        return forward, _C.held_scratch()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def _patch_scratch() -> str:
    forward, both = (size / 2**10 for size in patch_embed_scratch())
    return f"{forward:.0f} KiB forward, {both:.0f} KiB with backward (patch embedding, P = 16, D = 768, float32)"


def _explained(device: torch.device) -> dict[str, Any]:
    specs = standard_specs(device)
    dtype = specs["attention"].dtype
    return {
        "device": str(device),
        "dtype": short(dtype),
        "family": device_family(device),
        "automatic_order": [asdict(place) for place in automatic_order(device.type)],
        "measured_order": [
            {"op": where.op, "shapes": where.shapes, "places": [asdict(place) for place in places]}
            for where, places in MEASURED_ORDER.items()
            if where.family == device_family(device)
        ],
        "ops": {name: [explanation_row(line) for line in explain(spec)] for name, spec in specs.items()},
    }


def _backend_table(backends: dict[str, Any]) -> Any:
    table = make_table(
        f"Backends on {backends['device']} (ViT-B/16 at 224×224, {backends['dtype']})",
        "backend", "what it is", "op", "here", "automatic order and evidence",
    )  # fmt: skip
    places = [place["backend"] for place in backends["automatic_order"]]
    for name, backend in BACKENDS.items():
        answers = {op: next(line for line in lines if line["backend"] == name) for op, lines in backends["ops"].items()}
        evidence = next(iter(answers.values()))["evidence"]
        order = f"{places.index(name) + 1}: {evidence}" if name in places else f"only by name: {evidence}"
        said = {op: _answer(row) for op, row in answers.items()}
        if len(set(said.values())) == 1:
            said = {"both": next(iter(said.values()))}
        for index, (op, answer) in enumerate(said.items()):
            shown = (name, backend.description) if index == 0 else ("", "")
            table.add_row(*shown, op, answer, order if index == 0 else "")
    for measured in backends["measured_order"]:
        said_places = (f"{place['backend']} ({place['evidence']})" for place in measured["places"])
        table.add_row(
            backends["family"], "measured", measured["op"], f"{measured['shapes']} shapes", ", then ".join(said_places)
        )
    return table


def _answer(row: dict[str, Any]) -> str:
    if not row["can_run"]:
        return f"cannot: {'; '.join(row['why_not'])}"
    return "can, and is chosen automatically" if row["automatic"] else "can"
