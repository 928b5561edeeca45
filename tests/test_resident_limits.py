"""The longest sequences that attention's resident forms take, for each head dim and shared memory of a block."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from fastvit.testing import AttentionCase, check_attention
from tests.emulated import A100, H100, RTX, emulator, needs_emulator
from tests.kernel_cases import KernelCase, families

__all__ = ["emulator"]
pytestmark = needs_emulator
SHARED_BYTES = (RTX, A100, H100)
# Forward holds K and V of a head and the tiles of queries that its warps work on; backward Q, K, V, dO and statistics.
LAST_FORWARD = {
    32: (672, 1168, 1712),
    64: (304, 544, 800),
    72: (272, 480, 672),
    80: (240, 400, 640),
    88: (240, 416, 592),
    96: (208, 368, 544),
    104: (192, 336, 480),
    128: (144, 272, 400),
}
LAST_BACKWARD = {
    32: (384, 624, 880),
    64: (192, 320, 432),
    72: (160, 272, 384),
    80: (144, 256, 352),
    88: (128, 224, 320),
    96: (128, 208, 288),
    104: (112, 192, 272),
    128: (96, 160, 224),
}


def case_of(seqlen: int, head_dim: int) -> AttentionCase:
    return AttentionCase(1, 1, seqlen, seqlen, head_dim, head_dim, torch.float16)


def form(emulator: ModuleType, seqlen: int, head_dim: int, shared_bytes: int, direction: str) -> str:
    """Ask the launcher, without running anything; one multiprocessor, so that only the length decides."""
    emulator.configure(multiprocessors=1, shared_bytes=shared_bytes, only_notes=True)
    emulator.reset_statistics()
    KernelCase(case_of(seqlen, head_dim), frozenset(), backward=direction == "backward").run()
    assert max(launch[3] for launch in emulator.launches()) <= shared_bytes
    names = {name for name in families(emulator.launches()) if direction in name}
    assert len(names) == 1
    return names.pop().rsplit("_", 1)[1]


@pytest.mark.parametrize("head_dim", LAST_FORWARD)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_last_resident_length(direction: str, head_dim: int, emulator: ModuleType) -> None:
    limits = {"forward": LAST_FORWARD, "backward": LAST_BACKWARD}[direction][head_dim]
    for shared_bytes, last in zip(SHARED_BYTES, limits, strict=True):
        assert form(emulator, last, head_dim, shared_bytes, direction) == "resident", shared_bytes
        assert form(emulator, last + 1, head_dim, shared_bytes, direction) == "streaming", shared_bytes


@pytest.mark.parametrize("head_dim", LAST_FORWARD)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_results_on_both_sides_of_the_limit(
    direction: str, head_dim: int, hold: Callable, emulator: ModuleType
) -> None:
    last = {"forward": LAST_FORWARD, "backward": LAST_BACKWARD}[direction][head_dim][0]
    for seqlen in (last, last + 1):
        emulator.configure(multiprocessors=1, shared_bytes=RTX)
        case = case_of(seqlen, head_dim)
        backward = direction == "backward"
        hold(f"resident limits, {direction}", check_attention(case, "cuda", backward=backward, written_out=True), case)
