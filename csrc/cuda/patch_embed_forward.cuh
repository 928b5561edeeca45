// Patch embedding forward for sm_80 and up: tokens [M, D] = patches [M, K] · weight [D, K]ᵀ + bias.
#pragma once

#include "kernels.h"
#include "patch_embed_common.cuh"

namespace fastvit::cuda {

template <typename T, typename Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocksPerMultiprocessor)
    patch_embed_forward(const __grid_constant__ PatchEmbedArguments p) {
  const TileIndex tile = TileIndex::of<Block>(block_index(), int(p.embed_dim));
  const uint32_t places = shared_memory() + Block::kPlacesBegin;
  store_places(places, p, tile.row, Block::kRows);
  barrier();
  const int rows = p.num_tokens - tile.row;
  Result<Block> result;
  result.template accumulate<T, false, false>(
      int(ceil_div(p.patch_size, kSlice)),
      [&](int i, uint32_t left, uint32_t right) {
        load_view<kSlice, Block::kRows, Block::kThreads>(left, PatchView{p, places, rows}, i * kSlice);
        load_view<kSlice, Block::kColumns, Block::kThreads>(right, WeightView(p, tile.column), i * kSlice);
      },
      [](uint32_t) {});
  if (p.bias != nullptr) {
    const auto* bias = static_cast<const uint16_t*>(p.bias);
    const int first = tile.column + Result<Block>::first_column() + lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < Block::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + 8 * n + i;
        const float added = column < p.embed_dim ? to_float<T>(load_global<uint16_t>(bias + column)) : 0.0f;
#pragma unroll
        for (int m = 0; m < Block::kRowTiles; ++m) {
          result.value[m][n][i] += added;
          result.value[m][n][i + 2] += added;
        }
      }
    }
  }
  result.template store<T>(TokenView{p, places, rows}, tile.column);
}

template <typename T>
void patch_embed_forward_dtype(const PatchEmbedParams& params, void* stream) {
  const PatchEmbedArguments p = patch_embed_arguments(params);
  launch_tiles(patch_embed_forward<T, LargeTile>, patch_embed_forward<T, SmallTile>, p, p.embed_dim, stream);
}

}  // namespace fastvit::cuda
