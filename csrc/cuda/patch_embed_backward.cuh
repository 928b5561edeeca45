// Patch embedding backward for sm_80 and up. Deterministic: every sum has one order, and nothing is added atomically.
//
//   weight  dW [D, K] = dYᵀ X, and the bias's gradient, the column sums of dY. Sums over tokens are split over blocks,
//           which write float partial sums to scratch memory; a second kernel adds them in order.
//   images  dX [M, K] = dY W, written to the pixels that each patch was gathered from: patches that tile the images
//   only.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "patch_embed_common.cuh"

namespace fastvit::cuda {

constexpr int kScratchElements = int(sizeof(Chunk) / sizeof(float));  // rows of partial sums are whole chunks

struct WeightArguments : PatchEmbedArguments {
  // Partial sums [splits][D][scratch_columns] of the weight, then [splits][D] of the bias.
  float* scratch = nullptr;
  int scratch_columns = 0;
  int tiles = 0;
  int splits = 1;
  int slices_per_split = 0;
  bool vectorized = false;  // the weight's gradient takes four elements at once

  __host__ __device__ int64_t scratch_rows() const { return splits * embed_dim; }
  __host__ __device__ float* bias_scratch() const { return scratch + scratch_rows() * scratch_columns; }
};

// In a partial sum over tokens each thread of the block sums two columns of dY over a few rows of each slice.
template <typename Block>
struct ColumnSums {
  static constexpr int kPairs = Block::kRows / 2;
  static constexpr int kGroups = Block::kThreads / kPairs;
  static constexpr int kGroupRows = kSlice / kGroups;

  float low = 0.0f, high = 0.0f;

  template <typename T>
  __device__ __forceinline__ void add(uint32_t slice) {
    const int pair = thread_index() % kPairs, first = thread_index() / kPairs * kGroupRows;
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i) {
      const uint32_t chunk = Tile<Block::kRows>::address(slice, first + i, pair / 4);
      const uint32_t word = load_shared<uint32_t>(chunk + pair % 4 * 4);
      low += low_half<T>(word);
      high += high_half<T>(word);
    }
  }

  // The groups' sums, added in order, for columns [0, columns).
  __device__ __forceinline__ void store(float* target, int columns) const {
    const uint32_t begin = shared_memory();
    const int pair = thread_index() % kPairs, group = thread_index() / kPairs;
    const uint32_t own = begin + (group * Block::kRows + 2 * pair) * sizeof(float);
    store_shared<float>(own, low);
    store_shared<float>(own + sizeof(float), high);
    barrier();
    const int column = thread_index();
    if (column >= Block::kRows || column >= columns) return;
    float sum = 0.0f;
    for (int i = 0; i < kGroups; ++i) sum += load_shared<float>(begin + (i * Block::kRows + column) * sizeof(float));
    store_global<float>(target + column, sum);
  }
};

struct alignas(8) FloatPair {
  float low, high;
};
struct alignas(16) FloatChunk {
  float value[kScratchElements];
};

template <typename T, typename Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocksPerMultiprocessor)
    patch_embed_backward_weight(const __grid_constant__ WeightArguments p) {
  const int split = block_index() / p.tiles;
  const TileIndex tile = TileIndex::of<Block>(block_index() % p.tiles, p.patch_size);
  const int first_token = split * p.slices_per_split * kSlice;
  const int tokens = min(p.num_tokens - first_token, p.slices_per_split * kSlice);
  const uint32_t places = shared_memory() + Block::kPlacesBegin;
  // A ring like that of the stages: slice i's places are written before slice i − 1 is loaded.
  store_places(places, p, first_token, kStages * kSlice);
  barrier();
  const bool sums_bias = p.bias != nullptr && tile.column == 0;
  ColumnSums<Block> sums;
  Result<Block> result;
  result.template accumulate<T, true, true>(
      int(ceil_div(tokens, kSlice)),
      [&](int i, uint32_t left, uint32_t right) {
        const uint32_t slice = places + i % kStages * kSlice * sizeof(Chunk);
        const int rows = tokens - i * kSlice;
        load_view<Block::kRows, kSlice, Block::kThreads>(left, TokenView{p, slice, rows}, tile.row);
        load_view<Block::kColumns, kSlice, Block::kThreads>(right, PatchView{p, slice, rows}, tile.column);
        const int next = i + 1;
        if (next >= kStages) {
          store_places(places + next % kStages * kSlice * sizeof(Chunk), p, first_token + next * kSlice, kSlice);
        }
      },
      [&](uint32_t left) {
        if (sums_bias) sums.template add<T>(left);
      });
  float* target = p.scratch + (split * p.embed_dim + tile.row) * p.scratch_columns + tile.column;
  const int rows = int(p.embed_dim) - tile.row, columns = p.scratch_columns - tile.column;
  result.for_each_pair([&](int row, int column, float low, float high) {
    if (row >= rows || column >= columns) return;
    store_global<FloatPair>(target + int64_t(row) * p.scratch_columns + column, {low, high});
  });
  if (sums_bias) sums.store(p.bias_scratch() + split * p.embed_dim + tile.row, rows);
}

// The sums of the splits' partial sums: a thread takes a chunk of the weight or one element of the bias.
constexpr int kReduceThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kReduceThreads) patch_embed_reduce(const __grid_constant__ WeightArguments p) {
  const int chunks = p.scratch_columns / kScratchElements;
  const int64_t weight_items = p.embed_dim * chunks;
  const int64_t items = weight_items + (p.bias != nullptr ? p.embed_dim : 0);
  const int64_t step = int64_t(grid_blocks()) * block_threads();
  for (int64_t item = int64_t(block_index()) * block_threads() + thread_index(); item < items; item += step) {
    if (item >= weight_items) {
      const int64_t d = item - weight_items;
      float sum = 0.0f;
      for (int i = 0; i < p.splits; ++i) sum += load_global<float>(p.bias_scratch() + i * p.embed_dim + d);
      store_global<uint16_t>(static_cast<uint16_t*>(p.bias) + d, uint16_t(pack<T>(sum, 0.0f)));
      continue;
    }
    const int64_t row = item / chunks;
    const int column = int(item % chunks) * kScratchElements;
    const float* source = p.scratch + row * p.scratch_columns + column;
    float sum[kScratchElements] = {};
#pragma unroll 4
    for (int i = 0; i < p.splits; ++i) {
      const FloatChunk partial = load_global<FloatChunk>(source + i * p.embed_dim * p.scratch_columns);
#pragma unroll
      for (int j = 0; j < kScratchElements; ++j) sum[j] += partial.value[j];
    }
    const uint32_t low = pack<T>(sum[0], sum[1]), high = pack<T>(sum[2], sum[3]);
    uint16_t* target = static_cast<uint16_t*>(p.weight) + row * p.patch_size + column;
    if (p.vectorized) {
      store_global<uint64_t>(target, uint64_t(high) << 32 | low);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kScratchElements; ++j) {
      if (column + j >= p.patch_size) continue;
      store_global<uint16_t>(target + j, uint16_t((j < 2 ? low : high) >> j % 2 * 16));
    }
  }
}

template <typename T, typename Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocksPerMultiprocessor)
    patch_embed_backward_images(const __grid_constant__ PatchEmbedArguments p) {
  const TileIndex tile = TileIndex::of<Block>(block_index(), p.patch_size);
  const uint32_t places = shared_memory() + Block::kPlacesBegin;
  store_places(places, p, tile.row, Block::kRows);
  barrier();
  const int rows = p.num_tokens - tile.row;
  Result<Block> result;
  result.template accumulate<T, false, true>(
      int(ceil_div(p.embed_dim, kSlice)),
      [&](int i, uint32_t left, uint32_t right) {
        load_view<kSlice, Block::kRows, Block::kThreads>(left, TokenView{p, places, rows}, i * kSlice);
        load_view<Block::kColumns, kSlice, Block::kThreads>(right, WeightView(p, i * kSlice), tile.column);
      },
      [](uint32_t) {});
  result.template store<T>(PatchView{p, places, rows}, tile.column);
}

// A split reads 16 KB for each slice, writes 64 KB of partial sums and has them read again: at eight slices the ones
// weigh as much as the others.
constexpr int kLeastSlices = 8;

inline WeightArguments weight_arguments(const PatchEmbedParams& params) {
  WeightArguments p;
  static_cast<PatchEmbedArguments&>(p) = patch_embed_arguments(params);
  p.tiles = int(TileIndex::count<LargeTile>(p.embed_dim, p.patch_size));
  p.scratch_columns = round_up(p.patch_size, kScratchElements);
  // As many splits as fill the device once, so that no block waits for a second turn.
  const int64_t slices = ceil_div(p.num_tokens, kSlice);
  const int64_t at_once = int64_t(device_limits().multiprocessors) * LargeTile::kBlocksPerMultiprocessor;
  const int64_t splits = std::clamp<int64_t>(at_once / p.tiles, 1, ceil_div(slices, kLeastSlices));
  p.slices_per_split = int(ceil_div(slices, splits));
  p.splits = int(ceil_div(slices, p.slices_per_split));
  p.vectorized = vector_width(p.weight, {p.patch_size}) >= kScratchElements;
  return p;
}

inline int64_t weight_scratch(const PatchEmbedParams& params) {
  const WeightArguments p = weight_arguments(params);
  return p.scratch_rows() * (p.scratch_columns + 1);
}

template <typename T>
void patch_embed_backward_weight_dtype(const PatchEmbedParams& params, void* scratch, void* stream) {
  WeightArguments p = weight_arguments(params);
  p.scratch = static_cast<float*>(scratch);
  const int64_t blocks = int64_t(p.tiles) * p.splits;
  launch(patch_embed_backward_weight<T, LargeTile>, {blocks, LargeTile::kThreads, LargeTile::kSharedBytes}, stream, p);
  const int64_t items = p.embed_dim * (p.scratch_columns / kScratchElements + 1);
  const DeviceLimits device = device_limits();
  const int64_t at_once = device.multiprocessors * resident_blocks(patch_embed_reduce<T>, device, kReduceThreads, 0);
  launch(patch_embed_reduce<T>, {std::min(ceil_div(items, kReduceThreads), at_once), kReduceThreads, 0}, stream, p);
}

template <typename T>
void patch_embed_backward_images_dtype(const PatchEmbedParams& params, void* stream) {
  const PatchEmbedArguments p = patch_embed_arguments(params);
  launch_tiles(patch_embed_backward_images<T, LargeTile>, patch_embed_backward_images<T, SmallTile>, p, p.patch_size,
               stream);
}

}  // namespace fastvit::cuda
