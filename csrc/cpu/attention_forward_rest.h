// The few keys beside whole panels of tiles, in FMAs: a class token makes 32 k + 1 of them, and in tiles one costs as
// much as 32. They have their scores before a block's softmax begins, and are weighed when its output is written.
#pragma once

#include "attention_common.h"
#include "split.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// dots[i][j] = factor · few[i] · many[j] for `rows` rows of `many`, in whole vectors. Rows of `few` are padded with
// zeros to whole vectors.
template <class In>
inline void dot_rows(const float* few, int64_t few_rows, const In* many, int64_t stride, int64_t rows, int64_t depth,
                     float factor, float* dots, int64_t dots_stride) {
  constexpr int L = kLanes<float>;
  const int64_t padded = round_up(depth, L), whole = depth / L * L;
  for (int64_t row = 0; row < rows; row += L) {
    const In* at[L];
    for (int r = 0; r < L; ++r) at[r] = many + min64(row + r, rows - 1) * stride;
    keep_tiles_awake();
    for (int64_t i = 0; i < few_rows; ++i) {
      const float* left = few + i * padded;
      Vec<float> sums[L] = {};
      for (int64_t first = 0; first < whole; first += L) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) sums[r] += load(left + first) * load_all(at[r] + first);
      }
      if (whole < depth) {
#pragma GCC unroll 16
        for (int r = 0; r < L; ++r) sums[r] += load(left + whole) * load_first(at[r] + whole, depth - whole);
      }
      sum_lanes_step<float, 1>(sums);
      store(dots + i * dots_stride + row, sums[0] * factor);
    }
  }
}

template <class In>
class RestOfKeys {
  static constexpr int64_t L = kLanes<float>;

 public:
  // None where there are more than `most`, or under a causal mask, where only the last queries see them.
  RestOfKeys(const AttentionParams& p, int64_t most)
      : p_(p), padded_dim_(round_up(p.head_dim, L)), padded_dim_v_(round_up(p.head_dim_v, kTilePanel)) {
    const int64_t rest = p.seqlen_k % kTilePanel;
    if (!p.is_causal && p.seqlen_k > kTilePanel && rest <= most) count_ = rest;
  }

  int64_t count() const { return count_; }

  void allocate(Arena& arena) {
    keys_ = arena.take<float>(count_ * padded_dim_);
    values_ = arena.take<float>(count_ * padded_dim_v_);
    scores_ = arena.take<float>(count_ * kTilePanel);
  }

  void load_head(const In* key, const In* value) {
    load_last(key, p_.key.row_stride, p_.head_dim, padded_dim_, keys_);
    load_last(value, p_.value.row_stride, p_.head_dim_v, padded_dim_v_, values_);
  }

  // Scores of a block's queries, times `factor`, and their bias; raises the queries' maxima.
  void multiply_keys(const QueryBlock<float>& block, const In* query, float factor, float* maxima) {
    if (count_ == 0) return;
    dot_rows(keys_, count_, query, p_.query.row_stride, block.count, p_.head_dim, factor, scores_, kTilePanel);
    if (p_.bias.type != BiasType::kNone) add_bias(block);
    for (int64_t i = 0; i < block.count; i += L) {
      Vec<float> high = load(maxima + i);
      for (int64_t k = 0; k < count_; ++k) high = maximum(load(scores_ + k * kTilePanel + i), high);
      store(maxima + i, high);
    }
  }

  // Turns the scores into exponentials and adds them to the sums of their queries; exponential(scores, i) computes
  // those of a vector of queries that begins at i.
  template <class F>
  void add_exponentials(int64_t queries, const F& exponential, float* sums) {
    for (int64_t i = 0; i < queries; i += L) {
      Vec<float> sum = load(sums + i);
      for (int64_t k = 0; k < count_; ++k) {
        float* scores = scores_ + k * kTilePanel + i;
        const Vec<float> weights = exponential(load(scores), i);
        store(scores, weights);
        sum += weights;
      }
      store(sums + i, sum);
    }
  }

  // Adds the weighed values to columns [column, column + 32) of query i's output.
  [[gnu::always_inline]] void add_values(int64_t i, int64_t column, Vec<float>& low, Vec<float>& high) const {
    for (int64_t k = 0; k < count_; ++k) {
      const float weight = scores_[k * kTilePanel + i];
      const float* values = values_ + k * padded_dim_v_ + column;
      low += weight * load(values);
      high += weight * load(values + L);
    }
  }

 private:
  void add_bias(const QueryBlock<float>& block) {
    const BiasView& bias = p_.bias;
    const int64_t offset = bias_offset(bias, block, p_.seqlen_k - count_);
    alignas(64) float rows[L][L], lanes[L][L];
    for (int64_t i = 0; i < block.count; i += L) {
      const int64_t queries = min64(L, block.count - i), begin = offset + i * bias.query_stride;
      const auto add = [&](const auto& row) {
        load_square<false, float>(row, queries, count_, Unscaled(), lanes[0], L);
        for (int64_t k = 0; k < count_; ++k) {
          float* scores = scores_ + k * kTilePanel + i;
          store(scores, load(scores) + load(lanes[k]));
        }
      };
      if (lies_as_added(bias)) {
        const float* source = static_cast<const float*>(bias.data) + begin;
        add([&](int64_t r) { return source + r * bias.query_stride; });
      } else {
        for (int64_t r = 0; r < queries; ++r) load_bias_row(bias, begin + r * bias.query_stride, count_, rows[r]);
        add([&](int64_t r) { return rows[r]; });
      }
    }
  }

  void load_last(const In* source, int64_t stride, int64_t columns, int64_t padded, float* target) const {
    load_rows(source + (p_.seqlen_k - count_) * stride, stride, count_, columns, 1.0f, target, padded);
  }

  const AttentionParams& p_;
  int64_t count_ = 0;
  const int64_t padded_dim_, padded_dim_v_;
  float *keys_ = nullptr, *values_ = nullptr, *scores_ = nullptr;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
