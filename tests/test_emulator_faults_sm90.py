"""The emulator catches faults planted in the attention kernel for sm_90a, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted import Site, names, pattern, run_with_faults

SOURCE = Path(__file__).parent / "emulator_faults_sm90.cpp"
# One worker of pytest-xdist builds the program once.
pytestmark = pytest.mark.xdist_group("emulator_faults_sm90")

EARLY = r"shared memory read by wgmma while a tensor load is on its way to it"
UNREACHED = r"a barrier that not all threads reach: .* at mbarrier_wait at byte \d+ in phase \d+, which lacks .*"
UNSEEN = r"shared memory read by wgmma, and warp \d+ has not waited for the mbarrier of the tensor load that wrote it"
OVERWRITTEN = r"race: tensor load to memory that warp \d+ read, with no mbarrier between"
NOT_THERE = r"mbarrier at byte \d+ is used with no barrier between this and its mbarrier_init"

SITES = [
    Site(
        "mbarrier_wait(empty, ring.parity() ^ 1);",
        "if (!$2) mbarrier_wait(empty, ring.parity() ^ !$1);",
        {
            "an empty barrier's wrong phase": UNREACHED,
            "no wait for an empty barrier": r"more arrivals at the mbarrier at byte \d+ than its count, in one phase",
        },
    ),
    Site(
        "mbarrier_arrive_expect(full, Form::kTileBytes);",
        "mbarrier_arrive_expect(full, $1 ? 0 : Form::kTileBytes + ($2 ? 128 : 0) - ($3 ? 128 : 0));",
        {
            "no bytes announced": EARLY,
            "bytes announced that never come": UNREACHED,
            "bytes that were not announced": r"more bytes come to the mbarrier at byte \d+ than were announced",
        },
    ),
    Site(
        "mbarrier_wait(layout.key_full(place.index()), place.parity());\n        attend_sm90",
        "if (!$1) mbarrier_wait(layout.key_full(place.index()), place.parity());\n        attend_sm90",
        {"no wait for K": EARLY},
    ),
    Site(
        "[&] { mbarrier_wait(layout.value_full",
        "[&] { if (!$1) mbarrier_wait(layout.value_full",
        {"no wait for V": UNSEEN},
    ),
    Site(
        "  product_wait<0>();\n  pin(second.score);\n  scores_done();",
        "  if ($1) scores_done();\n  if (!$2) product_wait<0>();\n  if (!$1) scores_done();",
        {
            "K given back before its products are done": OVERWRITTEN,
            "scores read before their products are done": r"tensor load to memory that a wgmma under way reads",
        },
    ),
    Site(
        "        release(layout.key_empty(place.index()));\n        mbarrier_wait",
        "        if (!$1) release(layout.key_empty(place.index()));\n        mbarrier_wait",
        {"a consumer without a tile that keeps K": UNREACHED},
    ),
    Site(
        "  pin(second.score);\n  product_fence();",
        "  if (!$1) product_fence();",
        {"products without a fence": r"wgmma without product_fence since the last wait"},
    ),
    Site(
        "  barrier();\n  const int warpgroup",
        "  if (!$1) barrier();\n  const int warpgroup",
        {"barriers used before they are there": NOT_THERE},
    ),
    Site(
        "    mbarrier_init_fence();\n",
        "    if (!$1) mbarrier_init_fence();\n",
        {"barriers that the copy engine does not see": r"tensor load to an mbarrier without mbarrier_init_fence"},
    ),
    Site(
        "mbarrier_init(layout.key_empty(stage), kConsumers * kWarps);",
        "mbarrier_init(layout.key_empty(stage), $1 ? kConsumers : kConsumers * kWarps);",
        {"a barrier of the wrong count": UNREACHED},
    ),
    Site(
        "key = (shared_memory() + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;",
        "key = shared_memory() + ($1 ? 128 : 0);",
        {"a swizzle that begins elsewhere": r"tensor load to a panel that does not begin at a multiple of 1024 bytes"},
    ),
    Site(
        "offset = k % kPanelColumns * kElementBytes;",
        "offset = k % kPanelColumns * kElementBytes * ($1 ? 8 : 1);",
        {"steps through a row as if it were a panel": r"shared memory read by wgmma before a tensor load wrote it"},
    ),
    Site(
        "kPanelRowBytes, Form::kPanelBytes),",
        "kPanelRowBytes, $1 ? 1024 : Form::kPanelBytes),",
        {"the next panel of V at the wrong distance": "wrong"},
    ),
    Site("    if (keys >= kKeys) return;", "    if ($1 || keys >= kKeys) return;", {"keys that do not exist": "wrong"}),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_with_faults(tmp_path_factory.mktemp("faults"), SOURCE, SITES)


def test_without_a_fault_nothing_is_found(found: dict[str, str]) -> None:
    assert found[""] == "nothing"


@pytest.mark.parametrize("name", names(SITES))
def test_a_planted_fault_is_found(name: str, found: dict[str, str]) -> None:
    assert pattern(SITES, name).fullmatch(found[name]), found[name]
