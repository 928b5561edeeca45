// The emulator's sm_90: the products of warpgroups (wgmma).
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "../cuda/primitives.cuh"
#include "block.h"

namespace fastvit::emulator {
namespace {

// Calls function(address) for the 16-byte pieces that warp `part` of a warpgroup reads: its sixteen rows of a left
// operand, or all of a right one.
template <typename Function>
void for_each_chunk(const WarpgroupProduct& what, int part, Function function) {
  if (!what.left) {
    for (int i = 0; i < 32; ++i) function(operand_address(what.left_descriptor, false, 16 * part + i / 2, i % 2 * 8));
  }
  for (int n = 0; n < what.columns; n += what.transposed ? 8 : 1) {
    for (int k = 0; k < 16; k += what.transposed ? 1 : 8) {
      function(operand_address(what.right_descriptor, what.transposed, n, k));
    }
  }
}

void check_read(uint32_t address, int warp) {
  const Chunk16& chunk = chunk_at(address & ~(kChunkBytes - 1));
  if (chunk.state == Chunk16::kUnused) fail("shared memory read by wgmma before a tensor load wrote it" + at(address));
  if (chunk.state == Chunk16::kInFlight) {
    fail("shared memory read by wgmma while a tensor load is on its way to it" + at(address));
  }
  if (block.hopper_warps[warp].clock[kMaxWarps + chunk.barrier] <= chunk.phase) {
    fail("shared memory read by wgmma, and warp " + std::to_string(warp) +
         " has not waited for the mbarrier of the tensor load that wrote it" + at(address));
  }
}

// What a warp does when all of its warpgroup have met at a product.
void start(int warp, int part, void* const* operands) {
  HopperWarp& state = block.hopper_warps[warp];
  WarpProduct product;
  product.what = *static_cast<const WarpgroupProduct*>(operands[0]);
  if (!state.fenced) fail("wgmma without product_fence since the last wait");
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const WarpgroupProduct*>(operands[part * kWarp + lane]);
    if (mine.left_descriptor != product.what.left_descriptor ||
        mine.right_descriptor != product.what.right_descriptor || mine.accumulate != product.what.accumulate ||
        mine.columns != product.what.columns) {
      fail("wgmma with operands that differ among the threads of a warpgroup");
    }
    product.accumulator[lane] = mine.accumulator;
    if (mine.left) std::copy_n(mine.left, 4, product.left[lane].begin());
  }
  for_each_chunk(product.what, part, [&](uint32_t address) {
    check_read(address, warp);
    chunk_at(address & ~(kChunkBytes - 1)).reading |= 1u << warp;
  });
  auto [found, is_new] = state.accumulators.try_emplace(product.accumulator[0], product.what.columns / 2);
  if (int(found->second.size()) != product.what.columns / 2) fail("wgmma of two shapes on one accumulator");
  for (int i = 0; is_new && i < product.what.columns / 2; ++i) {
    for (int lane = 0; lane < kWarp; ++lane) {
      found->second[i][lane] = product.accumulator[lane][i];
      product.accumulator[lane][i] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  state.open_group.push_back(product);
}

float element(const WarpgroupProduct& what, uint64_t descriptor, bool transposed, int row, int k) {
  uint16_t bits;
  std::memcpy(&bits, check_shared(operand_address(descriptor, transposed, row, k), 2), 2);
  return what.to_float(bits);
}

void multiply(const WarpProduct& product, int part, std::vector<std::array<float, kWarp>>& accumulator) {
  const WarpgroupProduct& what = product.what;
  double a[16][16], b[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = product.left[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      a[row][k] = what.left ? what.to_float(uint16_t(word >> 16 * (k % 2)))
                            : element(what, what.left_descriptor, false, 16 * part + row, k);
    }
  }
  for (int first = 0; first < what.columns; first += 8) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) b[k][n] = element(what, what.right_descriptor, what.transposed, first + n, k);
    }
    for (int row = 0; row < 16; ++row) {
      double c[8];
      auto lane_of = [&](int n) { return row % 8 * 4 + n / 2; };
      auto index_of = [&](int n) { return first / 2 + row / 8 * 2 + n % 2; };
      for (int n = 0; n < 8; ++n) c[n] = what.accumulate ? accumulator[index_of(n)][lane_of(n)] : 0.0;
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) c[n] += a[row][k] * b[k][n];
      }
      for (int n = 0; n < 8; ++n) accumulator[index_of(n)][lane_of(n)] = cuda::truncate(c[n]);
    }
  }
}

// The oldest group of this warp: its products are computed now, the latest moment at which they may be.
void finish_group(HopperWarp& state, int warp) {
  const int part = warp % (kWarpgroup / kWarp);
  const std::vector<WarpProduct> group = std::move(state.groups.front());
  state.groups.pop_front();
  for (const WarpProduct& product : group) {
    multiply(product, part, state.accumulators.at(product.accumulator[0]));
    for_each_chunk(product.what, part, [&](uint32_t address) {
      Chunk16& chunk = chunk_at(address & ~(kChunkBytes - 1));
      chunk.reading &= ~(1u << warp);
      chunk.read[warp] = state.clock[warp];
    });
  }
  auto under_way = [&](const float* accumulator) {
    for (const auto& later : state.groups) {
      for (const WarpProduct& product : later) {
        if (product.accumulator[0] == accumulator) return true;
      }
    }
    return false;
  };
  for (const WarpProduct& product : group) {
    auto found = state.accumulators.find(product.accumulator[0]);
    if (found == state.accumulators.end() || under_way(found->first)) continue;
    for (size_t i = 0; i < found->second.size(); ++i) {
      for (int lane = 0; lane < kWarp; ++lane) product.accumulator[lane][i] = found->second[i][lane];
    }
    state.accumulators.erase(found);
  }
  // Later groups may read what this one has read.
  for (const auto& later : state.groups) {
    for (const WarpProduct& product : later) {
      for_each_chunk(product.what, part,
                     [&](uint32_t address) { chunk_at(address & ~(kChunkBytes - 1)).reading |= 1u << warp; });
    }
  }
}

}  // namespace

// 9.7.15.5.1: rows of 128 bytes; eight of them, then the stride byte offset. Transposed: 64 columns in a row, then the
// leading byte offset.
uint32_t operand_address(uint64_t descriptor, bool transposed, int row, int k) {
  const uint32_t begin = uint32_t(descriptor & 0x3FFF) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3FFF) << 4, stride = uint32_t(descriptor >> 32 & 0x3FFF) << 4;
  if (descriptor >> 49 != uint64_t(1) << (62 - 49))
    fail("not emulated: swizzles other than of 128 bytes, base offsets");
  const uint32_t offset = transposed ? row / 64 * leading + k / 8 * stride + k % 8 * kPanelRow + row % 64 * 2
                                     : row / 8 * stride + row % 8 * kPanelRow + k * 2;
  return swizzle(begin + offset);
}

void product_fence() {
  this_warp();
  collective("product_fence", nullptr,
             [](void* const*) { block.hopper_warps[warp_of(block.running->index)].fenced = true; });
}

void product_start(const WarpgroupProduct& product) {
  this_warp();
  WarpgroupProduct operands = product;
  collective(
      "wgmma", &operands,
      [](void* const* all) {
        const int first = warp_of(block.running->index) / (kWarpgroup / kWarp) * (kWarpgroup / kWarp);
        ++statistics().warpgroup_products;
        for (int part = 0; part < kWarpgroup / kWarp; ++part) start(first + part, part, all);
      },
      kWarpgroup);
}

void product_commit() {
  collective("product_commit", nullptr, [](void* const*) {
    HopperWarp& warp = this_warp();
    warp.groups.push_back(std::exchange(warp.open_group, {}));
  });
}

void product_wait(int groups) {
  int operands = groups;
  collective("product_wait", &operands, [](void* const* all) {
    HopperWarp& warp = this_warp();
    while (int(warp.groups.size()) > *static_cast<const int*>(all[0])) {
      finish_group(warp, warp_of(block.running->index));
      warp.fenced = false;
    }
  });
}

}  // namespace fastvit::emulator
