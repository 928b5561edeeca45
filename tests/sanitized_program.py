"""Every kind of CUDA kernel in the emulator, at head dim 64: what tests/test_emulator.py runs under the sanitizers.

Prints the number of cases and the kernels without one, or the first tensor that misses the tolerance rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from fastvit import _emulator
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, Comparison, PatchEmbedCase, check_attention, check_patch_embed

DTYPES = (torch.float16, torch.bfloat16)
MASK = {"bias": "bool", "is_causal": True, "layout": "bnhd"}


def attention(dtype: torch.dtype) -> Iterator[list[Comparison]]:
    """Both forms of forward and of backward, whole tiles and partial ones."""
    for shared_bytes in (227 * 1024, 60 * 1024):
        _emulator.configure(multiprocessors=1, shared_bytes=shared_bytes)
        for seqlens, features in (
            ((50, 50), {}),
            ((197, 197), {}),
            ((70, 257), {}),
            ((40, 50), {"bias": "additive"}),
            ((130, 150), {"bias": "additive"}),
            ((70, 257), {"bias": "additive"}),
            ((50, 300), {}),
            ((77, 200), MASK),
        ):
            case = AttentionCase(1, 2, *seqlens, dtype=dtype, **features)
            yield check_attention(case, "cuda", backward=False, written_out=True)
    for multiprocessors in (3, 1000):
        _emulator.configure(multiprocessors=multiprocessors)
        for seqlens, features in (((70, 90), {}), ((90, 70), MASK), ((20, 70), {"bias": "additive"})):
            case = AttentionCase(1, 2, *seqlens, dtype=dtype, **features)
            yield check_attention(case, "cuda", written_out=True)
        # Rows that begin at odd elements.
        case = AttentionCase(1, 2, 70, 80, 33, 35, dtype, layout="bnhd")
        yield check_attention(case, "cuda", written_out=True)


def attention_sm90(dtype: torch.dtype) -> Iterator[list[Comparison]]:
    """The form for sm_90a: in one pass, and by blocks of keys that pass through a short ring."""
    _emulator.configure(multiprocessors=2)
    seqlens = {64: ((50, 50), (197, 197), (70, 257), (65, 450), (65, 577)),
               128: ((50, 50), (64, 197), (70, 257), (65, 340), (65, 577))}  # fmt: skip
    with cuda.form("sm90"):
        for head_dim, (seqlen_q, seqlen_k) in ((dim, lengths) for dim in seqlens for lengths in seqlens[dim]):
            case = AttentionCase(1, 3, seqlen_q, seqlen_k, head_dim, head_dim, dtype, layout="bnhd")
            yield check_attention(case, "cuda", backward=False, written_out=True)


def patch_embed(dtype: torch.dtype) -> Iterator[list[Comparison]]:
    """Forward and the gradients, by large tiles and by small ones; elements move by 8, 2 and 1."""
    for multiprocessors in (1, 64):
        _emulator.configure(multiprocessors=multiprocessors, shared_bytes=99 * 1024)
        for patch, layout in (((14, 14), "nhwc"), ((16, 16), "nchw"), ((5, 3), "nchw")):
            case = PatchEmbedCase(patch=patch, grid=(5, 7), embed_dim=136, layout=layout, dtype=dtype)
            yield check_patch_embed(case, "cuda")
        case = PatchEmbedCase(patch=(7, 7), grid=(6, 5), embed_dim=40, stride=(4, 4), padding=(3, 3), dtype=dtype)
        yield check_patch_embed(case, "cuda")


def main() -> None:
    """Run all of them."""
    torch.set_num_threads(1)
    cases = 0
    for dtype in DTYPES:
        for runs in (attention, attention_sm90, patch_embed):
            for results in runs(dtype):
                cases += 1
                for result in results:
                    if not result.passed:
                        raise SystemExit(f"{runs.__name__}, case {cases}: {result}")
    launched = {name for name, *_ in _emulator.launches()}
    missing = set(cuda.kernels_of(Path(_emulator.__file__))) - launched
    print(f"{cases} cases; kernels that were not run: {sorted(missing)}")


if __name__ == "__main__":
    main()
