"""Both forms of the CUDA attention forward, side by side on a Hopper GPU: ``python -m benchmarks.cuda_forms``.

First the tolerance rule, in each form, at every length for which the form for sm_90a has code of its own; then times,
taken as in the suites. A form that misses the rule is not timed, and makes the exit status 1; a kernel that hangs
has to be stopped from outside (``timeout 600``). Without a GPU of compute capability 9.0 it says so and exits 3.

What it decides is ``kPrefersSm90`` in csrc/cuda/attention_forward.cuh.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch

import fastvit
from benchmarks.formulas import attention_flop
from benchmarks.peers import PEERS
from benchmarks.timers import Entry, quantiles
from benchmarks.timers import measure as take_times
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, check_attention

FORMS = ("automatic", "sm90")
SEQLENS = (1, 49, 64, 65, 197, 200, 257, 264, 400, 577, 1025, 1370, 4096)
REPEATS = 30
# (batch, heads, seqlen, head_dim): about as many multiply-adds in each.
SHAPES = (
    (256, 12, 197, 64), (256, 12, 257, 64), (64, 12, 577, 64), (2048, 12, 50, 64), (16, 16, 1025, 64), (1, 12, 197, 64),
    (64, 16, 257, 128), (16, 25, 1025, 128),
)  # fmt: skip


def cases() -> Iterator[AttentionCase]:
    """Yield what both forms are judged by."""
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (64, 128):
            for seqlen in SEQLENS:
                # Short ones in more heads than there are multiprocessors, so that a block has several.
                batch, heads = (8, 20) if seqlen < 300 else (1, 2)
                yield AttentionCase(batch, heads, seqlen, seqlen, head_dim, head_dim, dtype)


def misses(form: str) -> list[str]:
    """Apply the rule to a form on the device; return a line for each tensor that misses it and each call that fails."""
    found = []
    for case in cases():
        try:
            results = check_attention(case, "cuda", "cuda", backward=False)
            torch.cuda.synchronize()
            found += [f"{form}: {case}: {result}" for result in results if not result.passed]
        except RuntimeError as error:
            return [*found, f"{form}: {case}: {str(error).splitlines()[0]}"]
    return found


def measure(forms: list[str]) -> None:
    """Print the microseconds and TFLOP/s of each form and of SDPA's backends, bfloat16, on packed projections."""
    for batch, heads, seqlen, dim in SHAPES:
        packed = torch.randn(batch, seqlen, 3, heads, dim, dtype=torch.bfloat16, device="cuda")
        entries = []
        for form in forms:

            def ours(form: str = form, packed: torch.Tensor = packed) -> torch.Tensor:
                # The form is chosen when the graph is captured.
                with cuda.form(form):
                    return fastvit.attention_qkvpacked(packed, backend="cuda").transpose(1, 2)

            entries.append(Entry(form, lambda ours=ours: ours))  # type: ignore[misc]
        for peer in PEERS["cuda"][:3]:
            views = packed.permute(2, 0, 3, 1, 4).unbind(0)
            entries.append(Entry(peer.name, lambda peer=peer, views=views: partial(peer.load(), *views, None)))  # type: ignore[misc]
        found, absent = take_times(entries, REPEATS, "cuda")
        for name, reason in absent.items():
            print(f"{name}: {reason}")
        times = {name: quantiles(value.samples)[1] for name, value in found.items()}
        flop = attention_flop(batch, heads, seqlen, dim)
        line = ", ".join(f"{name} {t * 1e6:.1f} µs ({flop / t / 1e12:.0f})" for name, t in times.items())
        print(f"B{batch} H{heads} N{seqlen} D{dim} (TFLOP/s): {line}", flush=True)


def main() -> int:
    """Check, then time, both forms."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("this needs a GPU of compute capability 9.0")
        return 3
    found = {}
    for form in FORMS:
        with cuda.form(form), torch.no_grad():
            found[form] = misses(form)
        print(
            f"{form} on {torch.cuda.get_device_name()}: {len(found[form])} misses", *found[form], sep="\n", flush=True
        )
    with torch.no_grad():
        measure([form for form in FORMS if not found[form]])
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
