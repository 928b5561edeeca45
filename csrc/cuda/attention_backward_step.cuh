// What a warp does in attention backward: it owns 16 rows of a side, and 16 rows of the other side stream past it in
// each step. attention_backward.cuh has the formulas, and the kernels that this is part of.
#pragma once

#include "attention_common.cuh"

namespace fastvit::cuda {

// Of one query. A row that attends to nothing has the origin +inf: its P are exp2(−inf).
struct alignas(8) RowStatistics {
  float origin;  // LSE · log2 e
  float delta;
};
constexpr uint32_t kStatisticsBytes = sizeof(RowStatistics);

struct BackwardArguments : AttentionBackwardParams {
  float scale_float = 0.0f;
  float scale_log2 = 0.0f;  // scale · log2 e
  bool query_vectorized = false;
  bool key_vectorized = false;
  bool value_vectorized = false;
  bool output_vectorized = false;
  bool grad_output_vectorized = false;
  bool grad_query_vectorized = false;
  bool grad_key_vectorized = false;
  bool grad_value_vectorized = false;
  // Of the streaming form: [B · H, padded_q], and work items, a head and one of its parts.
  RowStatistics* statistics = nullptr;
  int padded_q = 0;
  int items = 0;
  int parts = 1;
};

// See refines_delta.
constexpr int kRefinedKeys = 32;
constexpr int kRefinedHeadDim = 8;

constexpr int kRowTile = 16;  // the rows that a warp owns, and the rows that stream by in one step

// The matrices of a side: Q and dO, or K and V.
struct Side {
  Rows first;
  Rows second;
};

template <bool kKeySide>
__device__ __forceinline__ Side side_rows(const BackwardArguments& p, const HeadIndex& at) {
  if constexpr (kKeySide) {
    return {head_rows(p.key, at, p.seqlen_k, p.head_dim, p.key_vectorized),
            head_rows(p.value, at, p.seqlen_k, p.head_dim_v, p.value_vectorized)};
  } else {
    return {head_rows(p.query, at, p.seqlen_q, p.head_dim, p.query_vectorized),
            head_rows(p.grad_output, at, p.seqlen_q, p.head_dim_v, p.grad_output_vectorized)};
  }
}

// Rows of both matrices of a side, in tiles one after the other.
template <int kDim, bool kKeySide>
__device__ __forceinline__ void load_side_async(uint32_t begin, int tile_rows, int first, const BackwardArguments& p,
                                                const HeadIndex& at) {
  const Side side = side_rows<kKeySide>(p, at.anew());
  load_tile_async<kDim>(begin, side.first, first, tile_rows, thread_index(), block_threads());
  load_tile_async<kDim>(begin + tile_rows * Tile<kDim>::kRowBytes, side.second, first, tile_rows, thread_index(),
                        block_threads());
}

// What a warp owns: fragments of its rows, and the sums over all that streams by.
template <int kDim, bool kKeySide, bool kKeepsSecond>
struct BackwardState {
  RowFragment<kDim> first[1];   // Q; K
  RowFragment<kDim> second[1];  // dO; V, if it is kept
  uint32_t second_rows;         // where it lies in shared memory
  float grad_first[1][Tile<kDim>::kChunks][4];
  float grad_value[1][Tile<kDim>::kChunks][4];  // of the key side
  float origin[2], delta[2];                    // of the query side: rows lane / 4 and lane / 4 + 8

  __device__ __forceinline__ void begin(uint32_t first_rows, uint32_t second) {
    const int lane = lane_index();
    second_rows = second;
    first[0].load(first_rows, 0, lane);
    if constexpr (kKeepsSecond) this->second[0].load(second_rows, 0, lane);
#pragma unroll
    for (int c = 0; c < Tile<kDim>::kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_first[0][c][i] = grad_value[0][c][i] = 0.0f;
    }
  }
};

// LSE and delta of the warp's queries. rowsum(dO ∘ O) is the diagonal of dO Oᵀ, by the same instructions as dO Vᵀ:
// where one key has all the weight, O is its row of V, and dP − delta is exactly 0, as it should be.
template <typename T, int kDim>
__device__ __forceinline__ void compute_statistics(BackwardState<kDim, false, true>& state, int first_query,
                                                   const BackwardArguments& p, const HeadIndex& at) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  const int lane = lane_index();
  const HeadIndex anew = at.anew();
  const Rows output = head_rows(p.output, anew, p.seqlen_q, p.head_dim_v, p.output_vectorized);
  const int64_t head_offset = (anew.batch * p.num_heads + anew.head) * p.seqlen_q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + 8 * half + lane / 4;
    float product[4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; c += 4) {
      Chunk o{};
      if (c + lane % 4 < kChunks) o = load_chunk(output, query, (c + lane % 4) * kChunkElements);
      transpose_words(o, lane);
#pragma unroll
      for (int k = c; k < c + 4 && k < kChunks; k += 2) {
        const auto& left = state.second[0].chunk;
        if (k + 1 < kChunks) {
          mma_m16n8k16<T>(product, {left[k][0], left[k][1], left[k + 1][0], left[k + 1][1]}, o.word[k - c],
                          o.word[k - c + 1]);
        } else {
          mma_m16n8k8<T>(product, left[k][0], left[k][1], o.word[k - c]);
        }
      }
    }
    // Row 8 half + lane / 4 against itself.
    const float mine = lane / 4 % 2 ? product[2 * half + 1] : product[2 * half];
    const float sum = row_sum(lane / 8 == lane % 4 ? mine : 0.0f);
    float lse = -infinity();
    if (query < p.seqlen_q) lse = load_global<float>(static_cast<const float*>(p.lse) + head_offset + query);
    state.origin[half] = lse == -infinity() ? infinity() : lse * kLog2E;
    state.delta[half] = lse == -infinity() ? 0.0f : sum;
  }
}

// delta so far is rowsum(dO ∘ O); here the gradient of the LSE itself goes off it.
template <int kDim>
__device__ __forceinline__ void subtract_grad_lse(BackwardState<kDim, false, true>& state, int first_query,
                                                  const BackwardArguments& p, const HeadIndex& at) {
  if (!p.grad_lse) return;
  const HeadIndex anew = at.anew();
  const float* grad_lse = static_cast<const float*>(p.grad_lse) + (anew.batch * p.num_heads + anew.head) * p.seqlen_q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + 8 * half + lane_index() / 4;
    if (query < p.seqlen_q && state.origin[half] != infinity())
      state.delta[half] -= load_global<float>(grad_lse + query);
  }
}

// P and dS of the warp's rows against 16 that stream by, from number `streamed` of the head on; first, second and
// statistics (for the key side) are where they lie in shared memory.
template <typename T, bool kMasked, int kDim, bool kKeySide, bool kKeepsSecond>
__device__ __forceinline__ void probabilities(float (&scores)[kRowTile / 8][1][4], float (&grads)[kRowTile / 8][1][4],
                                              const BackwardState<kDim, kKeySide, kKeepsSecond>& state, uint32_t first,
                                              uint32_t second, uint32_t statistics, int own, int streamed,
                                              const BackwardArguments& p, const HeadIndex& at) {
  constexpr int kTiles = kRowTile / 8;
  const int lane = lane_index();
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[j][0][i] = grads[j][0][i] = 0.0f;
    multiply_rows<T, kDim, 1>(scores[j], state.first, first, 8 * j, lane);
    if constexpr (kKeepsSecond) multiply_rows<T, kDim, 1>(grads[j], state.second, second, 8 * j, lane);
  }
  if constexpr (!kKeepsSecond) multiply_rows_of_tiles<T, kDim>(grads, state.second_rows, second, lane);
  if constexpr (kMasked) {
    apply_bias<kKeySide, 1, kTiles>(scores, at, kKeySide ? streamed : own, kKeySide ? own : streamed, p, p.scale_log2);
  }
  const float factor = kMasked ? 1.0f : p.scale_log2;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    float origin[2] = {state.origin[0], state.origin[1]}, delta[2] = {state.delta[0], state.delta[1]};
    if constexpr (kKeySide) {
      const int row = 8 * j + 2 * (lane % 4);
      const Chunk two = load_shared<Chunk>(statistics + row * kStatisticsBytes);
      origin[0] = as_float(two.word[0]), delta[0] = as_float(two.word[1]);
      origin[1] = as_float(two.word[2]), delta[1] = as_float(two.word[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int of = kKeySide ? i % 2 : i / 2;
      scores[j][0][i] = exp2_approx(scores[j][0][i] * factor - origin[of]);
      grads[j][0][i] = scores[j][0][i] * (grads[j][0][i] - delta[of]);
    }
  }
  // Rows beyond the sequence are zeros, but 0 · inf is not, and exp2(0 − LSE) may be infinite.
  const int rows = int(kKeySide ? p.seqlen_q : p.seqlen_k) - streamed;
  if (rows < kRowTile) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (8 * j + 2 * (lane % 4) + i % 2 >= rows) scores[j][0][i] = grads[j][0][i] = 0.0f;
      }
    }
  }
}

// O is rounded to 16 bits. Over many keys that is lost among the roundings of dS; of a few keys, or of heads of a few
// elements, it is the largest error of all, and the query side takes its keys twice: first for
//   delta += Σ P (dP − delta) / Σ P,
// which is what rowsum(dO ∘ O) would be without the rounding. Only the masked kernels have that pass, and registers for
// it; such calls go to them.
__host__ __device__ inline bool refines_delta(const BackwardArguments& p) {
  return p.seqlen_k <= kRefinedKeys || p.head_dim_v <= kRefinedHeadDim;
}

// What such a first step sums instead of taking products.
struct Refinement {
  float difference[2] = {};
  float sum[2] = {};

  template <int kDim>
  __device__ __forceinline__ void apply(BackwardState<kDim, false, true>& state) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float all = row_sum(sum[half]), correction = row_sum(difference[half]) / all;
      if (all != 0.0f) state.delta[half] += correction;
    }
  }
};

template <typename T, bool kMasked, int kDim, bool kKeySide, bool kKeepsSecond>
__device__ __forceinline__ void backward_step(BackwardState<kDim, kKeySide, kKeepsSecond>& state, uint32_t first,
                                              uint32_t second, uint32_t statistics, int own, int streamed,
                                              const BackwardArguments& p, const HeadIndex& at, bool refines,
                                              Refinement& refinement) {
  const int lane = lane_index();
  float scores[kRowTile / 8][1][4], grads[kRowTile / 8][1][4];
  probabilities<T, kMasked>(scores, grads, state, first, second, statistics, own, streamed, p, at);
  if constexpr (!kKeySide) {
    if (refines) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        refinement.difference[i / 2] += grads[0][0][i] + grads[1][0][i];
        refinement.sum[i / 2] += scores[0][0][i] + scores[1][0][i];
      }
      return;
    }
  }
  uint32_t left[1][4];
  pack_left<T>(left[0], grads[0][0], grads[1][0]);
  multiply_columns<T, kDim, 1>(state.grad_first, left, first, 0, lane);
  if constexpr (kKeySide) {
    pack_left<T>(left[0], scores[0][0], scores[1][0]);
    multiply_columns<T, kDim, 1>(state.grad_value, left, second, 0, lane);
  }
}

template <typename T, int kDim, bool kKeySide, bool kKeepsSecond>
__device__ __forceinline__ void finish(const BackwardState<kDim, kKeySide, kKeepsSecond>& state, int own,
                                       const BackwardArguments& p, const HeadIndex& at) {
  const int lane = lane_index();
  if constexpr (kKeySide) {
    const Rows key = head_rows(p.grad_key, at.anew(), p.seqlen_k, p.head_dim, p.grad_key_vectorized);
    store_accumulators<T, kDim>(state.grad_first[0], p.scale_float, key, own, lane);
    const Rows value = head_rows(p.grad_value, at.anew(), p.seqlen_k, p.head_dim_v, p.grad_value_vectorized);
    store_accumulators<T, kDim>(state.grad_value[0], 1.0f, value, own, lane);
  } else {
    const Rows query = head_rows(p.grad_query, at.anew(), p.seqlen_q, p.head_dim, p.grad_query_vectorized);
    store_accumulators<T, kDim>(state.grad_first[0], p.scale_float, query, own, lane);
  }
}

// Of the rows that stream by, those that rows [own, own + count) look at, or are looked at by.
template <bool kKeySide, bool kMasked>
__device__ __forceinline__ int streamed_begin(const BackwardArguments& p, int own) {
  return kMasked && kKeySide && p.is_causal ? own : 0;
}

template <bool kKeySide, bool kMasked>
__device__ __forceinline__ int streamed_end(const BackwardArguments& p, int own, int count) {
  if constexpr (kKeySide) return int(p.seqlen_q);
  return kMasked && p.is_causal ? min(int(p.seqlen_k), own + count) : int(p.seqlen_k);
}

}  // namespace fastvit::cuda
