"""The emulator catches faults planted in the kernels for sm_80, one at a time, each in words of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted import Site, names, pattern, run_with_faults

SOURCE = Path(__file__).parent / "emulator_faults.cpp"
# One worker of pytest-xdist builds the program once.
pytestmark = pytest.mark.xdist_group("emulator_faults")

EARLY = r"shared memory read while a cp.async is on its way to it"
UNWRITTEN = r"shared memory read before it is written"
READ_RACE = r"race: shared memory at byte \d+ is read, and thread \d+ wrote it with no barrier between"
WRITE_RACE = (
    r"race: shared memory at byte \d+ is written, and (thread \d+|another thread) read it with no barrier between"
)
UNREACHED = r"a barrier that not all threads reach: some have ended"
BEYOND_READ = r"global memory out of bounds: read of \d+ bytes, at byte: .*"
BEYOND_WRITE = r"global memory out of bounds: write of \d+ bytes, at byte: .*"

FORWARD = [
    Site(
        "      cp_async_wait<1>();\n      barrier();\n      const uint32_t key_tile",
        "      if (!$1) cp_async_wait<1>();\n      if (!$2) barrier();\n      const uint32_t key_tile",
        {"streaming: a wait forgotten": EARLY, "streaming: no barrier after the wait": READ_RACE},
    ),
    Site(
        "      barrier();\n    }\n    finish<",
        "      if (!$1) barrier();\n    }\n    finish<",
        {"streaming: no barrier before a stage is filled again": WRITE_RACE},
    ),
    Site(
        "      cp_async_wait<1>();\n    } else {",
        "      if (!$1) cp_async_wait<1>();\n    } else {",
        {"resident: a wait forgotten": EARLY},
    ),
    Site(
        "      cp_async_wait<0>();\n    }\n    barrier();",
        "      if ($1) cp_async_wait<1>();\n      if (!$1) cp_async_wait<0>();\n    }\n    if (!$2) barrier();",
        {"resident: a wait for too little": EARLY, "resident: no barrier after the wait": UNWRITTEN},
    ),
    Site(
        "    barrier();\n    if (p.stages == 2) stage ^= 1;",
        "    if (!$1 && !($2 && warp == 0 && item + grid_blocks() >= p.items)) barrier();\n"
        "    if (p.stages == 2) stage ^= 1;",
        {"resident: no barrier before the next head": EARLY, "resident: a barrier that one warp skips": UNREACHED},
    ),
    Site(
        "  warp_barrier();\n  store_tile<",
        "  if (!$1) warp_barrier();\n  store_tile<",
        {"no barrier of the warp": READ_RACE},
    ),
    Site("row < rows && column < columns", "row < rows + $1 && column < columns", {"a row too many": BEYOND_READ}),
    Site(
        "key_tile, tile_row + 8 * j, lane", "key_tile, tile_row + 8 * (j + $1), lane", {"the next eight keys": "wrong"}
    ),
    Site(
        "if (!target.has(first + row, chunk * kChunkElements)) continue;",
        "if (!$1 && !target.has(first + row, chunk * kChunkElements)) continue;",
        {"rows of the output not guarded": BEYOND_WRITE},
    ),
    Site(
        "left[1] = pack<T>(first[2], first[3]);\n  left[2] =",
        "left[$1 ? 2 : 1] = pack<T>(first[2], first[3]);\n  left[$1 ? 1 : 2] =",
        {"a wrong map of the left operand": "wrong"},
    ),
    Site(
        "    ldmatrix<4, true>(b, Tile<kDim>::advance(at, c));",
        "    if ($1) ldmatrix<4, false>(b, Tile<kDim>::advance(at, c));\n"
        "    if (!$1) ldmatrix<4, true>(b, Tile<kDim>::advance(at, c));",
        {"a transpose forgotten": "wrong"},
    ),
    Site(
        "cp_async<16>(Tile<kDim>::address(begin, row, chunk),",
        "cp_async<16>(Tile<kDim>::address(begin, row, chunk) + ($1 ? 8 : 0),",
        {"a copy to half a chunk further": r"misaligned shared memory access: 16 bytes"},
    ),
    Site(
        "state.output[m][c][2 * half] *= rescale;",
        "if (!$1) state.output[m][c][2 * half] *= rescale;",
        {"a rescale forgotten": "wrong"},
    ),
    Site(
        "chunk ^ (row / (8 / kPermuted)",
        "chunk ^ (($1 ? 0 : row / (8 / kPermuted))",
        {"chunks not permuted": "bank conflicts"},
    ),
]
BACKWARD = [
    Site(
        "    cp_async_wait<0>();\n    barrier();\n",
        "    if (!$1) cp_async_wait<0>();\n    if (!$2) barrier();\n",
        {"backward, resident: a wait forgotten": EARLY, "backward, resident: no barrier after the wait": READ_RACE},
    ),
    Site(
        "    barrier();\n#pragma unroll 1\n    for (int own = warp * kRowTile; own < rows_k;",
        "    if (!$1) barrier();\n#pragma unroll 1\n    for (int own = warp * kRowTile; own < rows_k;",
        {"backward, resident: no barrier between the sides": UNWRITTEN},
    ),
    Site(
        "      finish<T>(state, own, p, at);\n    }\n    barrier();\n  }\n",
        "      finish<T>(state, own, p, at);\n    }\n    if (!$1) barrier();\n  }\n",
        {"backward, resident: no barrier before the next head": WRITE_RACE},
    ),
    Site(
        "          store_shared<float>(row + sizeof(float), state.delta[half]);",
        "          if (!$1) store_shared<float>(row + sizeof(float), state.delta[half]);",
        {"backward, resident: delta not left for the key side": UNWRITTEN},
    ),
    Site(
        "  cp_async_wait<1>();\n  barrier();\n  BackwardState",
        "  if (!$1) cp_async_wait<1>();\n  if (!$2) barrier();\n  BackwardState",
        {
            "backward, streaming: own rows not waited for": EARLY,
            "backward, streaming: no barrier after own rows": READ_RACE,
        },
    ),
    Site(
        "      cp_async_wait<1>();\n      barrier();\n      const uint32_t tile =",
        "      if (!$1) cp_async_wait<1>();\n      if (!$2) barrier();\n      const uint32_t tile =",
        {"backward, streaming: a stage not waited for": EARLY, "backward, streaming: no barrier after the wait": EARLY},
    ),
    Site(
        "      }\n      barrier();\n    }\n    if constexpr (!kKeySide)",
        "      }\n      if (!$1) barrier();\n    }\n    if constexpr (!kKeySide)",
        {"backward, streaming: no barrier before a stage is filled again": WRITE_RACE},
    ),
    Site(
        "load_stage(streamed + kRows, stage ^ 1);",
        "load_stage(streamed + kRows, stage ^ !$1);",
        {"backward, streaming: the other stage": r"shared memory written while a cp.async is on its way to it"},
    ),
    Site(
        "tile + kTileBytes + row * kRowBytes,\n",
        "tile + kTileBytes + (row + $1) * kRowBytes,\n",
        {"backward, streaming: a row further": EARLY},
    ),
    Site(
        "tile + 2 * kTileBytes + row * kStatisticsBytes,",
        "tile + 2 * kTileBytes + (row + 2 * $1) * kStatisticsBytes,",
        {"backward, streaming: the statistics of the rows after next": EARLY},
    ),
    Site(
        "const bool valid = streamed + i < p.padded_q;",
        "const bool valid = $1 || streamed + i < p.padded_q;",
        {"backward, streaming: statistics read without end": BEYOND_READ},
    ),
    Site(
        "if (lane % 4 != 0 || row >= p.padded_q) continue;",
        "if (lane % 4 != 0 || (!$1 && row >= p.padded_q)) continue;",
        {"backward, streaming: statistics written without end": BEYOND_WRITE},
    ),
    Site(
        "if (8 * j + 2 * (lane % 4) + i % 2 >= rows) scores[j][0][i] = grads",
        "if (!$1 && 8 * j + 2 * (lane % 4) + i % 2 >= rows) scores[j][0][i] = grads",
        {"backward: rows beyond the sequence not guarded": "wrong"},
    ),
    Site(
        "load_shared<Chunk>(statistics + row * kStatisticsBytes)",
        "load_shared<Chunk>(statistics + (row + $1) * kStatisticsBytes)",
        {"backward: the statistics of the next row": r"misaligned shared memory access: 16 bytes"},
    ),
    Site(
        "p.is_causal ? own : 0;",
        "p.is_causal ? own + ($1 ? 16 : 0) : 0;",
        {"backward, causal: the first queries left out": "wrong"},
    ),
    Site(
        "chunk.word[step == 1 ? 2 * k : k]",
        "chunk.word[step == 1 + $1 ? 2 * k : k]",
        {"backward: a wrong map of the transpose": "wrong"},
    ),
    Site(
        "if (target.has(row, column)) store_global<Chunk>",
        "if ($1 || target.has(row, column)) store_global<Chunk>",
        {"backward: rows of the gradients not guarded": BEYOND_WRITE},
    ),
    Site("lane / 8 == lane % 4", "(lane / 8 ^ $1) == lane % 4", {"backward: beside the diagonal of dO Oᵀ": "wrong"}),
]
PATCH_EMBED = [
    Site(
        "  barrier();\n  const int rows = p.num_tokens - tile.row;\n  Result<Block> result;\n"
        "  result.template accumulate<T, false, false>",
        "  if (!$1) barrier();\n  const int rows = p.num_tokens - tile.row;\n  Result<Block> result;\n"
        "  result.template accumulate<T, false, false>",
        {"forward: no barrier after the places": UNWRITTEN},
    ),
    Site(
        "p, first_token, kStages * kSlice);\n  barrier();",
        "p, first_token, kStages * kSlice);\n  if (!$1) barrier();",
        {"weight: no barrier after the places": UNWRITTEN},
    ),
    Site(
        "        cp_async_wait<kStages - 2>();\n",
        "        if ($1) cp_async_wait<kStages - 1>();\n        if (!$1) cp_async_wait<kStages - 2>();\n",
        {"a wait for a slice too little": EARLY},
    ),
    Site(
        "whose stage is the next to be filled.\n        barrier();",
        "whose stage is the next to be filled.\n        if (!$1) barrier();",
        {"no barrier after the wait": UNWRITTEN},
    ),
    Site(
        "(stage, stage + Block::kLeftBytes);\n    }\n    barrier();",
        "(stage, stage + Block::kLeftBytes);\n    }\n    if (!$1) barrier();",
        {"no barrier before the result takes the stages": WRITE_RACE},
    ),
    Site(
        "    barrier();\n    store_view<",
        "    if (!$1) barrier();\n    store_view<",
        {"no barrier after the result": WRITE_RACE},
    ),
    Site(
        "has_column = first_column + walk.column < view.columns();",
        "has_column = $1 || first_column + walk.column < view.columns();",
        {"columns not guarded": BEYOND_READ},
    ),
    Site(
        "const bool valid = has_column && row < view.rows;",
        "const bool valid = has_column && ($1 || row < view.rows);",
        {"rows not guarded": BEYOND_READ},
    ),
    Site(
        "if (first_column + walk.column >= view.columns()) return;",
        "if (!$1 && first_column + walk.column >= view.columns()) return;",
        {"columns of the result not guarded": BEYOND_WRITE},
    ),
    Site(
        "if (row >= view.rows) break;",
        "if (!$1 && row >= view.rows) break;",
        {"rows of the result not guarded": "wrong"},
    ),
    Site(
        "if (row >= rows || column >= columns) return;",
        "if ((!$1 && row >= rows) || column >= columns) return;",
        {"weight: rows of the partial sums not guarded": BEYOND_WRITE},
    ),
    Site(
        "    barrier();\n    const int column = thread_index();",
        "    if (!$1) barrier();\n    const int column = thread_index();",
        {"bias: no barrier between the sums": READ_RACE},
    ),
    Site("i < kGroups; ++i) sum +=", "i < kGroups - $1; ++i) sum +=", {"bias: a group too few": "wrong"}),
    Site(
        "far = int(lane / 16 * 8);",
        "far = int(($1 ? lane / 8 % 2 : lane / 16) * 8);",
        {"a wrong map of the fragments": "wrong"},
    ),
    Site(
        "          ldmatrix<4, true>(b, Tile<Block::kColumns>::address(right, k, near, (column + 8 * n + far) / 8));",
        "          const uint32_t at = Tile<Block::kColumns>::address(right, k, near, (column + 8 * n + far) / 8);\n"
        "          if ($1) ldmatrix<4, false>(b, at);\n          if (!$1) ldmatrix<4, true>(b, at);",
        {"images: a transpose forgotten": "wrong"},
    ),
    Site(
        "(uint64_t(1) << shift) + uint64_t(d) - 1)",
        "(uint64_t(1) << shift) + ($1 ? 0 : uint64_t(d) - 1))",
        {"a divisor's multiplier rounded down": "wrong"},
    ),
    Site("* multiplier >> shift)", "* multiplier >> (shift + $1))", {"a divisor's shift too far": "wrong"}),
    Site(
        "store_places(places + next % kStages * kSlice",
        "store_places(places + (next + $1) % kStages * kSlice",
        {"weight: places to the wrong part of their ring": "wrong"},
    ),
    Site(
        "slice = places + i % kStages",
        "slice = places + (i + $1) % kStages",
        {"weight: places from the wrong part of their ring": READ_RACE},
    ),
    Site("if (next >= kStages) {", "if (next >= kStages + $1) {", {"weight: places written a slice late": "wrong"}),
    Site(
        "for (int i = 0; i < p.splits; ++i) sum += load_global<float>(p.bias",
        "for (int i = 0; i < p.splits - $1; ++i) sum += load_global<float>(p.bias",
        {"bias: a split too few": "wrong"},
    ),
]
SITES = [*FORWARD, *BACKWARD, *PATCH_EMBED]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    first = 1 + len(names([*FORWARD, *BACKWARD]))
    options = ("-DFASTVIT_CUDA_HEAD_DIMS=64", f"-DFIRST_PATCH_EMBED={first}")
    return run_with_faults(tmp_path_factory.mktemp("faults"), SOURCE, SITES, *options)


def test_without_a_fault_nothing_is_found(found: dict[str, str]) -> None:
    assert found[""] == "nothing"


@pytest.mark.parametrize("name", names(SITES))
def test_a_planted_fault_is_found(name: str, found: dict[str, str]) -> None:
    assert pattern(SITES, name).fullmatch(found[name]), found[name]
