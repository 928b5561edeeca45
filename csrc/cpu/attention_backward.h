// Attention backward: whole heads, or parts of heads where there are fewer heads than threads.
//
// The sums over the queries, dK and dV, have one order, which depends on the lengths alone: block after block within a
// leaf (a run of query blocks), leaf after leaf. A task computes a whole head, or one leaf whose sums it leaves for
// `reduce`: the additions are the same in either case, so the result has the same bits for any number of threads, and
// nothing is ever added from two threads.
//
// Per block of queries, transposed (one query per lane): P^T = softmax of S^T; dP^T = V dO^T; delta = sum over keys of
// P dP, minus dLSE; dS^T = P^T (dP^T - delta). Then dQ^T = K^T dS^T, and into the head's accumulators dV += P^T dO and
// dK += scale dS^T Q. A block has its whole rows at hand, so P is normalised afresh: exp(S - LSE) would carry the
// rounding of the LSE, half an ulp of a number near 30 for sharp logits, into every gradient. For the same reason delta
// comes from P and dP and not from dO · O, and what its rounding leaves in dS is taken out again.
#pragma once

#include "attention_common.h"
#include "kernels.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Leaves of a head, at most: the parallelism that one head can give.
constexpr int64_t kLeaves = 8;
// Queries whose P and dS are kept until they are added to dK and dV. Each addition moves the sums, which are larger
// than a first-level cache, once: the more queries together, the less often.
constexpr int64_t kGroupQueries = 64;

template <class In>
class AttentionBackward {
  using T = Compute<In>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t W = kPanel<T>;
  static constexpr int64_t kGroupBlocks = kGroupQueries / W;

 public:
  explicit AttentionBackward(const AttentionBackwardParams& p) : p_(p), scale_(p.scale) {
    padded_dim_ = round_up(p.head_dim, L);
    padded_dim_v_ = round_up(p.head_dim_v, L);
    sums_size_ = p.seqlen_k * (padded_dim_ + padded_dim_v_);
    blocks_ = ceil_div(p.seqlen_q, W);
    group_ = max64(1, min64(blocks_, kGroupBlocks));
    leaves_ = max64(1, min64(blocks_, kLeaves));
    const int64_t keys = p.seqlen_k * (p.head_dim + p.head_dim_v), queries = p.seqlen_q * p.head_dim;
    const int64_t bytes = p.batch * p.num_heads * (queries + keys) * int64_t(sizeof(In));
    // Rows of 16 bits are written in halves of a line.
    streamed_ = __is_same(In, float) && is_streamed<In>(p.grad_query, p.head_dim, bytes) &&
                is_streamed<In>(p.grad_key, p.head_dim, bytes) && is_streamed<In>(p.grad_value, p.head_dim_v, bytes);
  }

  // Another number of leaves than this kernel's own, for one that shares the sums with it.
  void set_leaves(int64_t leaves) { leaves_ = leaves; }
  int64_t leaves() const { return leaves_; }
  int64_t partial_bytes() const { return sums_size_ * int64_t(sizeof(T)); }
  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure);
    return measure.used();
  }

  // Whole heads [begin, end).
  void run(int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
    for (int64_t index = begin; index < end; ++index) {
      load_head(index);
      run_leaves(0, leaves_, head_sums_);
      write_sums(0, p_.seqlen_k, head_sums_);
    }
    end_stream(streamed_);
  }

  // Leaves [begin, end) of the heads from split.first_head on: dQ of their queries, and their sums.
  void run_parts(const AttentionSplit& split, int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = split.first_head + task / leaves_, leaf = task % leaves_;
      if (index != loaded) load_head(loaded = index);
      run_leaves(leaf, leaf + 1, partial(split, task));
    }
    end_stream(streamed_);
  }

  // Slices [begin, end) of kReduceKeys keys of the same heads: adds up the sums of the leaves, and writes dK and dV.
  void reduce(const AttentionSplit& split, int64_t begin, int64_t end) {
    const int64_t slices = ceil_div(p_.seqlen_k, kReduceKeys);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / slices, first = task % slices * kReduceKeys;
      const int64_t count = min64(kReduceKeys, p_.seqlen_k - first);
      T* sums = partial(split, head * leaves_);
      for (int64_t leaf = 1; leaf < leaves_; ++leaf) {
        const T* other = partial(split, head * leaves_ + leaf);
        add(other + first * padded_dim_, count * padded_dim_, sums + first * padded_dim_);
        add(value_sums(other) + first * padded_dim_v_, count * padded_dim_v_, value_sums(sums) + first * padded_dim_v_);
      }
      place(split.first_head + head);
      write_sums(first, count, sums);
    }
    end_stream(streamed_);
  }

 protected:
  void allocate(Arena& arena) {
    const int64_t keys = p_.seqlen_k, bias_size = p_.bias.type == BiasType::kNone ? 0 : W * round_up(keys, L);
    key_ = PackedMatrix<T>::take(arena, keys, p_.head_dim);
    value_ = PackedMatrix<T>::take(arena, keys, p_.head_dim_v);
    key_columns_ = PackedMatrix<T>::take(arena, p_.head_dim, keys);
    query_lanes_ = arena.take<T>(padded_dim_ * W);
    grad_output_lanes_ = arena.take<T>(padded_dim_v_ * W);
    grad_query_lanes_ = arena.take<T>(padded_dim_ * W);
    query_rows_ = arena.take<T>(group_ * W * padded_dim_);
    grad_output_rows_ = arena.take<T>(group_ * W * padded_dim_v_);
    probabilities_ = arena.take<T>(group_ * W * keys);
    grad_scores_ = arena.take<T>(group_ * W * keys);
    bias_rows_ = arena.take<T>(bias_size);
    bias_lanes_ = arena.take<T>(bias_size);
    head_sums_ = arena.take<T>(sums_size_);
    leaf_sums_ = arena.take<T>(leaves_ < blocks_ ? sums_size_ : 0);
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
    // For writing, where they stay in the cache until the sums are complete.
    if (!streamed_ && p_.seqlen_k <= 4 * kFetchedRows) {
      fetch_rows<true>(head_of<In>(p_.grad_key, batch_, head_), p_.grad_key.row_stride, p_.seqlen_k, p_.head_dim);
      fetch_rows<true>(head_of<In>(p_.grad_value, batch_, head_), p_.grad_value.row_stride, p_.seqlen_k, p_.head_dim_v);
    }
  }

  T* partial(const AttentionSplit& split, int64_t task) const {
    return static_cast<T*>(split.partials) + task * sums_size_;
  }
  // Sums lie as dK [keys][padded_dim], then dV [keys][padded_dim_v].
  template <class Sums>
  Sums value_sums(Sums sums) const {
    return sums + p_.seqlen_k * padded_dim_;
  }

  int64_t first_block(int64_t leaf) const { return leaf * blocks_ / leaves_; }

  // dQ of the queries of leaves [first, last), and what they add to dK and dV; overwrites `sums`.
  void run_leaves(int64_t first, int64_t last, T* sums) {
    // Without a query there is one leaf, and no block that would begin its sums.
    for (int64_t i = 0; blocks_ == 0 && i < sums_size_; ++i) sums[i] = 0;
    for (int64_t begin = first_block(first), end = first_block(last); begin < end;) {
      // Groups lie as in a whole head, wherever the leaves begin: to the end of its group a block sees keys that are
      // masked, and where those are NaN it shows.
      const int64_t next = (begin / group_ + 1) * group_;
      const int64_t keys = p_.is_causal ? min64(p_.seqlen_k, next * W) : p_.seqlen_k;
      run_group({begin, min64(next, end), first, keys, {}}, sums);
      begin = next;
    }
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

  // How a block's part of dK and dV reaches the sums of its leaf and of the head.
  struct Part {
    int64_t queries;
    bool opens, closes;  // its leaf
    bool is_first;       // of the leaves: its sums are the head's
    bool is_inside;      // a leaf that begins and ends in this group
  };
  // Blocks [begin, end) of a head whose sums begin with leaf `first_leaf`; they take part in the first `keys` keys.
  struct Group {
    int64_t begin, end, first_leaf, keys;
    Part parts[kGroupBlocks];
  };

  void run_group(Group group, T* sums) {
    for (int64_t block = group.begin; block < group.end; ++block) {
      const int64_t leaf = ((block + 1) * leaves_ - 1) / blocks_, begin = first_block(leaf),
                    end = first_block(leaf + 1);
      const int64_t first = block * W, queries = min64(W, p_.seqlen_q - first), place = block - group.begin;
      group.parts[place] = {queries, block == begin, block + 1 == end, leaf == group.first_leaf,
                            begin >= group.begin && end <= group.end};
      run_block({batch_, head_, first, queries}, place, group.keys);
    }
    add_group(group, probabilities_, grad_output_rows_, padded_dim_v_, value_sums(sums), value_sums(leaf_sums_));
    add_group(group, grad_scores_, query_rows_, padded_dim_, sums, leaf_sums_);
  }

  // P, dS and dQ of a block, the `place`-th of its group.
  void run_block(const QueryBlock<T>& block, int64_t place, int64_t keys) {
    T *probabilities = probabilities_ + place * W * p_.seqlen_k, *grad_scores = grad_scores_ + place * W * p_.seqlen_k;
    if (!streamed_) {
      fetch_rows<true>(head_of<In>(p_.grad_query, block.batch, block.head) + block.first * p_.grad_query.row_stride,
                       p_.grad_query.row_stride, block.count, p_.head_dim);
    }
    load_block(p_.query, block, p_.head_dim, scale_.queries, query_rows_ + place * W * padded_dim_, query_lanes_);
    load_block(p_.grad_output, block, p_.head_dim_v, T(1), grad_output_rows_ + place * W * padded_dim_v_,
               grad_output_lanes_);
    compute_scores(p_, block, key_, query_lanes_, scale_.scores, 0, keys, probabilities, bias_rows_, bias_lanes_);
    packed_product<T, false>(value_, keys, 0, p_.head_dim_v, block.vectors(), grad_output_lanes_, grad_scores);
    for (int v = 0; v < block.vectors(); ++v) {
      softmax_backward(block, v, keys, probabilities + v * L, grad_scores + v * L);
    }
    packed_product<T, false>(key_columns_, p_.head_dim, 0, keys, block.vectors(), grad_scores, grad_query_lanes_);
    write_grad_query(block);
  }

  void write_grad_query(const QueryBlock<T>& block) const {
    In* grad_query = mutable_head_of<In>(p_.grad_query, batch_, head_) + block.first * p_.grad_query.row_stride;
    for (int64_t first = 0; first < block.count; first += L) {
      store_transposed(grad_query_lanes_ + first, W, splat(T(p_.scale)), min64(L, block.count - first), p_.head_dim,
                       grad_query + first * p_.grad_query.row_stride, p_.grad_query.row_stride, streamed_);
    }
  }

  // sums [keys][padded] += lanes [block][keys][W] · rows [query][padded], over the queries of the group.
  void add_group(const Group& group, const T* lanes, const T* rows, int64_t padded, T* sums, T* leaf_sums) const {
    for_each_tile(group.keys, [&](int64_t key, int64_t tile_rows, int64_t) {
      for (int64_t column = 0; column < padded; column += W) {
        const int64_t offset = key * padded + column;
        const TileArgs<T> args{lanes + key * W, 0, 0, rows + column, padded, sums + offset, padded, 0};
        add_tile(group, args, tile_rows, min64(ceil_div(padded - column, L), kTileVectors), leaf_sums + offset);
      }
    });
    // What began here goes on with the next group, which has more keys where they are causal.
    for (int64_t block = group.begin; block < group.end; ++block) {
      const Part& part = group.parts[block - group.begin];
      if (!part.opens || (part.is_inside && !part.is_first)) continue;
      T* target = part.is_first ? sums : leaf_sums;
      for (int64_t i = group.keys * padded; i < p_.seqlen_k * padded; ++i) target[i] = 0;
    }
  }

  // One tile of add_group: `args` are the operands of the group's first block. The sums of a leaf are complete before
  // they are added to those of the leaves before: of a leaf inside of the group in a tile of its own, of one that began
  // in an earlier group or goes on in a later one in `leaf_sums`.
  void add_tile(const Group& group, TileArgs<T> args, int64_t rows, int64_t vectors, T* leaf_sums) const {
    alignas(64) T inside[kTileRows * W];
    T* const sums = args.c;
    const int64_t stride = args.c_stride;
    for (int64_t i = 0; i < group.end - group.begin; ++i) {
      const Part& part = group.parts[i];
      args.k = part.queries;
      // One block that the tile adds in one piece needs no sums of its own.
      const bool is_one = part.opens && part.closes && args.k <= stored_terms<Multiply>(rows * vectors);
      args.c = part.is_first || is_one ? sums : part.is_inside ? inside : leaf_sums;
      args.c_stride = args.c == inside ? W : stride;
      if (part.opens && (part.is_first || !is_one)) {
        call_tile<T, false, Multiply, Lanes<T>>(rows, vectors, args);
      } else {
        call_tile<T, true, Multiply, Lanes<T>>(rows, vectors, args);
      }
      for (int64_t r = 0; args.c != sums && part.closes && r < rows; ++r) {
        add(args.c + r * args.c_stride, vectors * L, sums + r * stride);
      }
      args.a += W * p_.seqlen_k;
      args.b += W * stride;
    }
  }

  // Loads a block's rows [count][padded], scaled, and their transpose [columns][W].
  static void load_block(const View4& view, const QueryBlock<T>& block, int64_t columns, T factor, T* rows, T* lanes) {
    const In* source = head_of<In>(view, block.batch, block.head) + block.first * view.row_stride;
    const int64_t padded = round_up(columns, L);
    fetch_rows(source, view.row_stride, block.count, columns);
    load_rows(source, view.row_stride, block.count, columns, factor, rows, padded);
    load_transposed(rows, padded, block.count, block.count, columns, Unscaled(), lanes, W);
  }

  // P = exponential · inverse, dS = P · (dP - delta + shift), one row per lane.
  struct Rows {
    Vec<T> inverse, delta, shift;
  };

  // Turns the scores `p` into exponentials, for vector v of the queries; `ds` holds dP.
  Rows exponentials(const QueryBlock<T>& block, int v, int64_t keys, T* p, const T* ds) const {
    const int64_t offset = (block.batch * p_.num_heads + block.head) * p_.seqlen_q + block.first + v * L;
    Vec<T> grad_lse{};
    for (int lane = 0; p_.grad_lse != nullptr && lane < L && v * L + lane < block.count; ++lane) {
      grad_lse[lane] = static_cast<const T*>(p_.grad_lse)[offset + lane];
    }
    const Vec<T> high = maximum_of_lanes(p, keys);
    const Vec<T> offset_of_row = high == T(-kInfinity) ? Vec<T>{} : high;
    RowSum<T> sums, parts;
    for_each_run(keys, [&](int64_t begin, int64_t end) {
      Vec<T> sum[2] = {}, part[2] = {};
      const auto centred = [&](int64_t j) { return load(p + j * W) - offset_of_row; };
      for_each_exponential<T>(begin, end, centred, [&](int64_t j, auto odd, Vec<T> exponential) {
        store(p + j * W, exponential);
        sum[odd.value] += exponential;
        part[odd.value] += exponential * load(ds + j * W);
      });
      sums.add(sum[0] + sum[1]);
      parts.add(part[0] + part[1]);
    });
    const Vec<T> total = sums.total(), inverse = total == T(0) ? Vec<T>{} : T(1) / total;
    const Vec<T> delta = parts.total() * inverse;
    // What P·(dP − Δ) leaves is the rounding of Δ: where one key has all of P, it is as large as dS itself, and it
    // would spoil the sum over the keys, which is zero.
    Vec<T> rest{};
    for_each_run(keys, [&](int64_t begin, int64_t end) {
      Vec<T> part[2] = {};
      for_each_pair(begin, end, [&](int64_t j, auto odd) {
        part[odd.value] += load(p + j * W) * inverse * (load(ds + j * W) - delta);
      });
      rest += part[0] + part[1];
    });
    return {inverse, delta, grad_lse - rest};
  }

  // Turns the scores `p` into P and dP, `ds`, into dS, for vector v of the queries.
  void softmax_backward(const QueryBlock<T>& block, int v, int64_t keys, T* p, T* ds) const {
    const Rows rows = exponentials(block, v, keys, p, ds);
    for (int64_t j = 0; j < keys; ++j) {
      const Vec<T> probability = load(p + j * W) * rows.inverse, centred = load(ds + j * W) - rows.delta;
      store(p + j * W, probability);
      store(ds + j * W, probability * (centred + rows.shift));
    }
  }

  void write(const View4& view, int64_t batch, int64_t head, int64_t first, int64_t count, const T* source,
             int64_t source_stride, int64_t columns) const {
    In* target = mutable_head_of<In>(view, batch, head) + first * view.row_stride;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < columns; c += L) {
        store_first(load(source + r * source_stride + c), columns - c, target + r * view.row_stride + c, streamed_);
      }
    }
  }

  const AttentionBackwardParams& p_;
  const Scale<T> scale_;
  int64_t padded_dim_, padded_dim_v_, sums_size_, blocks_, group_, leaves_;
  bool streamed_;
  int64_t batch_ = 0, head_ = 0;
  PackedMatrix<T> key_{}, value_{}, key_columns_{};
  T *query_lanes_, *grad_output_lanes_, *grad_query_lanes_, *query_rows_, *grad_output_rows_;
  T *probabilities_, *grad_scores_;  // [block of the group][key][W]
  T *head_sums_, *leaf_sums_;        // dK and dV
  T *bias_rows_, *bias_lanes_;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
