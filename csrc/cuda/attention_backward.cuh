// Attention backward for sm_80 and up, deterministic, by mma.sync with float accumulators. With
//   P = exp(scale·QKᵀ + bias − LSE),  delta = rowsum(dO ∘ O) − dLSE,  dS = P ∘ (dO Vᵀ − delta):
//   dQ = scale·dS K,  dK = scale·dSᵀ Q,  dV = Pᵀ dO.
//
// One body in two directions. A warp owns 16 rows of two matrices and streams the two others past them:
//   query side  owns Q and dO, streams K and V: S and dP, then dQ += dS K;
//   key side    owns K and V, streams Q and dO: Sᵀ and dPᵀ, then dK += dSᵀ Q and dV += Pᵀ dO.
// S and dP are computed twice, seven products for five, and for that no warp waits for another or adds to its results.
//
// And in two forms:
//   resident    a block takes whole heads: Q, K, V and dO lie in shared memory at once. First the query side, which
//               leaves LSE and delta of each row in shared memory, then the key side.
//   streaming   any length, two launches: a block owns a part of the rows of a side and streams the other side through
//               a ring of two stages. The query side leaves LSE and delta in scratch memory.
#pragma once

#include "attention_backward_step.cuh"
#include "kernels.h"

namespace fastvit::cuda {

// The register file is four quarters of 16,384, so a thread may have 128 where 16 warps run on a multiprocessor, 168
// with 12 and 255 with 8. On the key side it needs kDim / 2 for fragments of K and V, kDim for dK and dV, and some 45
// for a step. Without the fragments of V, read from shared memory at each step instead, a quarter more of such reads,
// it is kDim / 4 fewer.
struct BackwardTile {
  int warps;  // the most of a block
  bool keeps_value;

  __host__ __device__ constexpr int threads() const { return warps * kWarpThreads; }
};

__host__ __device__ constexpr BackwardTile backward_tile(int head_dim, bool resident, bool masked) {
  if (head_dim <= 32 && resident) return {16, true};
  // N = 196 and 197 are 13 tiles of 16 rows: for two blocks of 7 warps side by side V has to go, where no bias needs
  // its registers.
  if (head_dim <= 64 && resident && !masked) return {16, false};
  if (head_dim <= 80) return {12, head_dim <= 72};
  return {8, head_dim <= 104 || !masked};
}

template <typename T, int kDim, bool kMasked>
__global__ void __launch_bounds__(backward_tile(kDim, true, kMasked).threads())
    attention_backward_resident(const __grid_constant__ BackwardArguments p) {
  constexpr BackwardTile kTile = backward_tile(kDim, true, kMasked);
  constexpr uint32_t kRowBytes = Tile<kDim>::kRowBytes;
  const int warp = thread_index() / kWarpThreads, warps = block_threads() / kWarpThreads;
  const int rows_q = round_up(p.seqlen_q, kRowTile), rows_k = round_up(p.seqlen_k, kRowTile);
  const uint32_t statistics = shared_memory();
  const uint32_t query_tile = statistics + rows_q * kStatisticsBytes;
  const uint32_t grad_output_tile = query_tile + rows_q * kRowBytes;
  const uint32_t key_tile = grad_output_tile + rows_q * kRowBytes;
  const uint32_t value_tile = key_tile + rows_k * kRowBytes;

#pragma unroll 1
  for (int item = block_index(); item < p.items; item += grid_blocks()) {
    const HeadIndex at(p, item);
    load_side_async<kDim, false>(query_tile, rows_q, 0, p, at);
    load_side_async<kDim, true>(key_tile, rows_k, 0, p, at);
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
#pragma unroll 1
    for (int own = warp * kRowTile; own < rows_q; own += warps * kRowTile) {
      BackwardState<kDim, false, true> state;
      state.begin(query_tile + own * kRowBytes, grad_output_tile + own * kRowBytes);
      compute_statistics<T>(state, own, p, at);
      const int end = streamed_end<false, kMasked>(p, own, kRowTile);
      Refinement refinement;
#pragma unroll 1
      for (int pass = kMasked && refines_delta(p) ? 0 : 1; pass < 2; ++pass) {
        if (pass == 1) subtract_grad_lse(state, own, p, at);
#pragma unroll 1
        for (int key = 0; key < end; key += kRowTile) {
          backward_step<T, kMasked>(state, key_tile + key * kRowBytes, value_tile + key * kRowBytes, 0, own, key, p, at,
                                    pass == 0, refinement);
        }
        if (pass == 0) refinement.apply(state);
      }
      const int lane = lane_index();
      if (lane % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t row = statistics + (own + 8 * half + lane / 4) * kStatisticsBytes;
          store_shared<float>(row, state.origin[half]);
          store_shared<float>(row + sizeof(float), state.delta[half]);
        }
      }
      finish<T>(state, own, p, at);
    }
    barrier();
#pragma unroll 1
    for (int own = warp * kRowTile; own < rows_k; own += warps * kRowTile) {
      BackwardState<kDim, true, kTile.keeps_value> state;
      Refinement nothing;
      state.begin(key_tile + own * kRowBytes, value_tile + own * kRowBytes);
#pragma unroll 1
      for (int query = streamed_begin<true, kMasked>(p, own); query < p.seqlen_q; query += kRowTile) {
        backward_step<T, kMasked>(state, query_tile + query * kRowBytes, grad_output_tile + query * kRowBytes,
                                  statistics + query * kStatisticsBytes, own, query, p, at, false, nothing);
      }
      finish<T>(state, own, p, at);
    }
    barrier();
  }
}

__device__ __forceinline__ RowStatistics* head_statistics(const BackwardArguments& p, const HeadIndex& at) {
  const HeadIndex anew = at.anew();
  return p.statistics + (anew.batch * p.num_heads + anew.head) * p.padded_q;
}

template <int kDim>
__device__ __forceinline__ void store_statistics(const BackwardState<kDim, false, true>& state, int own,
                                                 const BackwardArguments& p, const HeadIndex& at) {
  const int lane = lane_index();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own + 8 * half + lane / 4;
    if (lane % 4 != 0 || row >= p.padded_q) continue;
    store_global<RowStatistics>(head_statistics(p, at) + row, {state.origin[half], state.delta[half]});
  }
}

// Rows in a stage of the ring. With the rows that a block owns, two stages stay under the 99 KB of sm_86 and sm_89.
__host__ __device__ constexpr int ring_rows(int head_dim) { return head_dim <= 64 ? 64 : 32; }

template <typename T, int kDim, bool kKeySide, bool kMasked>
__global__ void __launch_bounds__(backward_tile(kDim, false, kMasked).threads())
    attention_backward_streaming(const __grid_constant__ BackwardArguments p) {
  constexpr BackwardTile kTile = backward_tile(kDim, false, kMasked);
  constexpr int kRows = ring_rows(kDim);
  constexpr uint32_t kRowBytes = Tile<kDim>::kRowBytes, kTileBytes = kRows * kRowBytes;
  constexpr uint32_t kStageBytes = 2 * kTileBytes + (kKeySide ? kRows * kStatisticsBytes : 0);
  const int warp = thread_index() / kWarpThreads, block_rows = block_threads() / kWarpThreads * kRowTile;
  const uint32_t ring = shared_memory();
  const uint32_t first_tile = ring + 2 * kStageBytes;
  const uint32_t second_tile = first_tile + block_rows * kRowBytes;
  const HeadIndex at(p, block_index() / p.parts);
  const int block_own = block_index() % p.parts * block_rows, own = block_own + warp * kRowTile;

  auto load_stage = [&](int streamed, int stage) {
    const uint32_t target = ring + stage * kStageBytes;
    load_side_async<kDim, !kKeySide>(target, kRows, streamed, p, at);
    if constexpr (kKeySide) {
      const RowStatistics* statistics = head_statistics(p, at);
      for (int i = thread_index(); i < kRows; i += block_threads()) {
        const bool valid = streamed + i < p.padded_q;
        cp_async<8>(target + 2 * kTileBytes + i * kStatisticsBytes, valid ? statistics + streamed + i : statistics,
                    valid);
      }
    }
  };

  const int begin = streamed_begin<kKeySide, kMasked>(p, block_own);
  const int end = streamed_end<kKeySide, kMasked>(p, block_own, block_rows);
  load_side_async<kDim, kKeySide>(first_tile, block_rows, block_own, p, at);
  cp_async_commit();
  if (begin < end) load_stage(begin, 0);
  cp_async_commit();
  cp_async_wait<1>();
  barrier();
  BackwardState<kDim, kKeySide, !kKeySide || kTile.keeps_value> state;
  state.begin(first_tile + warp * kRowTile * kRowBytes, second_tile + warp * kRowTile * kRowBytes);
  if constexpr (!kKeySide) compute_statistics<T>(state, own, p, at);
  // The ring holds what any warp of the block needs; a warp takes its part.
  const int warp_begin = streamed_begin<kKeySide, kMasked>(p, own);
  const int warp_end = streamed_end<kKeySide, kMasked>(p, own, kRowTile);
  // Keys that the first stage holds can be taken twice; of more, only heads of a few elements would gain.
  const bool refines = !kKeySide && kMasked && refines_delta(p) && p.seqlen_k <= kRows;
  Refinement refinement;
#pragma unroll 1
  for (int pass = refines ? 0 : 1; pass < 2; ++pass) {
    if constexpr (!kKeySide) {
      if (pass == 1) {
        subtract_grad_lse(state, own, p, at);
        store_statistics(state, own, p, at);
      }
    }
#pragma unroll 1
    for (int streamed = begin, stage = 0; streamed < end; streamed += kRows, stage ^= 1) {
      if (streamed + kRows < end) load_stage(streamed + kRows, stage ^ 1);
      cp_async_commit();
      cp_async_wait<1>();
      barrier();
      const uint32_t tile = ring + stage * kStageBytes;
      const int last = min(kRows, warp_end - streamed);
#pragma unroll 1
      for (int row = max(0, warp_begin - streamed); row < last; row += kRowTile) {
        backward_step<T, kMasked>(state, tile + row * kRowBytes, tile + kTileBytes + row * kRowBytes,
                                  tile + 2 * kTileBytes + row * kStatisticsBytes, own, streamed + row, p, at, pass == 0,
                                  refinement);
      }
      barrier();
    }
    if constexpr (!kKeySide) {
      if (pass == 0) refinement.apply(state);
    }
  }
  finish<T>(state, own, p, at);
}

// The number of warps, to `most`, that shares tiles with the fewest idle: the largest of equals.
constexpr int balanced_warps(int64_t tiles, int most) {
  int best = 1;
  for (int warps = 2; warps <= std::min<int64_t>(most, tiles); ++warps) {
    const int64_t rounds = ceil_div(tiles, warps), best_rounds = ceil_div(tiles, best);
    if (rounds < best_rounds || (rounds == best_rounds && rounds * warps < best_rounds * best)) best = warps;
  }
  return best;
}

// Blocks of fewer warps leave the loads too little work to hide behind.
constexpr int kFewWarps = 4;

template <typename T, int kDim, bool kMasked>
bool try_resident_backward(BackwardArguments& p, const DeviceLimits& device, void* stream) {
  const int64_t rows_q = round_up(p.seqlen_q, kRowTile), rows_k = round_up(p.seqlen_k, kRowTile);
  const int64_t shared = rows_q * int64_t(sizeof(RowStatistics)) + 2 * (rows_q + rows_k) * Tile<kDim>::kRowBytes;
  if (shared > device.shared_bytes_per_block) return false;
  const int64_t heads = p.batch * p.num_heads, tiles = std::max(rows_q, rows_k) / kRowTile;
  // Where parts of heads, which the streaming form makes, would use twice as many multiprocessors.
  if (2 * heads <= device.multiprocessors && tiles > kFewWarps) return false;
  // Blocks side by side on a multiprocessor share its registers; one loads while another computes.
  constexpr int kMostWarps = backward_tile(kDim, true, kMasked).warps;
  const int64_t side_by_side =
      std::max<int64_t>(1, device.shared_bytes_per_multiprocessor / (shared + kReservedSharedBytes));
  const int warps = balanced_warps(tiles, kMostWarps / int(std::min<int64_t>(side_by_side, kMostWarps / kFewWarps)));
  p.items = int(heads);
  const auto kernel = attention_backward_resident<T, kDim, kMasked>;
  const int threads = warps * kWarpThreads;
  const int64_t at_once = device.multiprocessors * resident_blocks(kernel, device, threads, shared);
  launch(kernel, {std::min(heads, at_once), threads, int(shared)}, stream, p);
  return true;
}

template <typename T, int kDim, bool kKeySide, bool kMasked>
void launch_streaming_backward(BackwardArguments& p, const DeviceLimits& device, void* stream) {
  const int64_t heads = p.batch * p.num_heads, tiles = ceil_div(kKeySide ? p.seqlen_k : p.seqlen_q, kRowTile);
  // Few heads: more parts than registers ask for, until each multiprocessor has one.
  const int64_t fewest = ceil_div(tiles, backward_tile(kDim, false, kMasked).warps);
  p.parts = int(std::clamp(device.multiprocessors / heads, fewest, ceil_div(tiles, kFewWarps)));
  p.items = int(heads * p.parts);
  const int warps = int(ceil_div(tiles, p.parts));
  const int shared = 2 * (2 * ring_rows(kDim) + warps * kRowTile) * Tile<kDim>::kRowBytes +
                     (kKeySide ? 2 * ring_rows(kDim) * int(sizeof(RowStatistics)) : 0);
  launch(attention_backward_streaming<T, kDim, kKeySide, kMasked>, {p.items, warps * kWarpThreads, shared}, stream, p);
}

template <typename T, int kDim, bool kMasked>
void launch_backward(BackwardArguments& p, const Scratch& scratch, void* stream) {
  const DeviceLimits device = device_limits();
  if (try_resident_backward<T, kDim, kMasked>(p, device, stream)) return;
  p.padded_q = round_up(p.seqlen_q, kRowTile);
  constexpr int kFloats = sizeof(RowStatistics) / sizeof(float);
  p.statistics = reinterpret_cast<RowStatistics*>(scratch(p.batch * p.num_heads * p.padded_q * kFloats));
  launch_streaming_backward<T, kDim, false, kMasked>(p, device, stream);
  launch_streaming_backward<T, kDim, true, kMasked>(p, device, stream);
}

template <typename T>
void attention_backward_dtype(const AttentionBackwardParams& params, const Scratch& scratch, void* stream) {
  BackwardArguments p;
  static_cast<AttentionBackwardParams&>(p) = params;
  check_sizes(params);
  p.scale_float = float(params.scale);
  p.scale_log2 = float(params.scale * double(kLog2E));
  p.query_vectorized = is_vectorized(params.query, params.head_dim);
  p.key_vectorized = is_vectorized(params.key, params.head_dim);
  p.value_vectorized = is_vectorized(params.value, params.head_dim_v);
  p.output_vectorized = is_vectorized(params.output, params.head_dim_v);
  p.grad_output_vectorized = is_vectorized(params.grad_output, params.head_dim_v);
  p.grad_query_vectorized = is_vectorized(params.grad_query, params.head_dim);
  p.grad_key_vectorized = is_vectorized(params.grad_key, params.head_dim);
  p.grad_value_vectorized = is_vectorized(params.grad_value, params.head_dim_v);
  dispatch_head_dim<FASTVIT_CUDA_HEAD_DIMS>(std::max(params.head_dim, params.head_dim_v), [&](auto dim) {
    if (p.is_causal || p.bias.type != BiasType::kNone || refines_delta(p)) {
      launch_backward<T, decltype(dim)::value, true>(p, scratch, stream);
    } else {
      launch_backward<T, decltype(dim)::value, false>(p, scratch, stream);
    }
  });
}

}  // namespace fastvit::cuda
