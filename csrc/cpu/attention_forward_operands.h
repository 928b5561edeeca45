// The operands of attention forward in AMX tiles, one class per type of input: how K, V, Q and the exponentials are
// packed, and the two products.
#pragma once

#include "attention_common.h"
#include "split.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// The operands of one type of input: how they are packed, and their products.
template <class In>
class ForwardOperands {
  static constexpr int P = kParts<In>, kComputed = kComputedParts<In>;

 public:
  // Keys treated at once: scores of 32 queries and 1024 keys are 128 KiB, in the second-level cache.
  static constexpr int64_t kKeys = 1024;
  // Keys whose exponentials are kept: 24 KiB of parts stay in the first-level cache until they are multiplied.
  static constexpr int64_t kChunk = 64;

  ForwardOperands(const AttentionParams& p, int64_t) : p_(p), scale_(p.scale) {}

  void allocate(Arena& arena) {
    const int64_t keys = round_up(p_.seqlen_k, kTilePanel);
    key_ = SplitMatrix<P>::take(arena, keys, p_.head_dim);
    value_ = SplitMatrix<P>::take(arena, round_up(p_.head_dim_v, kTilePanel), keys);
    query_ = SplitMatrix<P>::take(arena, 2 * kTileSide, p_.head_dim);
    probabilities_ = SplitMatrix<kComputed>::take(arena, 2 * kTileSide, kChunk);
  }

  // attention_forward.h adds a bias in registers, which takes less than here.
  static bool pays(const AttentionParams& p) { return split_pays<In>(p, p.bias.type == BiasType::kNone ? 1 : 1.6); }

  // What queries are multiplied with when they are packed, and what is left for the products of Q and K.
  float query_scale() const { return scale_.queries; }
  float scale() const { return scale_.scores; }

  // Keys beside whole panels up to which attention_forward_rest.h is faster (benchmarks/NOTES.md).
  static constexpr int64_t kRestKeys = __is_same(In, float) ? 7 : 5;

  // Both return whether what they packed fits the tiles.
  bool pack_head(const In* key, const In* value) {
    Range keys, values;
    split_b_transposed(key, p_.key.row_stride, p_.seqlen_k, p_.head_dim, 1.0f, key_, keys);
    split_b(value, p_.value.row_stride, p_.head_dim_v, p_.seqlen_k, 1.0f, value_, values);
    return keys.fits() && values.fits();
  }
  bool pack_queries(const In* query, int64_t count) {
    Range queries;
    split_a<true>(query, p_.query.row_stride, count, p_.head_dim, scale_.queries, query_, queries);
    return queries.fits();
  }

  // kBase^x is what `exponential` computes.
  static constexpr float kLogOfBase = 1;
  template <int N>
  [[gnu::always_inline]] static void exponentials(Vec<float> (&x)[N]) {
    exp(x);
  }

  // Where the exponentials of row i begin in a chunk, and how far each 32 keys lie from the next ones.
  BFloat16* exponentials_of(int64_t i) const { return probabilities_.tile(i, 0) + i % kTileSide * kTileDepth; }
  static constexpr int64_t kStep = SplitMatrix<kComputed>::kStep;
  [[gnu::always_inline]] static void store_exponentials(Vec<float> low, Vec<float> high, BFloat16* target) {
    split_pair<kComputed, false>((__m512)low, (__m512)high, target);
  }

  void multiply_keys(int64_t count, int64_t key, int64_t keys, float* scores, int64_t panel) const {
    for (int64_t j = 0; j < keys; j += kTilePanel) {
      split_product(query_, key_.from(key + j, 0), count, kTilePanel, key_.steps, false,
                    scores + j / kTilePanel * panel, kTilePanel);
    }
  }
  // O (+)= the exponentials of keys [key, key + keys) · V.
  void multiply_values(int64_t count, int64_t key, int64_t keys, bool accumulate, float* output, int64_t panel) const {
    for (int64_t d = 0; d < p_.head_dim_v; d += kTilePanel) {
      split_product(probabilities_, value_.from(d, key), count, min64(kTilePanel, p_.head_dim_v - d), keys / kTileDepth,
                    accumulate, output + d / kTilePanel * panel, kTilePanel);
    }
  }

 private:
  const AttentionParams& p_;
  const Scale<float> scale_;
  SplitMatrix<P> key_{}, value_{}, query_{};
  SplitMatrix<kComputed> probabilities_{};
};

template <>
class ForwardOperands<BFloat16> {
 public:
  // Scores of 32 queries and 512 keys are 64 KiB: in the second-level cache, beside K and V of most heads.
  static constexpr int64_t kKeys = 512;
  static constexpr int64_t kChunk = kKeys;

  ForwardOperands(const AttentionParams& p, int64_t keys_per_block)
      : p_(p), keys_per_block_(keys_per_block), depth_(round_up(p.head_dim, kTileDepth)) {}

  void allocate(Arena& arena) {
    const int64_t keys = round_up(p_.seqlen_k, kTilePanel);
    value_rows_ = arena.take<const BFloat16*>(p_.seqlen_k);
    key_ = arena.take<BFloat16>(packed_size(keys, depth_));
    value_ = arena.take<BFloat16>(packed_size(p_.head_dim_v, keys));
    query_ = arena.take<BFloat16>(2 * kTileSide * tile_stride(depth_));
    probabilities_ = arena.take<BFloat16>(2 * kTileSide * tile_stride(keys_per_block_));
  }

  static bool pays(const AttentionParams&) { return true; }

  float query_scale() const { return 1; }
  float scale() const { return float(p_.scale); }

  static constexpr int64_t kRestKeys = 2;

  bool pack_head(const BFloat16* key, const BFloat16* value) {
    pack_transposed(key, p_.key.row_stride, p_.seqlen_k, p_.head_dim, key_);
    fetch_rows(value, p_.value.row_stride, p_.seqlen_k, p_.head_dim_v);
    for (int64_t j = 0; j < p_.seqlen_k; ++j) value_rows_[j] = value + j * p_.value.row_stride;
    pack_rows(value_rows_, p_.seqlen_k, p_.head_dim_v, value_);
    return true;
  }
  bool pack_queries(const BFloat16* query, int64_t count) {
    fetch_rows(query, p_.query.row_stride, count, p_.head_dim);
    keep_tiles_awake();
    for (int64_t i = 0; i < count; ++i) {
      copy_padded(query + i * p_.query.row_stride, p_.head_dim, query_ + i * tile_stride(depth_));
    }
    return true;
  }

  // 2^x for x <= 127; exactly 0 below -126 (so for -inf), NaN for NaN. The polynomial of degree 5 with the least
  // relative error on [-1/2, 1/2] (Remez's exchange), its constant then set to 1 so that 2^0 = 1: within 2.2e-7, two
  // roundings of float, and far below one of bfloat16.
  static constexpr float kLogOfBase = 1.44269504088896341f;
  template <int N>
  [[gnu::always_inline]] static void exponentials(Vec<float> (&x)[N]) {
    constexpr float kCoefficients[] = {0.00132764719f, 0.00967554104f, 0.0555071328f, 0.240221197f, 0.693146971f, 1.0f};
    Vec<float> shifted[N], r[N], p[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      shifted[i] = x[i] + kMagic;
      r[i] = x[i] - (shifted[i] - kMagic);
    }
    polynomials(kCoefficients, r, p);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) x[i] = times_power(p[i], shifted[i], x[i], -126.0f);
  }

  BFloat16* exponentials_of(int64_t i) const { return probabilities_ + i * tile_stride(keys_per_block_); }
  static constexpr int64_t kStep = kTilePanel;
  [[gnu::always_inline]] static void store_exponentials(Vec<float> low, Vec<float> high, BFloat16* target) {
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }

  void multiply_keys(int64_t count, int64_t key, int64_t keys, float* scores, int64_t panel) const {
    tile_product({query_, tile_stride(depth_), key_ + key * depth_, scores, kTilePanel, panel}, count, keys, depth_,
                 false, [](int64_t) {});
  }
  void multiply_values(int64_t count, int64_t key, int64_t keys, bool accumulate, float* output, int64_t panel) const {
    tile_product({probabilities_, tile_stride(keys_per_block_), value_ + key * kTilePanel, output, kTilePanel, panel,
                  round_up(p_.seqlen_k, kTileDepth)},
                 count, p_.head_dim_v, keys, accumulate, [](int64_t) {});
  }

 private:
  const AttentionParams& p_;
  const int64_t keys_per_block_, depth_;
  const BFloat16** value_rows_;
  BFloat16 *key_, *value_, *query_, *probabilities_;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
