// What attention forward and backward share: views of one head, the scores of a fragment in base 2.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../params.h"
#include "launch.h"
#include "tile.cuh"

namespace fastvit::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kMaxThreads = 256;

// The head dims with kernels of their own; any other runs in the next one up, with zeros.
#ifndef FASTVIT_CUDA_HEAD_DIMS
#define FASTVIT_CUDA_HEAD_DIMS 32, 64, 72, 80, 88, 96, 104, 128
#endif

// Calls function(std::integral_constant<int, kDim>) for the smallest kDim that holds head_dim.
template <int kDim, int... kLarger, typename Function>
void dispatch_head_dim(int64_t head_dim, Function function) {
  if (head_dim <= kDim) return function(std::integral_constant<int, kDim>());
  if constexpr (sizeof...(kLarger) > 0) {
    dispatch_head_dim<kLarger...>(head_dim, function);
  } else {
    throw std::invalid_argument("head_dim " + std::to_string(head_dim) + ": the CUDA kernels end at " +
                                std::to_string(kDim));
  }
}

// Work items and positions are counted in 32 bits, addresses in 64.
constexpr int64_t kMostItems = 1 << 30;

// Why a call is too large for these kernels; empty where it is not.
inline std::string sizes_why_not(const AttentionParams& p) {
  const int64_t seqlen = std::max(p.seqlen_q, p.seqlen_k);
  if (seqlen <= kMostItems && p.batch * p.num_heads <= kMostItems / ceil_div(seqlen, 16)) return "";
  return "seqlen and batch · heads · seqlen / 16 are counted to 2^30";
}

inline void check_sizes(const AttentionParams& p) {
  const std::string reason = sizes_why_not(p);
  if (!reason.empty()) throw std::invalid_argument("query, key: in the CUDA kernels " + reason);
}

inline bool is_vectorized(const View4& view, int64_t columns) {
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  const int64_t all = view.batch_stride | view.head_stride | view.row_stride | columns;
  return address % sizeof(Chunk) == 0 && all % kChunkElements == 0;
}

struct HeadIndex {
  int batch;
  int head;

  __device__ __forceinline__ HeadIndex(const AttentionParams& p, int index)
      : batch(index / int(p.num_heads)), head(index % int(p.num_heads)) {}

  // The same, but the compiler does not know that it is: addresses derived from it are computed where they are used
  // instead of being kept in registers, across loops, that the accumulators need.
  __device__ __forceinline__ HeadIndex anew() const {
    const int zero = lane_index() / kWarpThreads;
    HeadIndex same = *this;
    same.batch += zero;
    same.head += zero;
    return same;
  }
};

// One head of a view.
__device__ __forceinline__ Rows head_rows(const View4& view, const HeadIndex& at, int64_t rows, int64_t columns,
                                          bool vectorized) {
  const int64_t offset = at.batch * view.batch_stride + at.head * view.head_stride;
  return {static_cast<const char*>(view.data) + offset * kElementBytes, view.row_stride * kElementBytes, int(rows),
          int(columns), vectorized};
}

// A bias element of each type as what is added to a score in base 2. A mask adds nothing, or −inf where it forbids.
struct NoBias {
  static constexpr int kBytes = 0;
  static __device__ __forceinline__ float load(const char*) { return 0.0f; }
};
struct BoolBias {
  static constexpr int kBytes = 1;
  static __device__ __forceinline__ float load(const char* at) { return load_global<uint8_t>(at) ? 0.0f : -infinity(); }
};
template <typename T>
struct HalfBias {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ float load(const char* at) {
    return to_float<T>(load_global<uint16_t>(at)) * kLog2E;
  }
};
template <typename F>
struct FloatBias {
  static constexpr int kBytes = sizeof(F);
  static __device__ __forceinline__ float load(const char* at) { return float(load_global<F>(at)) * kLog2E; }
};

// Calls function(the struct above that reads this type).
template <typename Function>
__device__ __forceinline__ void dispatch_bias(BiasType type, Function function) {
  switch (type) {
    case BiasType::kNone:
      return function(NoBias());
    case BiasType::kBool:
      return function(BoolBias());
    case BiasType::kFloat16:
      return function(HalfBias<Half>());
    case BiasType::kBFloat16:
      return function(HalfBias<BFloat16>());
    case BiasType::kFloat32:
      return function(FloatBias<float>());
    case BiasType::kFloat64:
      return function(FloatBias<double>());
  }
}

// Scores of kM × 16 queries against 8 kTiles keys (kTransposed: of keys against queries) to base 2, with the bias added
// and forbidden pairs at −inf. The type of the bias is asked once for all of them. What is beyond the sequences reads
// the bias of the last row or column, so that no lane branches: none of those scores is used.
template <bool kTransposed, int kM, int kTiles>
__device__ __forceinline__ void apply_bias(float (&scores)[kTiles][kM][4], const HeadIndex& at, int first_query,
                                           int first_key, const AttentionParams& p, float scale_log2) {
  const int lane = lane_index();
  const int first_row = kTransposed ? first_key : first_query, first_column = kTransposed ? first_query : first_key;
  const int last_row = int(kTransposed ? p.seqlen_k : p.seqlen_q) - 1;
  const int last_column = int(kTransposed ? p.seqlen_q : p.seqlen_k) - 1;
  const HeadIndex anew = at.anew();
  dispatch_bias(p.bias.type, [&](auto element) {
    using Element = decltype(element);
    const int64_t row_stride = (kTransposed ? p.bias.key_stride : p.bias.query_stride) * Element::kBytes;
    const int64_t column_stride = (kTransposed ? p.bias.query_stride : p.bias.key_stride) * Element::kBytes;
    const char* matrix = static_cast<const char*>(p.bias.data) +
                         (anew.batch * p.bias.batch_stride + anew.head * p.bias.head_stride) * Element::kBytes;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const char* row_bias[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_bias[half] = matrix + min(first_row + 16 * m + 8 * half + lane / 4, last_row) * row_stride;
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (first_column + 8 * j > last_column) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t offset = min(first_column + 8 * j + 2 * (lane % 4) + i, last_column) * column_stride;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& score = scores[j][m][2 * half + i];
            score = score * scale_log2 + Element::load(row_bias[half] + offset);
          }
        }
      }
    }
  });
  if (!p.is_causal) return;
  const int diagonal = first_row - first_column;
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < kM * 4; ++i) {
      const int row = diagonal + 16 * (i / 4) + 8 * (i % 4 / 2) + lane / 4, column = 8 * j + 2 * (lane % 4) + i % 2;
      // Forbidden: a key after its query.
      if (kTransposed ? row > column : column > row) scores[j][i / 4][i % 4] = -infinity();
    }
  }
}

}  // namespace fastvit::cuda
