"""The CUDA C++ attention kernel for sm_90a, run in the emulator; and the emulator, on faults planted in that kernel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastvit.ops as ops
from fastvit.kernels import cuda
from fastvit.testing import AttentionCase, Comparison, check_attention
from tests.emulated import emulator, needs_emulator
from tests.kernel_cases import DTYPES, SM90_SEQLENS, on_device, sm90_case

ROOT = Path(__file__).parent.parent
HEAD_DIMS = tuple(SM90_SEQLENS)
Hold = Callable[[str, Iterable[Comparison], object], None]


__all__ = ["emulator"]
pytestmark = needs_emulator


@pytest.fixture(autouse=True)
def sm90(emulator: ModuleType) -> Iterator[None]:
    """Every attention call of a test takes the form for sm_90a or raises."""
    ops.backends.reset_selection()
    with cuda.form("sm90"):
        yield
    ops.backends.reset_selection()


def check(case: AttentionCase) -> list[Comparison]:
    return check_attention(case, "cuda", backward=False, written_out=True)


def case_of(seqlen: int, head_dim: int, dtype: torch.dtype, **fields: object) -> AttentionCase:
    small = {"batch": 1, "num_heads": 2} if seqlen > 300 else {"batch": 2, "num_heads": 2}
    sizes = {"seqlen_q": seqlen, "seqlen_k": seqlen, "head_dim": head_dim, "head_dim_v": head_dim, "dtype": dtype}
    return AttentionCase(**{**small, **sizes, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "seqlen"), [(dim, n) for dim, lengths in SM90_SEQLENS.items() for n in lengths])
def test_the_lengths_of_vision_transformers(
    head_dim: int, seqlen: int, dtype: torch.dtype, hold: Hold, emulator: ModuleType
) -> None:
    case = sm90_case(seqlen, head_dim, dtype)
    assert isinstance(case.case, AttentionCase)
    with on_device(emulator, case):
        hold("sm90", check(case.case), case)
    assert emulator.statistics()["warpgroup_products"] > 0
    assert emulator.statistics()["matrix_products"] == 0


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 197), (197, 50), (65, 264), (64, 65), (130, 300), (50, 1025)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_attention(seqlen_q: int, seqlen_k: int, head_dim: int, dtype: torch.dtype, hold: Hold) -> None:
    case = case_of(seqlen_q, head_dim, dtype, seqlen_k=seqlen_k, layout="bhnd", batch=1)
    hold("sm90 cross", check(case), case)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_that_pass_through_a_short_ring(head_dim: int, hold: Hold, emulator: ModuleType) -> None:
    emulator.configure(shared_bytes=(140 if head_dim == 64 else 227) * 1024, multiprocessors=2)
    case = case_of(450, head_dim, torch.bfloat16, layout="bnhd")
    hold("sm90 streamed", check(case), case)


@pytest.mark.parametrize(("batch", "heads", "seqlen"), [(3, 7, 50), (1, 5, 197), (2, 3, 257)])
def test_several_heads_of_a_persistent_block(
    batch: int, heads: int, seqlen: int, hold: Hold, emulator: ModuleType
) -> None:
    emulator.configure(multiprocessors=1)
    case = case_of(seqlen, 64, torch.float16, batch=batch, num_heads=heads)
    hold("sm90 heads", check(case), case)
    assert emulator.statistics()["blocks"] == 1


def test_several_blocks_of_one_head(hold: Hold, emulator: ModuleType) -> None:
    emulator.configure(multiprocessors=4)
    case = case_of(257, 64, torch.float16, batch=1, num_heads=1)
    hold("sm90 heads", check(case), case)
    assert emulator.statistics()["blocks"] == 3  # 2, 2 and 1 of its five tiles


@pytest.mark.parametrize("layout", ["packed", "bnhd", "bhnd"])
def test_layouts(layout: str, hold: Hold) -> None:
    case = case_of(50, 64, torch.float16, num_heads=3, layout=layout)
    hold("sm90 layouts", check(case), case)


def test_what_the_form_cannot_run_raises_and_says_why(emulator: ModuleType) -> None:
    def run(query: torch.Tensor, scale: float | None = None, is_causal: bool = False) -> None:
        ops.attention(query, query, query, scale=scale, is_causal=is_causal, backend="cuda")

    good = torch.randn(1, 2, 50, 64, dtype=torch.float16)
    run(good)
    with pytest.raises(RuntimeError, match="accepted are head dims 64 and 128"):
        run(good[..., :32])
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        run(torch.randn(1, 2, 50, 72, dtype=torch.float16)[..., 4:68])
    with pytest.raises(RuntimeError, match="with no dimension expanded"):
        run(good[:, :1].expand(-1, 2, -1, -1))
    with pytest.raises(RuntimeError, match="scales > 0"):
        run(good, scale=0.0)
    with pytest.raises(RuntimeError, match="without bias, not causal"):
        run(good, is_causal=True)
    emulator.configure(compute_capability=80)
    with pytest.raises(RuntimeError, match="compute capability 80, accepted is 90"):
        run(good)
    with pytest.raises(ValueError, match="accepted are 'automatic' and 'sm90'"), cuda.form("sm100"):
        pass


def test_the_automatic_form_is_the_one_for_sm_80_until_this_one_is_measured(emulator: ModuleType) -> None:
    query = torch.randn(1, 1, 50, 64, dtype=torch.float16)
    with cuda.form("automatic"):
        ops.attention(query, query, query, backend="cuda")
    assert emulator.statistics()["tensor_loads"] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_values_that_are_not_finite(which: str, value: float) -> None:
    query, key, values = torch.randn(3, 1, 2, 197, 64, dtype=torch.float16)
    {"query": query, "key": key, "value": values}[which][0, 1, 3, 5] = value
    output, lse = ops.attention(query, key, values, return_lse=True, backend="cuda")
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), values.double())
    with cuda.form("automatic"):
        _, lse_sm80 = ops.attention(query, key, values, return_lse=True, backend="cuda")
    torch.testing.assert_close(output.double(), expected, equal_nan=True, rtol=5e-3, atol=2e-3)
    torch.testing.assert_close(lse, lse_sm80, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_every_order_of_warps_gives_the_same_bits(emulator: ModuleType) -> None:
    query, key, value = torch.randn(3, 2, 3, 257, 64, dtype=torch.bfloat16)
    results = []
    for seed in (0, 0, 1, 2, 3):
        emulator.configure(seed=seed, multiprocessors=2)
        results.append(ops.attention(query, key, value, return_lse=True, backend="cuda"))
    for output, lse in results[1:]:
        assert output.equal(results[0][0])
        assert lse.equal(results[0][1])


# Faults planted in a copy of the kernel: a text of it, the text in its place, in which $1, $2, … say whether one of the
# faults that follow is on, and the words in which the emulator finds each. One program holds all of them.
FAULTS: list[tuple[str, str, dict[str, str]]] = [
    (
        "mbarrier_wait(empty, ring.parity() ^ 1);",
        "if (!$2) mbarrier_wait(empty, ring.parity() ^ !$1);",
        {
            "an empty barrier's wrong phase": "a barrier that not all threads reach: .* at mbarrier_wait",
            "no wait for an empty barrier": "tensor load|more bytes come|more arrivals",
        },
    ),
    (
        "mbarrier_arrive_expect(full, Form::kTileBytes);",
        "mbarrier_arrive_expect(full, $1 ? 0 : Form::kTileBytes + ($2 ? 128 : 0) - ($3 ? 128 : 0));",
        {
            "no bytes announced": "read by wgmma while a tensor load is on its way",
            "bytes announced that never come": "a barrier that not all threads reach: .* at mbarrier_wait",
            "bytes that were not announced": "more bytes come to the mbarrier",
        },
    ),
    (
        "mbarrier_wait(layout.key_full(place.index()), place.parity());\n        attend_sm90",
        "if (!$1) mbarrier_wait(layout.key_full(place.index()), place.parity());\n        attend_sm90",
        {"no wait for K": "read by wgmma"},
    ),
    (
        "[&] { mbarrier_wait(layout.value_full",
        "[&] { if (!$1) mbarrier_wait(layout.value_full",
        {"no wait for V": "read by wgmma"},
    ),
    (
        "  product_wait<0>();\n  pin(second.score);\n  scores_done();",
        "  if ($1) scores_done();\n  if (!$2) product_wait<0>();\n  if (!$1) scores_done();",
        {
            "K given back before its products are done": "race: tensor load to memory",
            "scores read before their products are done": "wrong|a wgmma under way reads",
        },
    ),
    (
        "        release(layout.key_empty(place.index()));\n        mbarrier_wait",
        "        if (!$1) release(layout.key_empty(place.index()));\n        mbarrier_wait",
        {"a consumer without a tile that keeps K": "a barrier that not all threads reach: .* at mbarrier_wait"},
    ),
    (
        "  pin(second.score);\n  product_fence();",
        "  if (!$1) product_fence();",
        {"products without a fence": "wgmma without product_fence"},
    ),
    (
        "  barrier();\n  const int warpgroup",
        "  if (!$1) barrier();\n  const int warpgroup",
        {"barriers used before they are there": "mbarrier.* with no barrier between"},
    ),
    (
        "    mbarrier_init_fence();\n",
        "    if (!$1) mbarrier_init_fence();\n",
        {"barriers that the copy engine does not see": "without mbarrier_init_fence"},
    ),
    (
        "mbarrier_init(layout.key_empty(stage), kConsumers * kWarps);",
        "mbarrier_init(layout.key_empty(stage), $1 ? kConsumers : kConsumers * kWarps);",
        {"a barrier of the wrong count": "wgmma|more arrivals|a barrier that not all threads reach"},
    ),
    (
        "key = (shared_memory() + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;",
        "key = shared_memory() + ($1 ? 128 : 0);",
        {"a swizzle that begins elsewhere": "does not begin at a multiple of 1024 bytes"},
    ),
    (
        "offset = k % kPanelColumns * kElementBytes;",
        "offset = k % kPanelColumns * kElementBytes * ($1 ? 8 : 1);",
        {"steps through a row as if it were a panel": "wrong|read by wgmma"},
    ),
    (
        "kPanelRowBytes, Form::kPanelBytes),",
        "kPanelRowBytes, $1 ? 1024 : Form::kPanelBytes),",
        {"the next panel of V at the wrong distance": "wrong"},
    ),
    (
        "    if (keys >= kKeys) return;",
        "    if ($1 || keys >= kKeys) return;",
        {"keys that do not exist": "wrong"},
    ),
]
NAMES = [name for _, _, names in FAULTS for name in names]

PROGRAM = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

int fault;
#include "cuda/attention_forward_sm90.cuh"

namespace fastvit::cuda {

std::string attention_forward_sm90_why_not(const AttentionParams&) { return ""; }

// A few rows are enough to see a wrong one.
template <int kDim, int kKeys, bool kOnePass, int kConsumers>
void run(int heads, int queries, int keys) {
  std::vector<uint16_t> q(heads * queries * kDim), k(heads * keys * kDim), v(k.size()), o(q.size());
  std::vector<float> lse(heads * queries);
  std::srand(1);
  for (auto* tensor : {&q, &k, &v}) {
    for (auto& x : *tensor) x = round_to<Half>(float(std::rand() % 2001 - 1000) / 500.0f);
  }
  AttentionParams p;
  p.batch = 1, p.num_heads = heads, p.seqlen_q = queries, p.seqlen_k = keys;
  p.head_dim = p.head_dim_v = kDim, p.scale = 1 / std::sqrt(double(kDim));
  p.query = {q.data(), heads * queries * kDim, queries * kDim, kDim};
  p.key = {k.data(), heads * keys * kDim, keys * kDim, kDim};
  p.value = {v.data(), heads * keys * kDim, keys * kDim, kDim};
  p.output = {o.data(), heads * queries * kDim, queries * kDim, kDim};
  p.lse = lse.data();
  emulator::settings().multiprocessors = 1;
  emulator::settings().shared_bytes = 100 * 1024;  // for a short ring
  const emulator::GlobalMemory memory({{"query", q.data(), int64_t(q.size() * 2), false},
                                       {"key", k.data(), int64_t(k.size() * 2), false},
                                       {"value", v.data(), int64_t(v.size() * 2), false},
                                       {"output", o.data(), int64_t(o.size() * 2), true},
                                       {"lse", lse.data(), int64_t(lse.size() * 4), true}});
  launch_sm90<Half, kDim, kKeys, kOnePass, kConsumers>(p, device_limits(), nullptr);
  for (int row = 0; row < heads * queries; row += 13) {
    std::vector<double> weight(keys), sums(kDim);
    double sum = 0;
    const int head = row / queries;
    for (int j = 0; j < keys; ++j) {
      double score = 0;
      for (int d = 0; d < kDim; ++d) {
        score += to_float<Half>(q[row * kDim + d]) * to_float<Half>(k[(head * keys + j) * kDim + d]);
      }
      sum += weight[j] = std::exp(score * p.scale);
      for (int d = 0; d < kDim; ++d) sums[d] += weight[j] * to_float<Half>(v[(head * keys + j) * kDim + d]);
    }
    for (int d = 0; d < kDim; ++d) {
      if (!(std::abs(to_float<Half>(o[row * kDim + d]) - sums[d] / sum) < 2e-3)) throw std::runtime_error("wrong");
    }
  }
}

}  // namespace fastvit::cuda

int main() {
  for (fault = 0; fault <= FAULTS; ++fault) {
    std::string found = "nothing";
    try {
      fastvit::cuda::run<64, 64, true, 3>(20, 50, 50);
      fastvit::cuda::run<128, 64, true, 2>(7, 64, 64);
    } catch (const std::exception& error) {
      found = error.what();
    }
    std::printf("%s\n", found.c_str());
  }
}
"""


@pytest.fixture(scope="module")
def found_faults(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the emulator says with no fault and with each of FAULTS, planted in a copy of the sources."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    tree = tmp_path_factory.mktemp("faults") / "csrc"
    shutil.copytree(ROOT / "csrc", tree)
    paths = [tree / "cuda/attention_forward_sm90.cuh", tree / "cuda/attention_pipeline_sm90.cuh"]
    texts = {path: path.read_text() for path in paths}
    for there, instead, names in FAULTS:
        holders = [path for path in paths if there in texts[path]]
        assert len(holders) == 1, f"change this fault with the kernel: {there}"
        for place, name in enumerate(names, 1):
            instead = instead.replace(f"${place}", f"(fault == {NAMES.index(name) + 1})")
        texts[holders[0]] = texts[holders[0]].replace(there, instead, 1)
    for path, text in texts.items():
        path.write_text(text)
    (tree / "program.cpp").write_text(PROGRAM)
    program = tree / "program"
    sources = [
        tree / "program.cpp",
        *(tree / f"emulator/{name}.cpp" for name in ("emulator", "hopper", "wgmma", "fiber")),
    ]
    options = ["-std=c++20", "-O1", "-DFASTVIT_EMULATOR", f"-DFAULTS={len(NAMES)}", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *options, f"-I{tree}", *sources, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout.splitlines()


def test_the_kernel_has_no_fault(found_faults: list[str]) -> None:
    assert found_faults[0] == "nothing"


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_found(name: str, found_faults: list[str]) -> None:
    words = next(names[name] for _, _, names in FAULTS if name in names)
    found = found_faults[NAMES.index(name) + 1]
    assert re.search(words, found), found
