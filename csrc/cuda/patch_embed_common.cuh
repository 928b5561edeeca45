// What patch embedding forward and backward share. With X [tokens][K] the patches, gathered from the images as they
// lie, W [D][K] the weight and Y [tokens][D] the tokens, all three are products of matrices that never exist as such:
//
//   forward          Y  = X Wᵀ + b     sums over K
//   backward weight  dW = dYᵀ X        sums over tokens
//   backward images  dX = dY W         sums over D
//
// A block makes one tile of the result, and walks along the sum in slices of 32 that come to shared memory by a ring of
// stages. An operand's slice has the result's rows or columns as its rows (straight) or as its columns (transposed),
// whichever lies contiguous in memory; ldmatrix reads both. What lies beyond a matrix is zero there.
#pragma once

#include <limits>

#include "patch_embed_views.cuh"

namespace fastvit::cuda {

// Two products deep: a wider slice would halve the barriers, but leave shared memory for one block where two hide each
// other's barriers.
constexpr int kSlice = 32;
// Three slices on their way while one is multiplied: 1500 cycles and more of a tile's products, the latency of global
// memory twice over. Two blocks of 66 KB fit the 164 KB of sm_80.
constexpr int kStages = 4;

// A block of kWarpRows × kWarpColumns warps, each with 16 kRowTiles × 8 kColumnTiles elements of the result.
template <int kWarpRows, int kWarpColumns, int kRowTiles_, int kColumnTiles_>
struct BlockTile {
  static constexpr int kRowTiles = kRowTiles_, kColumnTiles = kColumnTiles_;
  static constexpr int kWarpsAcross = kWarpColumns;
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarpThreads;
  static constexpr int kRows = kWarpRows * 16 * kRowTiles;
  static constexpr int kColumns = kWarpColumns * 8 * kColumnTiles;
  static constexpr uint32_t kLeftBytes = kRows * kSlice * kElementBytes;
  static constexpr uint32_t kStageBytes = kLeftBytes + kColumns * kSlice * kElementBytes;
  // Where tokens lie: those of the result's rows, or those of the slices in the ring.
  static constexpr int kPlaces = kRows > kStages* kSlice ? kRows : kStages * kSlice;
  static constexpr uint32_t kPlacesBegin = kStages * kStageBytes;
  static constexpr int kSharedBytes = int(kPlacesBegin + kPlaces * sizeof(Chunk));
  // Two blocks of 256 threads or four of 128 leave each thread 128 registers, of which 64 or 32 hold the result.
  static constexpr int kBlocksPerMultiprocessor = 512 / kThreads;
  // The result, rounded, goes out by way of the stages.
  static_assert(kRows * kColumns * kElementBytes <= int(kPlacesBegin));
};

// Eight warps of 64 × 32: six ldmatrix for sixteen products, so that shared memory keeps up with the tensor cores.
using LargeTile = BlockTile<2, 4, 4, 4>;
// A quarter, for results that have fewer large tiles than there are multiprocessors.
using SmallTile = BlockTile<2, 2, 2, 4>;

// The tiles of a result, and which one is this block's: neighbours share their rows.
struct TileIndex {
  int row;  // the first row of the tile
  int column;

  template <typename Block>
  static __device__ __forceinline__ TileIndex of(int index, int columns) {
    const int across = int(ceil_div(columns, Block::kColumns));
    return {index / across * Block::kRows, index % across * Block::kColumns};
  }

  template <typename Block>
  static int64_t count(int64_t rows, int64_t columns) {
    const int64_t tiles = ceil_div(rows, Block::kRows) * ceil_div(columns, Block::kColumns);
    if (tiles > std::numeric_limits<int32_t>::max()) {
      throw std::invalid_argument("images: the CUDA kernels count tiles of 128 × 128 to 2^31");
    }
    return tiles;
  }
};

// A launch with small tiles where large ones would leave multiprocessors idle.
template <typename Params>
void launch_tiles(void (*large)(Params), void (*small)(Params), const Params& p, int64_t columns, void* stream) {
  const int64_t tiles = TileIndex::count<LargeTile>(p.num_tokens, columns);
  if (tiles >= device_limits().multiprocessors) {
    return launch(large, {tiles, LargeTile::kThreads, LargeTile::kSharedBytes}, stream, p);
  }
  const int64_t small_tiles = TileIndex::count<SmallTile>(p.num_tokens, columns);
  launch(small, {small_tiles, SmallTile::kThreads, SmallTile::kSharedBytes}, stream, p);
}

// A warp's part of the result of a block.
template <typename Block>
struct Result {
  float value[Block::kRowTiles][Block::kColumnTiles][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Block::kColumnTiles; ++n) {
        value[m][n][0] = value[m][n][1] = value[m][n][2] = value[m][n][3] = 0.0f;
      }
    }
  }

  static __device__ __forceinline__ int first_row() {
    return thread_index() / kWarpThreads / Block::kWarpsAcross * 16 * Block::kRowTiles;
  }
  static __device__ __forceinline__ int first_column() {
    return thread_index() / kWarpThreads % Block::kWarpsAcross * 8 * Block::kColumnTiles;
  }

  // += left · rightᵀ of one slice: left is [kRows][kSlice] or, transposed, [kSlice][kRows], and right the same of
  // kColumns.
  template <typename T, bool kLeftTransposed, bool kRightTransposed>
  __device__ __forceinline__ void multiply(uint32_t left, uint32_t right) {
    const auto lane = uint32_t(lane_index());
    // Lane 8i + r names row r of matrix i; of the four of a fragment, two follow each other along either side.
    const int near = int(lane % 16), far = int(lane / 16 * 8);                   // matrices 0, 1 | 2, 3
    const int inner = int(lane % 8 + lane / 16 * 8), outer = int(lane / 8 % 2);  // matrices 0, 2 | 1, 3
    const int row = first_row(), column = first_column();
#pragma unroll
    for (int k = 0; k < kSlice; k += 16) {
      uint32_t a[Block::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < Block::kRowTiles; ++m) {
        if constexpr (kLeftTransposed) {
          ldmatrix<4, true>(a[m], Tile<Block::kRows>::address(left, k, inner, (row + 16 * m) / 8 + outer));
        } else {
          ldmatrix<4, false>(a[m], Tile<kSlice>::address(left, row + 16 * m, near, (k + far) / 8));
        }
      }
#pragma unroll
      for (int n = 0; n < Block::kColumnTiles; n += 2) {
        uint32_t b[4];
        if constexpr (kRightTransposed) {
          ldmatrix<4, true>(b, Tile<Block::kColumns>::address(right, k, near, (column + 8 * n + far) / 8));
        } else {
          ldmatrix<4, false>(b, Tile<kSlice>::address(right, column + 8 * n, inner, k / 8 + outer));
        }
#pragma unroll
        for (int m = 0; m < Block::kRowTiles; ++m) {
          mma_m16n8k16<T>(value[m][n], a[m], b[0], b[1]);
          mma_m16n8k16<T>(value[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // The sum over `slices` slices. load(i, left, right) starts to load slice i; what it needs from other threads is in
  // shared memory before this is called, or was written by load(i − 1, …). look(left) sees each left slice.
  template <typename T, bool kLeftTransposed, bool kRightTransposed, typename Load, typename Look>
  __device__ __forceinline__ void accumulate(int slices, Load load, Look look) {
    clear();
    const uint32_t begin = shared_memory();
    const auto load_slice = [&](int i) {
      const uint32_t stage = begin + uint32_t(i) % kStages * Block::kStageBytes;
      if (i < slices) load(i, stage, stage + Block::kLeftBytes);
      cp_async_commit();
    };
    // The first rounds only load.
#pragma unroll 1
    for (int i = 1 - kStages; i < slices; ++i) {
      if (i >= 0) {
        cp_async_wait<kStages - 2>();
        // Slice i has arrived, and all have done with slice i − 1, whose stage is the next to be filled.
        barrier();
      }
      load_slice(i + kStages - 1);
      if (i < 0) continue;
      const uint32_t stage = begin + uint32_t(i) % kStages * Block::kStageBytes;
      look(stage);
      multiply<T, kLeftTransposed, kRightTransposed>(stage, stage + Block::kLeftBytes);
    }
    barrier();
  }

  // Calls function(row, column, value, value of column + 1) for each pair of this thread, in the block's coordinates.
  template <typename Function>
  __device__ __forceinline__ void for_each_pair(Function function) const {
    const int lane = lane_index();
#pragma unroll
    for (int n = 0; n < Block::kColumnTiles; ++n) {
#pragma unroll
      for (int m = 0; m < Block::kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          function(first_row() + 16 * m + 8 * half + lane / 4, first_column() + 8 * n + lane % 4 * 2,
                   value[m][n][2 * half], value[m][n][2 * half + 1]);
        }
      }
    }
  }

  // Rounded, to the rows of a view, by way of the stages.
  template <typename T, typename View>
  __device__ __forceinline__ void store(const View& view, int first_column) const {
    const uint32_t begin = shared_memory();
    for_each_pair([&](int row, int column, float low, float high) {
      const uint32_t chunk = Tile<Block::kColumns>::address(begin, row, column / kChunkElements);
      store_shared<uint32_t>(chunk + column % kChunkElements * kElementBytes, pack<T>(low, high));
    });
    barrier();
    store_view<Block::kColumns, Block::kRows, Block::kThreads>(begin, view, first_column);
  }
};

}  // namespace fastvit::cuda
