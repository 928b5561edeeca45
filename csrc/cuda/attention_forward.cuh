// Attention forward for sm_80 and up: O = softmax(scale·QKᵀ + bias) V and LSE, by mma.sync with float accumulators.
//
//   resident   a block takes a whole head: all of K and V go to shared memory once, and while its warps work on one
//              head the next one is on its way. A vision transformer's sequences fit.
//   streaming  a block takes a tile of queries and streams K and V through a ring of two stages: any length.
//
// Both are made of attend(): a warp's kM × 16 queries against up to 8 kTiles keys whose scores stay in registers. Where
// 8 kTiles ≥ Nk there is one such step and the softmax is exact in one pass: to 264 keys in the resident form, with or
// without a bias or a mask. Beyond, it is the online softmax (Milakov & Gimelshein 2018; Dao 2023, FlashAttention-2,
// algorithm 1). Absent tiles of eight keys are not computed.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_common.cuh"
#include "kernels.h"

namespace fastvit::cuda {

struct ForwardArguments : AttentionParams {
  float scale_log2 = 0.0f;  // scale · log2 e
  bool query_vectorized = false;
  bool key_vectorized = false;
  bool value_vectorized = false;
  bool output_vectorized = false;
  // Work items: a head and a part of its queries. parts is the number of parts of a head.
  int items = 0;
  int parts = 1;
  int stages = 1;
};

// The scores of one step live in registers, 4 · kM · kTiles of a lane's 255, beside kM · kDim / 2 of O and, where
// another step follows, kM · kDim / 4 of Q.
struct ForwardTile {
  int row_tiles;  // kM
  int key_tiles;  // kTiles
};

// Two tiles of sixteen queries share each load of K and V, which halves the reads of shared memory, the narrower road
// on sm_80 (a warp's 16 × 8 × 16 product takes two cycles of a multiprocessor, its 256 bytes of K also two). Beyond 80
// the accumulators of two tiles would not leave room for the scores.
__host__ __device__ constexpr ForwardTile online_tile(int head_dim) { return {head_dim <= 80 ? 2 : 1, 8}; }

// The most keys of a step that takes a whole sequence at once: 264 holds 16 × 16 patches and a few prefix tokens
// (N = 256, 257, 261). A lane's scores of one tile of queries take N / 2 registers, so that this is also about as far
// as one pass goes: 132 of 255. At head dim 64, 200 keys (N = 196, 197) need 32 registers fewer than 264.
constexpr int kOnePassTiles = 33;
constexpr int kOnePassTilesShort = 25;

template <typename T, int kDim, int kM>
struct ForwardState {
  float output[kM][Tile<kDim>::kChunks][4];
  float maximum[kM][2];  // of the scores so far, in base 2 where masked, else raw
  float sum[kM][2];      // this lane's share of the row's sum of exponentials

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int c = 0; c < Tile<kDim>::kChunks; ++c) {
        output[m][c][0] = output[m][c][1] = output[m][c][2] = output[m][c][3] = 0.0f;
      }
      maximum[m][0] = maximum[m][1] = -infinity();
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }
};

// One step: the warp's queries from first_query on against `keys` keys, of which the first is number first_key of the
// head and lies in row tile_row of the tiles of K and V.
template <typename T, int kDim, int kM, int kTiles, bool kMasked>
__device__ __forceinline__ void attend(ForwardState<T, kDim, kM>& state, const RowFragment<kDim> (&query)[kM],
                                       uint32_t key_tile, uint32_t value_tile, int tile_row, int first_query,
                                       int first_key, int keys, const ForwardArguments& p, const HeadIndex& at) {
  const int lane = lane_index();
  const int tiles = (keys + 7) / 8;
  float scores[kTiles][kM][4];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int m = 0; m < kM; ++m) scores[j][m][0] = scores[j][m][1] = scores[j][m][2] = scores[j][m][3] = 0.0f;
    if (j < tiles) multiply_rows<T, kDim, kM>(scores[j], query, key_tile, tile_row + 8 * j, lane);
  }
  if constexpr (kMasked) apply_bias<false, kM, kTiles>(scores, at, first_query, first_key, p, p.scale_log2);
  const float factor = kMasked ? 1.0f : p.scale_log2;
  if (keys < 8 * kTiles) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < kM * 4; ++i) {
        if (8 * j + 2 * (lane % 4) + i % 2 >= keys) scores[j][i / 4][i % 4] = j < tiles ? -infinity() : 0.0f;
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float before = state.maximum[m][half];
      float maximum = before;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j < tiles) maximum = fmaxf(maximum, fmaxf(scores[j][m][2 * half], scores[j][m][2 * half + 1]));
      }
      maximum = row_maximum(maximum);
      // A row with nothing to attend to has no maximum; its exponentials are those of −inf.
      const float origin = maximum == -infinity() ? 0.0f : multiply_rounded(maximum, factor);
      state.maximum[m][half] = maximum;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          if (j < tiles) {
            scores[j][m][i] = exp2_approx(scores[j][m][i] * factor - origin);
            sum += scores[j][m][i];
          }
        }
      }
      if (first_key == 0) {
        state.sum[m][half] = sum;
      } else {
        // Exactly 1 where the maximum has not moved: an error of this factor would grow with every step.
        const float rescale = exp2_approx(multiply_rounded(before, factor) - origin);
        state.sum[m][half] = state.sum[m][half] * rescale + sum;
#pragma unroll
        for (int c = 0; c < Tile<kDim>::kChunks; ++c) {
          state.output[m][c][2 * half] *= rescale;
          state.output[m][c][2 * half + 1] *= rescale;
        }
      }
    }
  }
  // Tiles that were not computed are zeros, and so are the rows of V beyond the keys.
#pragma unroll
  for (int k = 0; k < (kTiles + 1) / 2; ++k) {
    if (2 * k >= tiles) continue;
    uint32_t left[kM][4];
    constexpr int kLast = kTiles - 1;
#pragma unroll
    for (int m = 0; m < kM; ++m) pack_left<T>(left[m], scores[2 * k][m], scores[min(2 * k + 1, kLast)][m]);
    if (2 * k < kLast) {
      multiply_columns<T, kDim, kM>(state.output, left, value_tile, tile_row + 16 * k, lane);
    } else {
      multiply_columns_half<T, kDim, kM>(state.output, left, value_tile, tile_row + 16 * k, lane);
    }
  }
}

// Normalise, and write the warp's rows of O (by way of its tile in shared memory, for whole chunks) and of the LSE.
template <typename T, int kDim, int kM, bool kMasked>
__device__ __forceinline__ void finish(ForwardState<T, kDim, kM>& state, uint32_t warp_tile, int first_query,
                                       const Rows& output, float* lse, const ForwardArguments& p) {
  const int lane = lane_index();
  const float factor = kMasked ? 1.0f : p.scale_log2;
  warp_barrier();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = row_sum(state.sum[m][half]);
      const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      const int row = 16 * m + 8 * half + lane / 4;
      if (lane % 4 == 0 && first_query + row < p.seqlen_q) {
        const float natural = state.maximum[m][half] * factor * kLn2 + natural_log(sum);
        store_global<float>(lse + first_query + row, sum == 0.0f ? -infinity() : natural);
      }
#pragma unroll
      for (int c = 0; c < Tile<kDim>::kChunks; ++c) {
        const uint32_t word =
            pack<T>(state.output[m][c][2 * half] * inverse, state.output[m][c][2 * half + 1] * inverse);
        store_shared<uint32_t>(Tile<kDim>::address(warp_tile, row, c) + lane % 4 * 4, word);
      }
    }
  }
  warp_barrier();
  store_tile<kDim>(warp_tile, output, first_query, 16 * kM, lane, kWarpThreads);
  warp_barrier();
}

// The Q fragments of a warp, by way of its tile in shared memory.
template <int kDim, int kM>
__device__ __forceinline__ void load_query(RowFragment<kDim> (&query)[kM], uint32_t warp_tile, const Rows& rows,
                                           int first_query) {
  const int lane = lane_index();
  load_tile<kDim>(warp_tile, rows, first_query, 16 * kM, lane, kWarpThreads);
  warp_barrier();
#pragma unroll
  for (int m = 0; m < kM; ++m) query[m].load(warp_tile, 16 * m, lane);
}

template <typename T, int kDim, int kM, int kTiles, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads) attention_forward_resident(const __grid_constant__ ForwardArguments p) {
  const int warp = thread_index() / kWarpThreads, warps = block_threads() / kWarpThreads;
  const int tile_rows = round_up(p.seqlen_k, 16);
  const uint32_t tile_bytes = uint32_t(tile_rows) * Tile<kDim>::kRowBytes;
  const uint32_t begin = shared_memory();
  const uint32_t warp_tile = begin + 2 * p.stages * tile_bytes + warp * 16 * kM * Tile<kDim>::kRowBytes;

  auto load_head = [&](int item, int stage) {
    const HeadIndex at(p, item / p.parts);
    const uint32_t target = begin + 2 * stage * tile_bytes;
    const Rows key = head_rows(p.key, at, p.seqlen_k, p.head_dim, p.key_vectorized);
    const Rows value = head_rows(p.value, at, p.seqlen_k, p.head_dim_v, p.value_vectorized);
    load_tile_async<kDim>(target, key, 0, tile_rows, thread_index(), block_threads());
    load_tile_async<kDim>(target + tile_bytes, value, 0, tile_rows, thread_index(), block_threads());
  };

  int stage = 0;
  if (p.stages == 2) load_head(block_index(), 0);
  cp_async_commit();
  for (int item = block_index(); item < p.items; item += grid_blocks()) {
    if (p.stages == 2) {
      if (item + grid_blocks() < p.items) load_head(item + grid_blocks(), stage ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
    } else {
      load_head(item, 0);
      cp_async_commit();
      cp_async_wait<0>();
    }
    barrier();
    const HeadIndex at(p, item / p.parts);
    const uint32_t key_tile = begin + 2 * stage * tile_bytes, value_tile = key_tile + tile_bytes;
    const Rows query_rows = head_rows(p.query, at, p.seqlen_q, p.head_dim, p.query_vectorized);
    const Rows output_rows = head_rows(p.output, at, p.seqlen_q, p.head_dim_v, p.output_vectorized);
    float* lse = static_cast<float*>(p.lse) + (at.batch * p.num_heads + at.head) * p.seqlen_q;
    const int part = item % p.parts;
    for (int first = (part * warps + warp) * 16 * kM; first < p.seqlen_q; first += p.parts * warps * 16 * kM) {
      RowFragment<kDim> query[kM];
      load_query<kDim, kM>(query, warp_tile, query_rows, first);
      ForwardState<T, kDim, kM> state;
      state.clear();
      const int seqlen_k = int(p.seqlen_k);
      const int end = p.is_causal ? min(seqlen_k, first + 16 * kM) : seqlen_k;
      if constexpr (kTiles > online_tile(kDim).key_tiles) {
        // Known to be one step: Q is not kept beside O.
        attend<T, kDim, kM, kTiles, kMasked>(state, query, key_tile, value_tile, 0, first, 0, end, p, at);
      } else {
        for (int key = 0; key < end; key += 8 * kTiles) {
          attend<T, kDim, kM, kTiles, kMasked>(state, query, key_tile, value_tile, key, first, key,
                                               min(8 * kTiles, end - key), p, at);
        }
      }
      finish<T, kDim, kM, kMasked>(state, warp_tile, first, output_rows, lse, p);
    }
    barrier();
    if (p.stages == 2) stage ^= 1;
  }
}

template <typename T, int kDim, int kM, int kTiles, bool kMasked>
__global__ void __launch_bounds__(kMaxThreads) attention_forward_streaming(const __grid_constant__ ForwardArguments p) {
  constexpr int kKeys = 8 * kTiles;
  static_assert(kKeys % 16 == 0);
  constexpr uint32_t kTileBytes = kKeys * Tile<kDim>::kRowBytes;
  const int warp = thread_index() / kWarpThreads, warps = block_threads() / kWarpThreads;
  const uint32_t begin = shared_memory();
  const uint32_t warp_tile = begin + 4 * kTileBytes + warp * 16 * kM * Tile<kDim>::kRowBytes;

  for (int item = block_index(); item < p.items; item += grid_blocks()) {
    const HeadIndex at(p, item / p.parts);
    const Rows query_rows = head_rows(p.query, at, p.seqlen_q, p.head_dim, p.query_vectorized);
    const Rows key_rows = head_rows(p.key, at, p.seqlen_k, p.head_dim, p.key_vectorized);
    const Rows value_rows = head_rows(p.value, at, p.seqlen_k, p.head_dim_v, p.value_vectorized);
    const Rows output_rows = head_rows(p.output, at, p.seqlen_q, p.head_dim_v, p.output_vectorized);
    float* lse = static_cast<float*>(p.lse) + (at.batch * p.num_heads + at.head) * p.seqlen_q;
    const int block_first = item % p.parts * warps * 16 * kM;
    const int first = block_first + warp * 16 * kM;
    const int seqlen_k = int(p.seqlen_k);
    // The whole block walks as far as its last query looks.
    const int end = p.is_causal ? min(seqlen_k, block_first + warps * 16 * kM) : seqlen_k;

    auto load_keys = [&](int key, int stage) {
      const uint32_t target = begin + 2 * stage * kTileBytes;
      load_tile_async<kDim>(target, key_rows, key, kKeys, thread_index(), block_threads());
      load_tile_async<kDim>(target + kTileBytes, value_rows, key, kKeys, thread_index(), block_threads());
    };
    load_keys(0, 0);
    cp_async_commit();
    RowFragment<kDim> query[kM];
    load_query<kDim, kM>(query, warp_tile, query_rows, first);
    ForwardState<T, kDim, kM> state;
    state.clear();
    for (int key = 0, stage = 0; key < end; key += kKeys, stage ^= 1) {
      if (key + kKeys < end) load_keys(key + kKeys, stage ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      barrier();
      const uint32_t key_tile = begin + 2 * stage * kTileBytes;
      attend<T, kDim, kM, kTiles, kMasked>(state, query, key_tile, key_tile + kTileBytes, 0, first, key,
                                           min(kKeys, end - key), p, at);
      barrier();
    }
    finish<T, kDim, kM, kMasked>(state, warp_tile, first, output_rows, lse, p);
  }
}

constexpr int kWarpsAtMost = kMaxThreads / kWarpThreads;

// The number of warps, 4 to 8, that shares tiles of queries with the fewest idle: the largest of equals.
constexpr int resident_warps(int64_t tiles) {
  int best = 4;
  for (int warps = 5; warps <= kWarpsAtMost; ++warps) {
    if (ceil_div(tiles, warps) * warps <= ceil_div(tiles, best) * best) best = warps;
  }
  return int(std::min<int64_t>(best, tiles));
}

template <typename T, int kDim, int kM, int kTiles, bool kMasked>
bool try_resident(ForwardArguments& p, const DeviceLimits& device, void* stream) {
  const int64_t heads = p.batch * p.num_heads, tiles = ceil_div(p.seqlen_q, 16 * kM);
  const int64_t head_bytes = 2 * ceil_div(p.seqlen_k, 16) * 16 * Tile<kDim>::kRowBytes;
  const int warps = resident_warps(tiles);
  const int64_t query_bytes = int64_t(warps) * 16 * kM * Tile<kDim>::kRowBytes;
  if (head_bytes + query_bytes > device.shared_bytes_per_block) return false;
  // Fewer heads than multiprocessors: several blocks share the queries of a head.
  p.parts = int(std::clamp<int64_t>(device.multiprocessors / heads, 1, ceil_div(tiles, warps)));
  p.items = int(heads * p.parts);
  // A second stage hides the next head's way to shared memory, where there is room and a block has several heads.
  const int64_t two_stages = 2 * head_bytes + query_bytes;
  const bool fits = two_stages <= device.shared_bytes_per_block;
  p.stages = fits && p.items > device.multiprocessors ? 2 : 1;
  const int64_t shared = p.stages == 2 ? two_stages : head_bytes + query_bytes;
  const auto kernel = attention_forward_resident<T, kDim, kM, kTiles, kMasked>;
  const int threads = warps * kWarpThreads;
  const int64_t at_once = device.multiprocessors * resident_blocks(kernel, device, threads, shared);
  launch(kernel, {std::min<int64_t>(p.items, at_once), threads, int(shared)}, stream, p);
  return true;
}

template <typename T, int kDim, bool kMasked>
void launch_online(ForwardArguments& p, const DeviceLimits& device, void* stream) {
  constexpr int kM = online_tile(kDim).row_tiles, kTiles = online_tile(kDim).key_tiles;
  if (try_resident<T, kDim, kM, kTiles, kMasked>(p, device, stream)) return;
  const int warps = kM == 2 ? 4 : 8;  // 128 queries
  p.parts = int(ceil_div(p.seqlen_q, warps * 16 * kM));
  p.items = int(p.batch * p.num_heads * p.parts);
  const int shared = (4 * 8 * kTiles + warps * 16 * kM) * Tile<kDim>::kRowBytes;
  launch(attention_forward_streaming<T, kDim, kM, kTiles, kMasked>, {p.items, warps * kWarpThreads, shared}, stream, p);
}

template <typename T, int kDim, bool kMasked>
void launch_forward(ForwardArguments& p, const DeviceLimits& device, void* stream) {
  const bool one_pass = p.seqlen_k > 8 * online_tile(kDim).key_tiles && p.seqlen_k <= 8 * kOnePassTiles;
  if constexpr (kDim == 64) {
    const bool is_short = one_pass && p.seqlen_k <= 8 * kOnePassTilesShort;
    if (is_short && try_resident<T, kDim, 1, kOnePassTilesShort, kMasked>(p, device, stream)) return;
  }
  if (one_pass && try_resident<T, kDim, 1, kOnePassTiles, kMasked>(p, device, stream)) return;
  launch_online<T, kDim, kMasked>(p, device, stream);
}

template <typename T, int kDim>
void attention_forward_head_dim(ForwardArguments& p, void* stream) {
  const DeviceLimits device = device_limits();
  // Without a bias the scale is applied last; −inf times zero, of a key that is not there, would be NaN.
  const bool is_masked = p.is_causal || p.bias.type != BiasType::kNone || p.scale_log2 == 0.0f;
  (is_masked ? launch_forward<T, kDim, true> : launch_forward<T, kDim, false>)(p, device, stream);
}

// Whether a device of compute capability 9.0 runs the form for sm_90a where it can. Not before a measurement of the two
// on such a device says so; until then that form is there by name (fastvit.kernels.cuda.form).
constexpr bool kPrefersSm90 = false;

template <typename T>
void attention_forward_dtype(const AttentionParams& params, void* stream) {
  if (kPrefersSm90 && attention_forward_sm90_why_not(params).empty()) {
    constexpr bool kIsHalf = std::is_same_v<T, Half>;
    return (kIsHalf ? attention_forward_sm90_fp16 : attention_forward_sm90_bf16)(params, stream);
  }
  ForwardArguments p;
  static_cast<AttentionParams&>(p) = params;
  check_sizes(params);
  p.scale_log2 = float(params.scale * double(kLog2E));
  p.query_vectorized = is_vectorized(params.query, params.head_dim);
  p.key_vectorized = is_vectorized(params.key, params.head_dim);
  p.value_vectorized = is_vectorized(params.value, params.head_dim_v);
  p.output_vectorized = is_vectorized(params.output, params.head_dim_v);
  dispatch_head_dim<FASTVIT_CUDA_HEAD_DIMS>(std::max(params.head_dim, params.head_dim_v), [&](auto dim) {
    attention_forward_head_dim<T, decltype(dim)::value>(p, stream);
  });
}

}  // namespace fastvit::cuda
