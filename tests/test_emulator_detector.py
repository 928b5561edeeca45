"""What the emulator says of kernels of a few lines that each do one thing wrong, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted import ROOT, compile_program, run

# One worker of pytest-xdist builds the program once.
pytestmark = pytest.mark.xdist_group("emulator_detector")
FIFTH = "(thread 5 of block 0 of 1, 64 threads)"
# In the order of emulator_detector.cpp.
SAID = {
    "nothing wrong": "nothing",
    "shared memory read before it is written": f"shared memory read before it is written at byte 8 {FIFTH}",
    "shared memory misaligned": f"misaligned shared memory access: 4 bytes at byte 2 {FIFTH}",
    "global memory misaligned": f"misaligned global memory access of 8 bytes {FIFTH}",
    "shared memory beyond the end": f"shared memory out of bounds: 4 bytes at byte 64 of 64 {FIFTH}",
    "shared memory before the begin": f"shared memory out of bounds: 2 bytes at byte -2 of 64 {FIFTH}",
    "global memory read beyond the end": (
        f"global memory out of bounds: read of 4 bytes, at byte: given 32 of 32, written -32 of 32 {FIFTH}"
    ),
    "global memory written before the begin": (
        f"global memory out of bounds: write of 4 bytes, at byte: given 60 of 32, written -4 of 32 {FIFTH}"
    ),
    "an input written": f"global memory written that is an input: given {FIFTH}",
    "a barrier for one warp of two": (
        "a barrier that not all threads reach: this thread has ended, others wait "
        "(thread 32 of block 0 of 1, 64 threads)"
    ),
    "a lane that is missing": f"a thread has ended while others of its warp wait for it {FIFTH}",
    "lanes at different instructions": (
        "shuffle_xor: another thread of the warp waits at warp_barrier (thread 1 of block 0 of 1, 64 threads)"
    ),
    "another warp's write, read too early": f"shared memory read before it is written at byte 4 {FIFTH}",
    "two writes to the same place": (
        "race: shared memory at byte 0 is written, and thread 0 wrote it with no barrier between "
        "(thread 16 of block 0 of 1, 64 threads)"
    ),
    "a copy that nobody has waited for": f"shared memory read while a cp.async is on its way to it at byte 16 {FIFTH}",
    "a write under a copy": f"shared memory written while a cp.async is on its way to it at byte 16 {FIFTH}",
    "a copy of nothing, misaligned": f"misaligned source of an asynchronous copy of 16 bytes {FIFTH}",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    source = Path(__file__).parent / "emulator_detector.cpp"
    program = compile_program(tmp_path_factory.mktemp("detector"), source, ROOT / "csrc")
    return dict(zip(SAID, run(program), strict=True))


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(name: str, said: dict[str, str]) -> None:
    assert said[name] == SAID[name]
