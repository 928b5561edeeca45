// Attention forward: O = softmax(scale Q K^T + bias) V, one block of queries at a time, the N×N matrix never whole.
//
// Up to kKeyBlock keys a block of queries sees all its scores at once and the softmax is exact in one pass; beyond that
// the running maximum and sum of the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) carry it on.
#pragma once

#include "attention_common.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// 1024 keys × 32 queries × 4 bytes = 128 KiB of scores: they stay in the second-level cache.
constexpr int64_t kKeyBlock = 1024;

template <class In>
class AttentionForward {
  using T = Compute<In>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t W = kPanel<T>;

 public:
  explicit AttentionForward(const AttentionParams& p) : p_(p), scale_(p.scale) {
    key_blocks_ = ceil_div(p.seqlen_k, kKeyBlock);
    keys_per_block_ = ceil_div(p.seqlen_k, key_blocks_);
    padded_dim_ = round_up(p.head_dim, L);
    padded_dim_v_ = round_up(p.head_dim_v, L);
  }

  static int64_t blocks_per_head(const AttentionParams& p) { return ceil_div(p.seqlen_q, W); }

  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure);
    return measure.used();
  }

  void run(int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
    const int64_t per_head = blocks_per_head(p_);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / per_head, batch = index / p_.num_heads, head = index % p_.num_heads;
      if (index != loaded) {
        key_ = widen_head<In>(p_.key, batch, head, p_.seqlen_k, p_.head_dim, key_buffer_);
        value_ = widen_head<In>(p_.value, batch, head, p_.seqlen_k, p_.head_dim_v, value_buffer_);
        loaded = index;
      }
      const int64_t first = task % per_head * W;
      run_block({batch, head, first, min64(W, p_.seqlen_q - first)});
    }
  }

 private:
  void allocate(Arena& arena) {
    if constexpr (!__is_same(In, T)) {
      key_buffer_ = arena.take<T>(p_.seqlen_k * p_.head_dim);
      value_buffer_ = arena.take<T>(p_.seqlen_k * p_.head_dim_v);
    }
    rows_ = arena.take<T>(W * max64(padded_dim_, padded_dim_v_));
    query_lanes_ = arena.take<T>(padded_dim_ * W);
    output_lanes_ = arena.take<T>(padded_dim_v_ * W);
    scores_ = arena.take<T>(keys_per_block_ * W);
    if (p_.bias.type != BiasType::kNone) {
      bias_rows_ = arena.take<T>(W * round_up(keys_per_block_, L));
      bias_lanes_ = arena.take<T>(W * round_up(keys_per_block_, L));
    }
  }

  void run_block(const QueryBlock<T>& block) {
    const In* query = head_of<In>(p_.query, block.batch, block.head) + block.first * p_.query.row_stride;
    load_lanes(query, p_.query.row_stride, block.count, p_.head_dim, scale_.queries, rows_, query_lanes_);
    for (int v = 0; v < kTileVectors; ++v) {
      maximum_[v] = splat(T(-kInfinity));
      sum_[v] = Vec<T>{};
    }
    const int64_t all_keys = p_.is_causal ? min64(p_.seqlen_k, block.first + block.count) : p_.seqlen_k;
    for (int64_t first_key = 0; first_key < all_keys; first_key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - first_key);
      compute_scores(p_, block, key_, query_lanes_, scale_.scores, first_key, keys, scores_, bias_rows_, bias_lanes_);
      for (int v = 0; v < block.vectors(); ++v) softmax_lanes(v, keys, first_key > 0);
      const TileArgs<T> args{
          value_.data + first_key * value_.stride, 1, value_.stride, scores_, W, output_lanes_, W, keys};
      if (first_key == 0) {
        panel_product<T, false>(p_.head_dim_v, block.vectors(), args);
      } else {
        panel_product<T, true>(p_.head_dim_v, block.vectors(), args);
      }
    }
    write(block);
  }

  // Turns vector v of the scores into probabilities, not yet divided by their sum.
  void softmax_lanes(int v, int64_t keys, bool later) {
    T* scores = scores_ + v * L;
    const Vec<T> high = maximum(maximum_of_lanes(scores, keys), maximum_[v]);
    // Without a key so far any finite offset will do; NaN scores must still reach exp.
    Vec<T> offset = high == T(-kInfinity) ? Vec<T>{} : high;
    if (later) {
      Vec<T> shrink = exp(maximum_[v] - offset);
      sum_[v] *= shrink;
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        T* output = output_lanes_ + d * W + v * L;
        store(output, load(output) * shrink);
      }
    }
    maximum_[v] = high;
    for (int64_t first = 0; first < keys; first += kSumKeys) {
      Vec<T> sum[2] = {};
      for (int64_t j = first; j < min64(first + kSumKeys, keys); ++j) {
        Vec<T> exponential = exp(load(scores + j * W) - offset);
        store(scores + j * W, exponential);
        sum[j & 1] += exponential;
      }
      sum_[v] += sum[0] + sum[1];
    }
  }

  void write(const QueryBlock<T>& block) {
    T* lse = static_cast<T*>(p_.lse) + (block.batch * p_.num_heads + block.head) * p_.seqlen_q + block.first;
    for (int v = 0; v < block.vectors(); ++v) {
      // A sum of exactly 0 is a row without keys: its output is 0. A NaN sum compares false and stays NaN.
      Vec<T> inverse = sum_[v] == T(0) ? Vec<T>{} : T(1) / sum_[v];
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        T* output = output_lanes_ + d * W + v * L;
        store(output, load(output) * inverse);
      }
      Vec<T> offset = maximum_[v] == T(-kInfinity) ? Vec<T>{} : maximum_[v];
      for (int lane = 0; lane < L && v * L + lane < block.count; ++lane) {
        lse[v * L + lane] = offset[lane] + T(::log(double(sum_[v][lane])));
      }
    }
    transpose(output_lanes_, W, padded_dim_v_, block.vectors() * L, rows_, padded_dim_v_);
    In* output = mutable_head_of<In>(p_.output, block.batch, block.head) + block.first * p_.output.row_stride;
    for (int64_t i = 0; i < block.count; ++i) {
      store_row(rows_ + i * padded_dim_v_, p_.head_dim_v, output + i * p_.output.row_stride);
    }
  }

  const AttentionParams& p_;
  const Scale<T> scale_;
  int64_t key_blocks_, keys_per_block_, padded_dim_, padded_dim_v_;
  Matrix<T> key_{}, value_{};
  T *key_buffer_ = nullptr, *value_buffer_ = nullptr;
  T *rows_, *query_lanes_, *output_lanes_, *scores_;
  T *bias_rows_ = nullptr, *bias_lanes_ = nullptr;
  Vec<T> maximum_[kTileVectors], sum_[kTileVectors];
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
