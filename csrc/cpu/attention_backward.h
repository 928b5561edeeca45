// Attention backward, one head per task, so nothing is added from two threads and the result is the same every time.
//
// Per block of queries, transposed (one query per lane): P^T = softmax of S^T; dP^T = V dO^T; delta = sum over keys of
// P dP, minus dLSE; dS^T = P^T (dP^T - delta). Then dQ^T = K^T dS^T, and into the head's accumulators dV += P^T dO and
// dK += scale dS^T Q. A block has its whole rows at hand, so P is normalised afresh: exp(S - LSE) would carry the
// rounding of the LSE, half an ulp of a number near 30 for sharp logits, into every gradient. For the same reason delta
// comes from P and dP and not from dO · O, and dP is first centred on its value at the row's largest key: where that
// key has nearly all the weight, dP - delta is a difference of nearly equal numbers, and centring takes it exactly.
#pragma once

#include "attention_common.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
class AttentionBackward {
  using T = Compute<In>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t W = kPanel<T>;

 public:
  explicit AttentionBackward(const AttentionBackwardParams& p) : p_(p), scale_(p.scale) {
    padded_dim_ = round_up(p.head_dim, L);
    padded_dim_v_ = round_up(p.head_dim_v, L);
  }

  void run(int64_t begin, int64_t end) {
    Arena measure;
    allocate(measure);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena);
    for (int64_t task = begin; task < end; ++task) run_head(task / p_.num_heads, task % p_.num_heads);
  }

 private:
  void allocate(Arena& arena) {
    const int64_t keys = p_.seqlen_k;
    if constexpr (!__is_same(In, T)) {
      key_buffer_ = arena.take<T>(keys * p_.head_dim);
      value_buffer_ = arena.take<T>(keys * p_.head_dim_v);
    }
    query_rows_ = arena.take<T>(W * padded_dim_);
    query_lanes_ = arena.take<T>(padded_dim_ * W);
    grad_output_rows_ = arena.take<T>(W * padded_dim_v_);
    grad_output_lanes_ = arena.take<T>(padded_dim_v_ * W);
    probabilities_ = arena.take<T>(keys * W);
    grad_scores_ = arena.take<T>(keys * W);
    grad_query_lanes_ = arena.take<T>(padded_dim_ * W);
    grad_query_rows_ = arena.take<T>(W * padded_dim_);
    grad_key_ = arena.take<T>(keys * padded_dim_);
    grad_value_ = arena.take<T>(keys * padded_dim_v_);
    if (p_.bias.type != BiasType::kNone) {
      bias_rows_ = arena.take<T>(W * round_up(keys, L));
      bias_lanes_ = arena.take<T>(W * round_up(keys, L));
    }
  }

  void run_head(int64_t batch, int64_t head) {
    key_ = widen_head<In>(p_.key, batch, head, p_.seqlen_k, p_.head_dim, key_buffer_);
    value_ = widen_head<In>(p_.value, batch, head, p_.seqlen_k, p_.head_dim_v, value_buffer_);
    for (int64_t i = 0; i < p_.seqlen_k * padded_dim_; ++i) grad_key_[i] = 0;
    for (int64_t i = 0; i < p_.seqlen_k * padded_dim_v_; ++i) grad_value_[i] = 0;
    for (int64_t first = 0; first < p_.seqlen_q; first += W) {
      run_block({batch, head, first, min64(W, p_.seqlen_q - first)});
    }
    // Scores that were scaled after the product pass their factor on here.
    for (int64_t i = 0; scale_.scores != T(1) && i < p_.seqlen_k * padded_dim_; i += L) {
      store(grad_key_ + i, load(grad_key_ + i) * scale_.scores);
    }
    write(p_.grad_key, batch, head, 0, p_.seqlen_k, grad_key_, padded_dim_, p_.head_dim);
    write(p_.grad_value, batch, head, 0, p_.seqlen_k, grad_value_, padded_dim_v_, p_.head_dim_v);
  }

  void run_block(const QueryBlock<T>& block) {
    const In* query = head_of<In>(p_.query, block.batch, block.head) + block.first * p_.query.row_stride;
    load_lanes(query, p_.query.row_stride, block.count, p_.head_dim, scale_.queries, query_rows_, query_lanes_);
    const In* grad = head_of<In>(p_.grad_output, block.batch, block.head) + block.first * p_.grad_output.row_stride;
    load_lanes(grad, p_.grad_output.row_stride, block.count, p_.head_dim_v, T(1), grad_output_rows_,
               grad_output_lanes_);
    const int64_t keys = p_.is_causal ? min64(p_.seqlen_k, block.first + block.count) : p_.seqlen_k;
    compute_scores(p_, block, key_, query_lanes_, scale_.scores, 0, keys, probabilities_, bias_rows_, bias_lanes_);
    panel_product<T, false>(keys, block.vectors(),
                            {value_.data, value_.stride, 1, grad_output_lanes_, W, grad_scores_, W, p_.head_dim_v});
    for (int v = 0; v < block.vectors(); ++v) softmax_backward(block, v, keys);
    // Sums over the queries of this block, whose number is `count`: lanes beyond it hold no query.
    product<T, true>(keys, padded_dim_v_,
                     {probabilities_, W, 1, grad_output_rows_, padded_dim_v_, grad_value_, padded_dim_v_, block.count});
    product<T, true>(keys, padded_dim_,
                     {grad_scores_, W, 1, query_rows_, padded_dim_, grad_key_, padded_dim_, block.count});
    panel_product<T, false>(p_.head_dim, block.vectors(),
                            {key_.data, 1, key_.stride, grad_scores_, W, grad_query_lanes_, W, keys});
    for (int64_t d = 0; d < p_.head_dim; ++d) {
      for (int64_t i = 0; i < block.vectors() * L; i += L) {
        store(grad_query_lanes_ + d * W + i, load(grad_query_lanes_ + d * W + i) * T(p_.scale));
      }
    }
    transpose(grad_query_lanes_, W, padded_dim_, block.vectors() * L, grad_query_rows_, padded_dim_);
    write(p_.grad_query, block.batch, block.head, block.first, block.count, grad_query_rows_, padded_dim_, p_.head_dim);
  }

  // Turns the scores into P and dP into dS, for vector v of the queries.
  void softmax_backward(const QueryBlock<T>& block, int v, int64_t keys) {
    const int64_t offset = (block.batch * p_.num_heads + block.head) * p_.seqlen_q + block.first + v * L;
    Vec<T> grad_lse{};
    for (int lane = 0; p_.grad_lse != nullptr && lane < L && v * L + lane < block.count; ++lane) {
      grad_lse[lane] = static_cast<const T*>(p_.grad_lse)[offset + lane];
    }
    T* p = probabilities_ + v * L;
    T* ds = grad_scores_ + v * L;
    Vec<T> high = splat(T(-kInfinity)), centre{};
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> score = load(p + j * W);
      const auto larger = score > high;
      high = larger ? score : high;
      centre = larger ? load(ds + j * W) : centre;
    }
    const Vec<T> offset_of_row = high == T(-kInfinity) ? Vec<T>{} : high;
    Vec<T> total{}, total_delta{};
    for (int64_t first = 0; first < keys; first += kSumKeys) {
      Vec<T> sum[2] = {}, delta[2] = {};
      for (int64_t j = first; j < min64(first + kSumKeys, keys); ++j) {
        const Vec<T> exponential = exp(load(p + j * W) - offset_of_row);
        const Vec<T> centred = load(ds + j * W) - centre;
        store(p + j * W, exponential);
        store(ds + j * W, centred);
        sum[j & 1] += exponential;
        delta[j & 1] += exponential * centred;
      }
      total += sum[0] + sum[1];
      total_delta += delta[0] + delta[1];
    }
    const Vec<T> inverse = total == T(0) ? Vec<T>{} : T(1) / total;
    const Vec<T> row_delta = total_delta * inverse - grad_lse;
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> probability = load(p + j * W) * inverse;
      store(p + j * W, probability);
      store(ds + j * W, probability * (load(ds + j * W) - row_delta));
    }
  }

  void write(const View4& view, int64_t batch, int64_t head, int64_t first, int64_t count, const T* source,
             int64_t source_stride, int64_t columns) {
    In* target = mutable_head_of<In>(view, batch, head) + first * view.row_stride;
    for (int64_t r = 0; r < count; ++r) {
      store_row(source + r * source_stride, columns, target + r * view.row_stride);
    }
  }

  const AttentionBackwardParams& p_;
  const Scale<T> scale_;
  int64_t padded_dim_, padded_dim_v_;
  Matrix<T> key_{}, value_{};
  T *key_buffer_ = nullptr, *value_buffer_ = nullptr;
  T *query_rows_, *query_lanes_, *grad_output_rows_, *grad_output_lanes_, *probabilities_, *grad_scores_;
  T *grad_query_lanes_, *grad_query_rows_, *grad_key_, *grad_value_;
  T *bias_rows_ = nullptr, *bias_lanes_ = nullptr;
};

inline int64_t attention_backward_tasks(const AttentionBackwardParams& p) { return p.batch * p.num_heads; }

inline void attention_backward(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    using In = typename decltype(tag)::type;
    AttentionBackward<In>(p).run(begin, end);
  });
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
