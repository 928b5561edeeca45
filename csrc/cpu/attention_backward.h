// Attention backward: whole heads, or parts of heads where there are fewer heads than threads.
//
// The sums over the queries, dK and dV, follow one binary tree over runs of query blocks (leaves), whose shape depends
// on the lengths alone. A task computes the whole tree of a head, or one subtree whose partial sum it leaves for
// `reduce`: the additions are the same in either case, so the result has the same bits for any number of threads, and
// nothing is ever added from two threads.
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

// Leaves of a head's tree, at most: the parallelism that one head can give. Each leaf costs one addition of dK and dV
// and each level of the tree one more copy of them in the scratch.
constexpr int64_t kLeaves = 8;

template <class In>
class AttentionBackward {
  using T = Compute<In>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t W = kPanel<T>;

 public:
  explicit AttentionBackward(const AttentionBackwardParams& p) : p_(p), scale_(p.scale) {
    padded_dim_ = round_up(p.head_dim, L);
    padded_dim_v_ = round_up(p.head_dim_v, L);
    partial_size_ = p.seqlen_k * (padded_dim_ + padded_dim_v_);
    blocks_ = ceil_div(p.seqlen_q, W);
    leaves_ = min64(blocks_, kLeaves);
    while (max_parts_ < leaves_) max_parts_ *= 2;
  }

  int64_t max_parts() const { return max_parts_; }
  int64_t partial_bytes() const { return partial_size_ * int64_t(sizeof(T)); }
  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure, max_parts_);
    return measure.used();
  }

  // Whole heads [begin, end).
  void run(int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    T* total = allocate(arena, max_parts_);
    for (int64_t index = begin; index < end; ++index) {
      load_head(index);
      sum_leaves(0, max_parts_, total);
      write_sums(0, p_.seqlen_k, total);
    }
  }

  // Parts [begin, end) of the heads from split.first_head on: dQ of their queries, and their partial sums.
  void run_parts(const AttentionSplit& split, int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena, max_parts_);
    const int64_t leaves = max_parts_ / split.parts;
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = split.first_head + task / split.parts, first = task % split.parts * leaves;
      if (first >= leaves_) continue;
      if (index != loaded) load_head(loaded = index);
      sum_leaves(first, leaves, partial(split, task));
    }
  }

  // Slices [begin, end) of kReduceKeys keys of the same heads: adds up the partial sums, and writes dK and dV.
  void reduce(const AttentionSplit& split, int64_t begin, int64_t end) {
    const int64_t slices = ceil_div(p_.seqlen_k, kReduceKeys), leaves = max_parts_ / split.parts;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first_part = task / slices * split.parts, first = task % slices * kReduceKeys;
      const int64_t count = min64(kReduceKeys, p_.seqlen_k - first);
      for (int64_t step = 1; step < split.parts; step *= 2) {
        for (int64_t part = 0; (part + step) * leaves < leaves_; part += 2 * step) {
          add_sums(partial(split, first_part + part + step), first, count, partial(split, first_part + part));
        }
      }
      place(split.first_head + task / slices);
      write_sums(first, count, partial(split, first_part));
    }
  }

 private:
  // Returns where the sums of a whole tree of `leaves` leaves go.
  T* allocate(Arena& arena, int64_t leaves) {
    const int64_t keys = p_.seqlen_k;
    const auto take = [&](int64_t rows, int64_t depth) {
      return PackedMatrix<T>{arena.take<T>(PackedMatrix<T>::size(rows, depth)), rows, depth};
    };
    key_ = take(keys, p_.head_dim);
    value_ = take(keys, p_.head_dim_v);
    key_columns_ = take(p_.head_dim, keys);
    query_rows_ = arena.take<T>(W * padded_dim_);
    query_lanes_ = arena.take<T>(padded_dim_ * W);
    grad_output_rows_ = arena.take<T>(W * padded_dim_v_);
    grad_output_lanes_ = arena.take<T>(padded_dim_v_ * W);
    probabilities_ = arena.take<T>(keys * W);
    grad_scores_ = arena.take<T>(keys * W);
    grad_query_lanes_ = arena.take<T>(padded_dim_ * W);
    if (p_.bias.type != BiasType::kNone) {
      bias_rows_ = arena.take<T>(W * round_up(keys, L));
      bias_lanes_ = arena.take<T>(W * round_up(keys, L));
    }
    for (int level = 0; int64_t(1) << level < leaves; ++level) right_[level] = arena.take<T>(partial_size_);
    return arena.take<T>(partial_size_);
  }

  void place(int64_t index) {
    batch_ = index / p_.num_heads;
    head_ = index % p_.num_heads;
  }

  void load_head(int64_t index) {
    place(index);
    pack_rows(head_of<In>(p_.key, batch_, head_), p_.key.row_stride, key_);
    pack_rows(head_of<In>(p_.value, batch_, head_), p_.value.row_stride, value_);
    pack_columns(head_of<In>(p_.key, batch_, head_), p_.key.row_stride, key_columns_);
  }

  T* partial(const AttentionSplit& split, int64_t task) const {
    return static_cast<T*>(split.partials) + task * partial_size_;
  }
  // Sums lie as dK [keys][padded_dim], then dV [keys][padded_dim_v].
  T* value_sums(T* sums) const { return sums + p_.seqlen_k * padded_dim_; }

  // The sums over leaves [first, first + count), count a power of two; the tree's missing leaves add nothing.
  void sum_leaves(int64_t first, int64_t count, T* target) {
    if (count == 1) return run_leaf(first, target);
    const int64_t half = count / 2;
    sum_leaves(first, half, target);
    if (first + half >= leaves_) return;
    T* right = right_[__builtin_ctzll(uint64_t(half))];
    sum_leaves(first + half, half, right);
    add_sums(right, 0, p_.seqlen_k, target);
  }

  void run_leaf(int64_t leaf, T* target) {
    // Without a query there is one leaf, and no block that would begin its sums.
    for (int64_t i = 0; p_.seqlen_q == 0 && i < partial_size_; ++i) target[i] = 0;
    const int64_t begin = leaf * blocks_ / max64(leaves_, 1), end = (leaf + 1) * blocks_ / max64(leaves_, 1);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * W;
      run_block({batch_, head_, first, min64(W, p_.seqlen_q - first)}, block == begin, target);
    }
  }

  // target += source, for keys [first, first + count) of dK and of dV.
  void add_sums(T* source, int64_t first, int64_t count, T* target) const {
    add(source + first * padded_dim_, count * padded_dim_, target + first * padded_dim_);
    add(value_sums(source) + first * padded_dim_v_, count * padded_dim_v_, value_sums(target) + first * padded_dim_v_);
  }
  static void add(const T* source, int64_t count, T* target) {
    for (int64_t i = 0; i < count; i += L) store(target + i, load(target + i) + load(source + i));
  }

  void write_sums(int64_t first, int64_t count, T* sums) const {
    T* key = sums + first * padded_dim_;
    // Scores that were scaled after the product pass their factor on here.
    for (int64_t i = 0; scale_.scores != T(1) && i < count * padded_dim_; i += L) {
      store(key + i, load(key + i) * scale_.scores);
    }
    write(p_.grad_key, batch_, head_, first, count, key, padded_dim_, p_.head_dim);
    write(p_.grad_value, batch_, head_, first, count, value_sums(sums) + first * padded_dim_v_, padded_dim_v_,
          p_.head_dim_v);
  }

  // `fresh`: the sums begin with this block, and whatever `sums` held is overwritten.
  void run_block(const QueryBlock<T>& block, bool fresh, T* sums) {
    load_block(p_.query, block, p_.head_dim, scale_.queries, query_rows_, query_lanes_);
    load_block(p_.grad_output, block, p_.head_dim_v, T(1), grad_output_rows_, grad_output_lanes_);
    const int64_t keys = p_.is_causal ? min64(p_.seqlen_k, block.first + block.count) : p_.seqlen_k;
    compute_scores(p_, block, key_, query_lanes_, scale_.scores, 0, keys, probabilities_, bias_rows_, bias_lanes_);
    packed_product<T, false>(value_, keys, 0, p_.head_dim_v, block.vectors(), grad_output_lanes_, grad_scores_);
    for (int v = 0; v < block.vectors(); ++v) softmax_backward(block, v, keys);
    // Sums over the queries of this block, whose number is `count`: lanes beyond it hold no query.
    const TileArgs<T> to_value{probabilities_, W,          1, grad_output_rows_, padded_dim_v_, value_sums(sums),
                               padded_dim_v_,  block.count};
    const TileArgs<T> to_key{grad_scores_, W, 1, query_rows_, padded_dim_, sums, padded_dim_, block.count};
    if (fresh) {
      product<T, false, Lanes>(keys, padded_dim_v_, to_value);
      product<T, false, Lanes>(keys, padded_dim_, to_key);
      for (int64_t i = keys * padded_dim_v_; i < p_.seqlen_k * padded_dim_v_; ++i) value_sums(sums)[i] = 0;
      for (int64_t i = keys * padded_dim_; i < p_.seqlen_k * padded_dim_; ++i) sums[i] = 0;
    } else {
      product<T, true, Lanes>(keys, padded_dim_v_, to_value);
      product<T, true, Lanes>(keys, padded_dim_, to_key);
    }
    packed_product<T, false>(key_columns_, p_.head_dim, 0, keys, block.vectors(), grad_scores_, grad_query_lanes_);
    In* grad_query = mutable_head_of<In>(p_.grad_query, batch_, head_) + block.first * p_.grad_query.row_stride;
    for (int64_t first = 0; first < block.count; first += L) {
      store_transposed(grad_query_lanes_ + first, W, splat(T(p_.scale)), min64(L, block.count - first), p_.head_dim,
                       grad_query + first * p_.grad_query.row_stride, p_.grad_query.row_stride);
    }
  }

  // Loads a block's rows [count][padded], scaled, and their transpose [columns][W].
  static void load_block(const View4& view, const QueryBlock<T>& block, int64_t columns, T factor, T* rows, T* lanes) {
    const In* source = head_of<In>(view, block.batch, block.head) + block.first * view.row_stride;
    const int64_t padded = round_up(columns, L);
    for (int64_t r = 0; r < block.count; ++r) {
      for (int64_t c = 0; c < columns; c += L) {
        store(rows + r * padded + c, load_first(source + r * view.row_stride + c, columns - c) * factor);
      }
    }
    load_transposed(rows, padded, block.count, block.count, columns, T(1), lanes, W);
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
    const Vec<T> high = maximum_of_lanes(p, keys);
    const Vec<T> offset_of_row = high == T(-kInfinity) ? Vec<T>{} : high;
    Vec<T> total{}, delta{};
    for_each_run(keys, [&](int64_t begin, int64_t end) {
      Vec<T> sum[2] = {}, part[2] = {};
      for_each_pair(begin, end, [&](int64_t j, auto odd) {
        const Vec<T> exponential = exp(load(p + j * W) - offset_of_row);
        store(p + j * W, exponential);
        sum[odd.value] += exponential;
        part[odd.value] += exponential * load(ds + j * W);
      });
      total += sum[0] + sum[1];
      delta += part[0] + part[1];
    });
    const Vec<T> inverse = total == T(0) ? Vec<T>{} : T(1) / total;
    delta *= inverse;
    // What P·(dP − Δ) leaves is the rounding of Δ: where one key has all of P, it is as large as dS itself, and it
    // would spoil the sum over the keys, which is zero.
    Vec<T> rest{};
    for_each_run(keys, [&](int64_t begin, int64_t end) {
      Vec<T> part[2] = {};
      for_each_pair(begin, end, [&](int64_t j, auto odd) {
        const Vec<T> probability = load(p + j * W) * inverse, centred = load(ds + j * W) - delta;
        store(p + j * W, probability);
        store(ds + j * W, centred);
        part[odd.value] += probability * centred;
      });
      rest += part[0] + part[1];
    });
    const Vec<T> shift = grad_lse - rest;
    for (int64_t j = 0; j < keys; ++j) store(ds + j * W, load(p + j * W) * (load(ds + j * W) + shift));
  }

  void write(const View4& view, int64_t batch, int64_t head, int64_t first, int64_t count, const T* source,
             int64_t source_stride, int64_t columns) const {
    In* target = mutable_head_of<In>(view, batch, head) + first * view.row_stride;
    for (int64_t r = 0; r < count; ++r) {
      store_row(source + r * source_stride, columns, target + r * view.row_stride);
    }
  }

  const AttentionBackwardParams& p_;
  const Scale<T> scale_;
  int64_t padded_dim_, padded_dim_v_, partial_size_, blocks_, leaves_, max_parts_ = 1;
  int64_t batch_ = 0, head_ = 0;
  PackedMatrix<T> key_{}, value_{}, key_columns_{};
  T *query_rows_, *query_lanes_, *grad_output_rows_, *grad_output_lanes_, *probabilities_, *grad_scores_;
  T* grad_query_lanes_;
  T* right_[__builtin_ctzll(uint64_t(kLeaves))];  // sums of right subtrees, by level
  T *bias_rows_ = nullptr, *bias_lanes_ = nullptr;
};

template <class F>
inline void with_attention_backward(const AttentionBackwardParams& p, const F& f) {
  dispatch_dtype(p.dtype, [&](auto tag) {
    AttentionBackward<typename decltype(tag)::type> op(p);
    f(op);
  });
}

inline AttentionBackwardSizes attention_backward_sizes(const AttentionBackwardParams& p) {
  AttentionBackwardSizes sizes;
  with_attention_backward(p, [&](auto& op) { sizes = {op.scratch_bytes(), op.max_parts(), op.partial_bytes()}; });
  return sizes;
}

inline void attention_backward(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.run(begin, end); });
}

inline void attention_backward_parts(const AttentionBackwardParams& p, const AttentionSplit& split, int64_t begin,
                                     int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.run_parts(split, begin, end); });
}

inline void attention_backward_reduce(const AttentionBackwardParams& p, const AttentionSplit& split, int64_t begin,
                                      int64_t end) {
  with_attention_backward(p, [&](auto& op) { op.reduce(split, begin, end); });
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
