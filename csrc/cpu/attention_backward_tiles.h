// Attention backward with the products in AMX tiles (split.h); what is computed, and in which order of leaves, is that
// of attention_backward.h. A leaf is a run of groups, each one product: its blocks of queries are steps of k.
#pragma once

#include "attention_backward.h"
#include "split.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
class AttentionBackwardTiles : private AttentionBackward<In> {
  using Base = AttentionBackward<In>;
  static_assert(__is_same(Compute<In>, float));
  static constexpr int L = kLanes<float>;
  static constexpr int64_t W = kPanel<float>;
  static constexpr int64_t kGroupBlocks = kGroupQueries / W;
  static constexpr int P = kParts<In>, kComputed = kComputedParts<In>;
  static_assert(W == kTileDepth, "a block of queries is one step of k");

 public:
  explicit AttentionBackwardTiles(const AttentionBackwardParams& p) : Base(p), plain_(p), part_(part_of(p.seqlen_k)) {
    if (!split_pays<In>(p)) return;
    groups_ = ceil_div(this->blocks_, kGroupBlocks);
    this->leaves_ = max64(1, min64(groups_, kLeaves));
    plain_.set_leaves(this->leaves_);
  }
  using Base::leaves, Base::partial_bytes, Base::reduce;

  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure);
    return max64(measure.used(), plain_.scratch_bytes());
  }

  void run(int64_t begin, int64_t end) {
    if (!split_pays<In>(p_)) return plain_.run(begin, end);
    prepare();
    const TileSession session;
    for (int64_t index = begin; index < end; ++index) {
      if (load_head(index)) {
        run_leaves(0, this->leaves_, head_sums_);
        this->write_sums(0, p_.seqlen_k, head_sums_);
      } else {
        plain_.run(index, index + 1);
      }
    }
    end_stream(this->streamed_);
  }

  void run_parts(const AttentionSplit& split, int64_t begin, int64_t end) {
    if (!split_pays<In>(p_)) return plain_.run_parts(split, begin, end);
    prepare();
    const TileSession session;
    int64_t loaded = -1;
    bool fits = false;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = split.first_head + task / this->leaves_, leaf = task % this->leaves_;
      if (index != loaded) fits = load_head(loaded = index);
      if (fits) {
        run_leaves(leaf, leaf + 1, this->partial(split, task));
      } else {
        plain_.run_parts(split, task, task + 1);
      }
    }
    end_stream(this->streamed_);
  }

 private:
  using Base::p_, Base::scale_, Base::padded_dim_, Base::padded_dim_v_, Base::sums_size_, Base::batch_, Base::head_,
      Base::bias_rows_, Base::bias_lanes_, Base::grad_query_lanes_, Base::head_sums_, Base::leaf_sums_;
  using Rows = typename Base::Rows;

  void prepare() {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
  }

  void allocate(Arena& arena) {
    const int64_t keys = p_.seqlen_k, padded_keys = round_up(keys, kTileDepth);
    const int64_t bias_size = p_.bias.type == BiasType::kNone ? 0 : W * round_up(keys, L);
    key_ = SplitMatrix<P>::take(arena, keys, p_.head_dim);
    value_ = SplitMatrix<P>::take(arena, keys, p_.head_dim_v);
    key_columns_ = SplitMatrix<P>::take(arena, p_.head_dim, keys);
    query_lanes_ = SplitMatrix<P>::take(arena, W, p_.head_dim);
    grad_output_lanes_ = SplitMatrix<P>::take(arena, W, p_.head_dim_v);
    query_rows_ = SplitMatrix<P>::take(arena, p_.head_dim, kGroupQueries);
    grad_output_rows_ = SplitMatrix<P>::take(arena, p_.head_dim_v, kGroupQueries);
    probabilities_ = SplitMatrix<kComputed>::take(arena, part_, kGroupQueries);
    grad_scores_ = SplitMatrix<kComputed>::take(arena, part_, kGroupQueries);
    grad_scores_lanes_ = SplitMatrix<kComputed>::take(arena, W, part_);
    for (Block& block : block_) {
      const bool shared = part_ >= keys && &block != block_;
      block.scores = shared ? block_[0].scores : arena.take<float>(padded_keys * W);
      block.grad_probabilities = shared ? block_[0].grad_probabilities : arena.take<float>(padded_keys * W);
      block.grad_query_lanes = arena.take<float>(round_up(p_.head_dim, kTileSide) * W);
    }
    sum_ = arena.take<float>(kTilePanel * max64(padded_dim_, padded_dim_v_));
    bias_rows_ = arena.take<float>(bias_size);
    bias_lanes_ = arena.take<float>(bias_size);
    head_sums_ = arena.take<float>(sums_size_);
    leaf_sums_ = arena.take<float>(this->leaves_ < groups_ ? sums_size_ : 0);
  }

  // Packs a head's keys and values; returns whether all that its products read fits the tiles.
  bool load_head(int64_t index) {
    this->place(index);
    const In *key = head_of<In>(p_.key, batch_, head_), *value = head_of<In>(p_.value, batch_, head_);
    Range keys, values, queries, grad_outputs, again;
    split_a(key, p_.key.row_stride, p_.seqlen_k, p_.head_dim, 1.0f, key_, keys);
    split_a(value, p_.value.row_stride, p_.seqlen_k, p_.head_dim_v, 1.0f, value_, values);
    add_rows(p_.query, p_.head_dim, scale_.queries, queries);
    add_rows(p_.grad_output, p_.head_dim_v, 1, grad_outputs);
    if (!keys.fits() || !values.fits() || !queries.fits() || !grad_outputs.fits()) return false;
    if (p_.grad_lse != nullptr) {
      Range grad_lse;
      const float* row = static_cast<const float*>(p_.grad_lse) + index * p_.seqlen_q;
      for (int64_t i = 0; i < p_.seqlen_q; i += L) grad_lse.add(load_first(row + i, p_.seqlen_q - i));
      if (!grad_lse.fits()) return false;
    }
    split_a_transposed(key, p_.key.row_stride, p_.head_dim, p_.seqlen_k, key_columns_, again);
    return true;
  }

  void add_rows(const View4& view, int64_t columns, float factor, Range& range) const {
    const In* source = head_of<In>(view, batch_, head_);
    for (int64_t i = 0; i < p_.seqlen_q; ++i) {
      for (int64_t c = 0; c < columns; c += L) {
        range.add(load_first(source + i * view.row_stride + c, columns - c) * factor);
      }
    }
  }

  int64_t first_group(int64_t leaf) const { return leaf * groups_ / this->leaves_; }

  // dQ of the queries of leaves [first, last), and what they add to dK and dV; overwrites `sums`.
  void run_leaves(int64_t first, int64_t last, float* sums) {
    for (int64_t i = 0; groups_ == 0 && i < sums_size_; ++i) sums[i] = 0;
    for (int64_t leaf = first; leaf < last; ++leaf) {
      const int64_t begin = first_group(leaf), end = first_group(leaf + 1);
      // Of several groups the sums are complete before they are added to those of the leaves before.
      float* const target = leaf == first || end - begin == 1 ? sums : leaf_sums_;
      for (int64_t group = begin; group < end; ++group) {
        run_group(group, target, group == begin && (leaf == first || target == leaf_sums_));
      }
      if (target != sums) Base::add(leaf_sums_, sums_size_, sums);
    }
  }

  void run_group(int64_t group, float* sums, bool opens) {
    const int64_t begin = group * kGroupQueries, queries = min64(kGroupQueries, p_.seqlen_q - begin);
    const int64_t keys = p_.is_causal ? min64(p_.seqlen_k, begin + queries) : p_.seqlen_k;
    const int64_t blocks = ceil_div(queries, W);
    for (int64_t b = 0; b < blocks; ++b) {
      block_[b].queries = {batch_, head_, begin + b * W, min64(W, queries - b * W)};
      compute_scores(block_[b], keys);
      if (part_ >= keys) compute_gradients(block_[b], b * W, 0, keys);
    }
    pack_rows_of(p_.query, begin, queries, p_.head_dim, scale_.queries, query_rows_);
    pack_rows_of(p_.grad_output, begin, queries, p_.head_dim_v, 1, grad_output_rows_);
    for (int64_t first = 0; first < keys; first += part_) {
      const int64_t count = min64(part_, keys - first);
      for (int64_t b = 0; part_ < keys && b < blocks; ++b) compute_gradients(block_[b], b * W, first, count);
      add_product(probabilities_, grad_output_rows_, count, padded_dim_v_, blocks,
                  this->value_sums(sums) + first * padded_dim_v_, opens);
      add_product(grad_scores_, query_rows_, count, padded_dim_, blocks, sums + first * padded_dim_, opens);
    }
    // Where the sums begin here, keys beyond these have none yet.
    for (int64_t i = keys * padded_dim_; opens && i < p_.seqlen_k * padded_dim_; i += L) store(sums + i, Vec<float>{});
    for (int64_t i = keys * padded_dim_v_; opens && i < p_.seqlen_k * padded_dim_v_; i += L) {
      store(this->value_sums(sums) + i, Vec<float>{});
    }
    for (int64_t b = 0; b < blocks; ++b) {
      grad_query_lanes_ = block_[b].grad_query_lanes;
      this->write_grad_query(block_[b].queries);
    }
  }

  void pack_rows_of(const View4& view, int64_t first, int64_t count, int64_t columns, float factor,
                    const SplitMatrix<P>& target) const {
    Range ignored;
    split_b<true>(head_of<In>(view, batch_, head_) + first * view.row_stride, view.row_stride, columns, count, factor,
                  target, ignored);
  }

  // What a group keeps of one of its blocks.
  struct Block {
    QueryBlock<float> queries;
    Rows rows[kTileVectors];
    float *scores, *grad_probabilities;  // [keys][W]
    float* grad_query_lanes;
  };

  // Keys whose P and dS are kept for the products that sum over a group's queries. All, while they stay in the
  // second-level cache: a block's are computed when its scores still are in the first. Else some at a time, which costs
  // a place for the scores of each block.
  static int64_t part_of(int64_t keys) {
    constexpr int64_t kAll = 640, kPart = 256;
    return keys <= kAll ? round_up(keys, kTilePanel) : round_up(ceil_div(keys, ceil_div(keys, kPart)), kTilePanel);
  }

  // sums [keys][padded] += A · B, or = where the sums begin here.
  void add_product(const SplitMatrix<kComputed>& a, const SplitMatrix<P>& b, int64_t keys, int64_t padded,
                   int64_t steps, float* sums, bool opens) const {
    for (int64_t key = 0; key < keys; key += kTilePanel) {
      const int64_t rows = min64(kTilePanel, keys - key);
      for (int64_t column = 0; column < padded; column += kTilePanel) {
        split_product(a.from(key, 0), b.from(column, 0), rows, min64(kTilePanel, padded - column), steps, false,
                      sum_ + column, padded);
      }
      float* target = sums + key * padded;
      for (int64_t i = 0; i < rows * padded; i += L) {
        store(target + i, opens ? load(sum_ + i) : load(target + i) + load(sum_ + i));
      }
    }
  }

  // The exponentials of a block's scores, and dP.
  void compute_scores(Block& block, int64_t keys) {
    const QueryBlock<float>& queries = block.queries;
    float *scores = block.scores, *grad_probabilities = block.grad_probabilities;
    Range ignored;
    split_b_transposed<true>(head_of<In>(p_.query, batch_, head_) + queries.first * p_.query.row_stride,
                             p_.query.row_stride, queries.count, p_.head_dim, scale_.queries, query_lanes_, ignored);
    split_b_transposed<true>(head_of<In>(p_.grad_output, batch_, head_) + queries.first * p_.grad_output.row_stride,
                             p_.grad_output.row_stride, queries.count, p_.head_dim_v, 1.0f, grad_output_lanes_,
                             ignored);
    split_product(key_, query_lanes_, keys, queries.count, key_.steps, false, scores, W);
    split_product(value_, grad_output_lanes_, keys, queries.count, value_.steps, false, grad_probabilities, W);
    finish_scores(p_, queries, scale_.scores, 0, keys, scores, bias_rows_, bias_lanes_);
    for (int v = 0; v < kTileVectors; ++v) {
      block.rows[v] = v < queries.vectors()
                          ? this->exponentials(queries, v, keys, scores + v * L, grad_probabilities + v * L)
                          : Rows{};
    }
    // Beyond the keys, and in lanes without a query, there is 0 · 0.
    for (int64_t i = keys * W; i < round_up(keys, kTilePanel) * W; i += L) {
      store(scores + i, Vec<float>{});
      store(grad_probabilities + i, Vec<float>{});
    }
    for (int64_t j = 0; queries.vectors() == 1 && j < keys; ++j) {
      store(scores + j * W + L, Vec<float>{});
      store(grad_probabilities + j * W + L, Vec<float>{});
    }
  }

  // P and dS of keys [first, first + keys) and of a block that begins at query `place` of its group; adds their part of
  // dQ.
  void compute_gradients(const Block& block, int64_t place, int64_t first, int64_t keys) const {
    const Block here = block;  // in registers: what is stored might be the block, for all that the compiler knows
    for (int64_t j = 0; j < keys; j += kTileDepth) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        if (i % 5 == 4) keep_tiles_awake();
        pack_gradients(here, place, first, j + i);
      }
    }
    split_product(key_columns_.from(0, first), grad_scores_lanes_, p_.head_dim, block.queries.count,
                  ceil_div(keys, kTileDepth), first > 0, block.grad_query_lanes, W);
  }

  // P and dS of the part's keys j and j + 16, into the operands of dK and dV, which sum over queries, and of dQ, which
  // sums over keys.
  [[gnu::always_inline]] void pack_gradients(const Block& block, int64_t place, int64_t first, int64_t j) const {
    const int64_t row = j % kTilePanel * kTileDepth;
    Vec<float> grad_scores[2][kTileVectors];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t key = first + j + i * kTileSide;
      Vec<float> probabilities[kTileVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const Rows& rows = block.rows[v];
        probabilities[v] = load(block.scores + key * W + v * L) * rows.inverse;
        const Vec<float> centred = load(block.grad_probabilities + key * W + v * L) - rows.delta;
        grad_scores[i][v] = probabilities[v] * (centred + rows.shift);
      }
      split_pair<kComputed, false>((__m512)probabilities[0], (__m512)probabilities[1],
                                   probabilities_.tile(j + i * kTileSide, place) + row);
      split_pair<kComputed, false>((__m512)grad_scores[i][0], (__m512)grad_scores[i][1],
                                   grad_scores_.tile(j + i * kTileSide, place) + row);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      split_pair<kComputed, false>((__m512)grad_scores[0][v], (__m512)grad_scores[1][v],
                                   grad_scores_lanes_.tile(v * kTileSide, j) + row);
    }
  }

  Base plain_;  // for heads that do not fit the tiles
  int64_t groups_ = 0;
  SplitMatrix<P> key_{}, value_{}, key_columns_{}, query_lanes_{}, grad_output_lanes_{}, query_rows_{},
      grad_output_rows_{};
  const int64_t part_;
  SplitMatrix<kComputed> probabilities_{}, grad_scores_{}, grad_scores_lanes_{};
  Block block_[kGroupBlocks] = {};
  float* sum_ = nullptr;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
