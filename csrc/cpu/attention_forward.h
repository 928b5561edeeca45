// Attention forward: O = softmax(scale Q K^T + bias) V, one block of queries at a time, the N×N matrix never whole.
//
// Up to kKeyBlock keys a block of queries sees all its scores at once and the softmax is exact in one pass; beyond that
// the running maximum and sum of the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022) carry it on.
#pragma once

#include "attention_common.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// 1024 keys × 32 queries × 4 bytes = 128 KiB of scores: they stay in the second-level cache.
constexpr int64_t kKeyBlock = 1024;

// Queries beside whole vectors of them (a class token makes 16 k + 1) that are computed one by one, which costs an
// eighth of a vector each with 16 lanes, a quarter with 8.
template <class T>
constexpr int64_t kSingleQueries = kLanes<T> * 3 / 8;

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
    streamed_ = __is_same(In, float) && streams_output<In>(p);
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
        for (int64_t first = 0; first < p_.seqlen_k; first += keys_per_block_) {
          pack_rows(head_of<In>(p_.key, batch, head) + first * p_.key.row_stride, p_.key.row_stride, key_block(first));
        }
        pack_columns(head_of<In>(p_.value, batch, head), p_.value.row_stride, value_);
        loaded = index;
      }
      run_block(block_of(task));
    }
    end_stream(streamed_);
  }

 private:
  QueryBlock<T> block_of(int64_t task) const {
    const int64_t per_head = blocks_per_head(p_), index = task / per_head, first = task % per_head * W;
    return {index / p_.num_heads, index % p_.num_heads, first, min64(W, p_.seqlen_q - first)};
  }
  void allocate(Arena& arena) {
    key_ = arena.take<T>(key_blocks_ * PackedMatrix<T>::size(keys_per_block_, p_.head_dim));
    value_ = PackedMatrix<T>::take(arena, p_.head_dim_v, p_.seqlen_k);
    query_lanes_ = arena.take<T>(padded_dim_ * W);
    output_lanes_ = arena.take<T>(padded_dim_v_ * W);
    scores_ = arena.take<T>(keys_per_block_ * W);
    query_row_ = arena.take<T>(padded_dim_);
    score_row_ = arena.take<T>(keys_per_block_ + kTileStride<T>);
    output_row_ = arena.take<T>(PackedMatrix<T>::size(p_.head_dim_v, 1));
    if (p_.bias.type != BiasType::kNone) {
      bias_rows_ = arena.take<T>(W * round_up(keys_per_block_, L));
      bias_lanes_ = arena.take<T>(W * round_up(keys_per_block_, L));
    }
  }

  // The keys from `first` on that are treated together.
  PackedMatrix<T> key_block(int64_t first) const {
    return {key_ + first / keys_per_block_ * PackedMatrix<T>::size(keys_per_block_, p_.head_dim),
            min64(keys_per_block_, p_.seqlen_k - first), p_.head_dim};
  }

  const In* query_of(const QueryBlock<T>& block) const {
    return head_of<In>(p_.query, block.batch, block.head) + block.first * p_.query.row_stride;
  }
  In* output_of(const QueryBlock<T>& block) const {
    return mutable_head_of<In>(p_.output, block.batch, block.head) + block.first * p_.output.row_stride;
  }
  T* lse_of(const QueryBlock<T>& block) const {
    return static_cast<T*>(p_.lse) + (block.batch * p_.num_heads + block.head) * p_.seqlen_q + block.first;
  }

  void run_block(QueryBlock<T> block) {
    fetch_rows(query_of(block), p_.query.row_stride, block.count, p_.head_dim);
    if (!streamed_) fetch_rows<true>(output_of(block), p_.output.row_stride, block.count, p_.head_dim_v);
    const int64_t rest = block.count % L, single = rest <= kSingleQueries<T> ? rest : 0;
    const int64_t end = block.first + block.count;
    block.count -= single;
    if (block.count > 0) run_lanes(block);
    for (block.first += block.count, block.count = 1; block.first < end; ++block.first) run_row(block);
  }

  void run_lanes(const QueryBlock<T>& block) {
    const In* query = query_of(block);
    load_transposed(query, p_.query.row_stride, block.count, block.count, p_.head_dim, scale_.queries, query_lanes_, W);
    for (int v = 0; v < kTileVectors; ++v) {
      maximum_[v] = splat(T(-kInfinity));
      sum_[v] = {};
    }
    const int64_t all_keys = p_.is_causal ? min64(p_.seqlen_k, block.first + block.count) : p_.seqlen_k;
    for (int64_t first_key = 0; first_key < all_keys; first_key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - first_key);
      compute_scores(p_, block, key_block(first_key), query_lanes_, scale_.scores, first_key, keys, scores_, bias_rows_,
                     bias_lanes_);
      for (int v = 0; v < block.vectors(); ++v) softmax_lanes(v, keys, first_key > 0);
      if (first_key == 0) {
        packed_product<T, false>(value_, p_.head_dim_v, 0, keys, block.vectors(), scores_, output_lanes_);
      } else {
        packed_product<T, true>(value_, p_.head_dim_v, first_key, keys, block.vectors(), scores_, output_lanes_);
      }
    }
    write(block);
  }

  // One query by itself, keys and columns of V in the lanes.
  void run_row(const QueryBlock<T>& block) {
    load_row(query_of(block), p_.head_dim, scale_.queries, query_row_);
    const auto in_tiles = [&](int64_t, int64_t tile) { return output_row_ + tile * kTileStride<T>; };
    T high = T(-kInfinity), sum = 0;
    const int64_t all_keys = p_.is_causal ? min64(p_.seqlen_k, block.first + 1) : p_.seqlen_k;
    for (int64_t first_key = 0; first_key < all_keys; first_key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - first_key);
      // A tile's lanes beyond its rows are overwritten by the next tile.
      row_product<T, false>(key_block(first_key), keys, 0, p_.head_dim, query_row_,
                            [&](int64_t first, int64_t) { return score_row_ + first; });
      finish_row(block, first_key, keys);
      const T before = high;
      high = maximum_of_row(keys, high);
      const T offset = high == T(-kInfinity) ? T(0) : high;
      if (first_key > 0) {
        const T shrink = exp(splat(before - offset))[0];
        sum *= shrink;
        for (int64_t d = 0; d < PackedMatrix<T>::size(p_.head_dim_v, 1); d += L) {
          store(output_row_ + d, load(output_row_ + d) * shrink);
        }
      }
      sum += exponentials_of_row(keys, offset);
      if (first_key == 0) {
        row_product<T, false>(value_, p_.head_dim_v, 0, keys, score_row_, in_tiles);
      } else {
        row_product<T, true>(value_, p_.head_dim_v, first_key, keys, score_row_, in_tiles);
      }
    }
    const T inverse = sum == T(0) ? T(0) : T(1) / sum;
    for_each_tile(p_.head_dim_v, [&](int64_t first, int64_t columns, int64_t tile) {
      for (int64_t d = 0; d < columns; d += L) {
        store_first(load(in_tiles(first, tile) + d) * inverse, columns - d, output_of(block) + first + d);
      }
    });
    store_first((high == T(-kInfinity) ? T(0) : high) + log_of_sum(splat(sum)), 1, lse_of(block));
  }

  // Scale and bias, and -inf up to a whole vector of keys.
  void finish_row(const QueryBlock<T>& block, int64_t first_key, int64_t keys) {
    const Vec<T> scale = splat(scale_.scores);
    if (p_.bias.type != BiasType::kNone) {
      load_bias_row(p_.bias, bias_offset(p_.bias, block, first_key), keys, bias_rows_);
      for (int64_t j = 0; j < keys; j += L) store(score_row_ + j, load(score_row_ + j) * scale + load(bias_rows_ + j));
    } else if (scale_.scores != T(1)) {
      for (int64_t j = 0; j < keys; j += L) store(score_row_ + j, load(score_row_ + j) * scale);
    }
    for (int64_t j = keys; j % L != 0; ++j) score_row_[j] = T(-kInfinity);
  }

  T maximum_of_row(int64_t keys, T high) const {
    Vec<T> lanes = splat(high);
    for (int64_t j = 0; j < keys; j += L) lanes = maximum(load(score_row_ + j), lanes);
    for (int lane = 0; lane < L; ++lane) high = lanes[lane] > high ? lanes[lane] : high;
    return high;
  }

  // Turns the scores into probabilities, not yet divided by their sum, which it returns.
  T exponentials_of_row(int64_t keys, T offset) {
    RowSum<T> sums;
    for_each_run(ceil_div(keys, L), [&](int64_t begin, int64_t end) {
      Vec<T> sum[2] = {};
      const auto centred = [&](int64_t j) { return load(score_row_ + j * L) - offset; };
      for_each_exponential<T>(begin, end, centred, [&](int64_t j, auto odd, Vec<T> exponential) {
        store(score_row_ + j * L, exponential);
        sum[odd.value] += exponential;
      });
      sums.add(sum[0] + sum[1]);
    });
    const Vec<T> lanes = sums.total();
    T sum = 0;
    for (int lane = 0; lane < L; ++lane) sum += lanes[lane];
    return sum;
  }

  // Turns vector v of the scores into probabilities, not yet divided by their sum.
  void softmax_lanes(int v, int64_t keys, bool later) {
    T* scores = scores_ + v * L;
    const Vec<T> high = maximum(maximum_of_lanes(scores, keys), maximum_[v]);
    // Without a key so far any finite offset will do; NaN scores must still reach exp.
    Vec<T> offset = high == T(-kInfinity) ? Vec<T>{} : high;
    if (later) {
      Vec<T> shrink = exp(maximum_[v] - offset);
      sum_[v].scale(shrink);
      for (int64_t d = 0; d < p_.head_dim_v; ++d) {
        T* output = output_lanes_ + d * W + v * L;
        store(output, load(output) * shrink);
      }
    }
    maximum_[v] = high;
    for_each_run(keys, [&](int64_t begin, int64_t end) {
      Vec<T> sum[2] = {};
      const auto centred = [&](int64_t j) { return load(scores + j * W) - offset; };
      for_each_exponential<T>(begin, end, centred, [&](int64_t j, auto odd, Vec<T> exponential) {
        store(scores + j * W, exponential);
        sum[odd.value] += exponential;
      });
      sum_[v].add(sum[0] + sum[1]);
    });
  }

  void write(const QueryBlock<T>& block) {
    T* lse = lse_of(block);
    In* output = output_of(block);
    for (int v = 0; v < block.vectors(); ++v) {
      const int64_t lanes = min64(L, block.count - v * L);
      // A sum of exactly 0 is a row without keys: its output is 0. A NaN sum compares false and stays NaN.
      const Vec<T> sum = sum_[v].total(), inverse = sum == T(0) ? Vec<T>{} : T(1) / sum;
      store_transposed(output_lanes_ + v * L, W, inverse, lanes, p_.head_dim_v, output + v * L * p_.output.row_stride,
                       p_.output.row_stride, streamed_);
      const Vec<T> offset = maximum_[v] == T(-kInfinity) ? Vec<T>{} : maximum_[v];
      store_first(offset + log_of_sum(sum), lanes, lse + v * L);
    }
  }

  const AttentionParams& p_;
  const Scale<T> scale_;
  int64_t key_blocks_, keys_per_block_, padded_dim_, padded_dim_v_;
  bool streamed_;
  T *key_, *query_lanes_, *output_lanes_, *scores_;
  T *query_row_, *score_row_, *output_row_;
  PackedMatrix<T> value_{};
  T *bias_rows_ = nullptr, *bias_lanes_ = nullptr;
  Vec<T> maximum_[kTileVectors];
  RowSum<T> sum_[kTileVectors];
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
