"""``fastvit check``: the tolerance rule over the shapes of real vision transformers, for each backend of a machine."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastvit.commands import (
    DTYPES,
    BadInputError,
    check_device,
    check_json_path,
    make_console,
    make_table,
    short,
    write_json,
)
from fastvit.commands.env import devices, environment, why_nothing_runs
from fastvit.kernels.spec import AttentionSpec, PatchEmbedSpec, Spec
from fastvit.ops.backends import BACKENDS, explain
from fastvit.testing import (
    AttentionCase,
    Comparison,
    PatchEmbedCase,
    check_attention,
    check_patch_embed,
    vit_attention_cases,
    vit_patch_embed_cases,
)

Case = AttentionCase | PatchEmbedCase

QUICK_SEQLENS = (1, 49, 50, 77, 197)


@dataclass(frozen=True)
class Row:
    """One case on one backend: its worst tensor. ``verdict`` is "pass", "MISS", "ERROR" or "skipped"."""

    op: str
    backend: str
    device: str
    shape: str
    dtype: str
    tensor: str
    error: float | None
    torch_error: float | None
    ratio: float | None
    verdict: str
    reason: str


def run(arguments: argparse.Namespace) -> int:
    """Apply the rule, print a line per case, and return 1 if anything missed it."""
    check_json_path(arguments.json)
    where = [check_device(arguments.device)] if arguments.device else devices()[:2]
    dtypes = [DTYPES[arguments.dtype]] if arguments.dtype else list(DTYPES.values())
    pairs, not_run = _who_runs(arguments.backend, where, dtypes)
    cases = _cases(dtypes, arguments.quick)
    console = make_console(arguments.json)
    started = time.perf_counter()
    rows = list(_progress(console, _run_all(pairs, cases), total=len(pairs) * len(cases)))
    seconds = time.perf_counter() - started

    for name, device in pairs:
        console.print(_table([row for row in rows if (row.backend, row.device) == (name, str(device))], name, device))
    if not_run:
        table = make_table("Not run", "backend", "device", "why")
        for line in not_run:
            table.add_row(line["backend"], line["device"], line["why"])
        console.print(table)
    summary = _summary(rows)
    console.print(_sentence(summary, seconds))
    figures = {
        **environment(),
        "command": "check",
        "summary": {**summary, "seconds": seconds},
        "rows": [asdict(row) for row in rows],
        "not_run": not_run,
    }
    write_json(figures, arguments.json)
    return 0 if summary["passed"] else 1


def _who_runs(
    asked: str | None, where: list[torch.device], dtypes: list[torch.dtype]
) -> tuple[list[tuple[str, torch.device]], list[dict[str, str]]]:
    pairs, not_run = [], []
    for device in where:
        for name in [asked] if asked else BACKENDS:
            reasons = why_nothing_runs(name, device, dtypes)
            if not asked and not reasons and name == "triton" and device.type == "cpu":
                reasons = ["on a CPU it runs under Triton's interpreter, very slowly: ask with --backend triton"]
            if reasons:
                not_run.append({"backend": name, "device": str(device), "why": "; ".join(reasons)})
            else:
                pairs.append((name, device))
    if not pairs:
        why = "; ".join(f"on {line['device']}: {line['why']}" for line in not_run)
        can = {name for device in where for name in BACKENDS if not why_nothing_runs(name, device, dtypes)}
        accepted = f"accepted on {', '.join(map(str, where))}: {', '.join(n for n in BACKENDS if n in can) or 'none'}"
        raise BadInputError(f"--backend: got {asked!r}, which cannot run here ({why}); {accepted}")
    return pairs, not_run


def _cases(dtypes: list[torch.dtype], quick: bool) -> list[Case]:
    attention, patch_embed = vit_attention_cases(dtypes), vit_patch_embed_cases(dtypes)
    if quick:
        attention = [case for case in attention if case.seqlen_q in QUICK_SEQLENS]
        patch_embed = [case for case in patch_embed if case.embed_dim <= 192 and case.grid[0] <= 16]
    return [*attention, *patch_embed]


def _run_all(pairs: list[tuple[str, torch.device]], cases: list[Case]) -> Iterator[Row]:
    for name, device in pairs:
        for case in cases:
            yield _run_one(case, name, device)


def _run_one(case: Case, backend: str, device: torch.device) -> Row:
    op = "attention" if isinstance(case, AttentionCase) else "patch_embed"
    known = {"op": op, "backend": backend, "device": str(device), "shape": _shape(case), "dtype": short(case.dtype)}

    def unmeasured(verdict: str, reason: str) -> Row:
        return Row(**known, tensor="", error=None, torch_error=None, ratio=None, verdict=verdict, reason=reason)

    if reasons := next(line.reasons for line in explain(_spec(case, device)) if line.backend == backend):
        return unmeasured("skipped", "; ".join(reasons))
    try:
        if isinstance(case, AttentionCase):
            comparisons = check_attention(case, backend, device)
        else:
            comparisons = check_patch_embed(case, backend, device)
    except Exception as error:  # A kernel that does not compile or launch belongs in the report, beside the others.
        return unmeasured("ERROR", f"{type(error).__name__}: {' '.join(str(error).split())}")
    worst: Comparison = max(comparisons, key=lambda comparison: comparison.ratio)
    return Row(
        **known,
        tensor=worst.name,
        error=worst.error,
        torch_error=worst.torch_error,
        ratio=worst.ratio,
        verdict="pass" if all(comparison.passed for comparison in comparisons) else "MISS",
        reason="" if worst.passed else f"at {list(worst.worst_index)}: {worst.actual!r}, not {worst.expected!r}",
    )


def _spec(case: Case, device: torch.device) -> Spec:
    if isinstance(case, AttentionCase):
        bias_dtype = {None: None, "bool": torch.bool, "additive": case.dtype, "float32": torch.float32}[case.bias]
        sizes = (case.batch, case.num_heads, case.seqlen_q, case.seqlen_k, case.head_dim, case.head_dim_v)
        return AttentionSpec(*sizes, case.dtype, bias_dtype, case.is_causal, device)
    height, width = (size + 2 * margin for size, margin in zip(case.image_size, case.padding, strict=True))
    patch = (case.batch, case.in_channels, height, width, *case.patch, case.embed_dim)
    return PatchEmbedSpec(*patch, case.dtype, device, case.stride)


def _shape(case: Case) -> str:
    if isinstance(case, PatchEmbedCase):
        (rows, columns), (height, width) = case.image_size, case.patch
        image = f"B{case.batch} C{case.in_channels} {rows}×{columns}"
        steps = f"/{case.stride[0]}×{case.stride[1]}" if case.stride else ""
        return f"{image} p{height}×{width}{steps} D{case.embed_dim} {case.layout}"
    lengths = f"N{case.seqlen_q}" if case.seqlen_q == case.seqlen_k else f"Nq{case.seqlen_q} Nk{case.seqlen_k}"
    features = [f"{case.bias} bias"] if case.bias else []
    features += ["causal"] if case.is_causal else []
    return " ".join([f"B{case.batch} H{case.num_heads} {lengths} d{case.head_dim}", *features])


def _progress(console: Any, rows: Iterator[Row], total: int) -> Iterator[Row]:
    from rich.progress import track

    return iter(track(rows, "checking", total=total, console=console, transient=True, disable=not console.is_terminal))


def _table(rows: list[Row], name: str, device: torch.device) -> Any:
    table = make_table(
        f"Backend {name} on {device}: the worst tensor of each case; error ≤ 2 × PyTorch's + one rounding is ratio ≤ 1",
        "op", "shape", "dtype", "tensor", "error", "PyTorch's", "ratio", "rule",
        numbers=("error", "PyTorch's", "ratio"),
    )  # fmt: skip
    for row in rows:
        measured = row.ratio is not None
        figures = (f"{row.error:.2e}", f"{row.torch_error:.2e}", f"{row.ratio:.2f}") if measured else ("-", "-", "-")
        verdict = row.verdict + (f": {row.reason}" if row.reason else "")
        style = {"pass": None, "skipped": "dim"}.get(row.verdict, "bold red")
        table.add_row(row.op, row.shape, row.dtype, row.tensor, *figures, verdict, style=style)
    return table


def _summary(rows: list[Row]) -> dict[str, Any]:
    verdicts = [row.verdict for row in rows]
    measured = [row for row in rows if row.ratio is not None]
    return {
        "cases": len(measured) + verdicts.count("ERROR"),
        "missed": verdicts.count("MISS"),
        "errors": verdicts.count("ERROR"),
        "skipped": verdicts.count("skipped"),
        "worst_ratio": max((row.ratio or 0.0 for row in measured), default=None),
        "passed": bool(measured) and not verdicts.count("MISS") and not verdicts.count("ERROR"),
    }


def _sentence(summary: dict[str, Any], seconds: float) -> str:
    parts = [f"{summary['cases']} cases"]
    parts += [f"{summary[name]} {name}" for name in ("missed", "errors", "skipped") if summary[name]]
    if summary["worst_ratio"] is not None:
        parts.append(f"worst ratio {summary['worst_ratio']:.2f} of what is allowed")
    return f"{', '.join(parts)}: {'pass' if summary['passed'] else 'MISS'} ({seconds:.0f} s)"
