// Attention forward in AMX tiles: O = softmax(scale Q K^T + bias) V for one block of queries at a time.
//
// K is packed as columns of an operand B and V as rows of one, once per head. The scores stand one query per row, in
// float; the exponentials become an operand A for the second product, and are summed before that.
//
// bfloat16 is multiplied as it is, its exponentials rounded to bfloat16, as PyTorch's own CPU kernel rounds them. float
// and half are multiplied in parts (split.h); heads and blocks that do not fit these go to attention_forward.h.
#pragma once

#include "attention_forward.h"
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

  // A bias is added to the scores as they lie; attention_forward.h transposes it.
  static bool pays(const AttentionParams& p) { return split_pays<In>(p, p.bias.type == BiasType::kNone ? 1 : 3); }

  // What is left to multiply into the products of Q and K.
  float scale() const { return scale_.scores; }

  // Both return whether what they packed fits the tiles.
  bool pack_head(const In* key, const In* value) {
    Range keys, values;
    split_b_transposed(key, p_.key.row_stride, p_.seqlen_k, p_.head_dim, 1.0f, key_, keys);
    split_b(value, p_.value.row_stride, p_.head_dim_v, p_.seqlen_k, 1.0f, value_, values);
    return keys.fits() && values.fits();
  }
  bool pack_queries(const In* query, int64_t count) {
    Range queries;
    split_a(query, p_.query.row_stride, count, p_.head_dim, scale_.queries, query_, queries);
    return queries.fits();
  }

  // kBase^x is what `exponential` computes.
  static constexpr float kLogOfBase = 1;
  static Vec<float> exponential(Vec<float> x) { return exp(x); }

  // Exponentials of row i and of the 32 keys from `key` of a chunk on.
  void store_exponentials(int64_t i, int64_t key, Vec<float> low, Vec<float> high) const {
    split_pair<kComputed, false>((__m512)low, (__m512)high, probabilities_.tile(i, key) + i % kTileSide * kTileDepth);
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
      : p_(p),
        keys_per_block_(keys_per_block),
        depth_(round_up(p.head_dim, kTileDepth)),
        padded_dim_v_(round_up(p.head_dim_v, kTilePanel)) {}

  void allocate(Arena& arena) {
    const int64_t keys = round_up(p_.seqlen_k, kTilePanel);
    value_rows_ = arena.take<const BFloat16*>(p_.seqlen_k);
    key_ = arena.take<BFloat16>(packed_size(keys, depth_));
    value_ = arena.take<BFloat16>(packed_size(p_.head_dim_v, keys));
    query_ = arena.take<BFloat16>(2 * kTileSide * tile_stride(depth_));
    probabilities_ = arena.take<BFloat16>(2 * kTileSide * tile_stride(keys_per_block_));
  }

  static bool pays(const AttentionParams&) { return true; }

  float scale() const { return float(p_.scale); }

  bool pack_head(const BFloat16* key, const BFloat16* value) {
    pack_transposed(key, p_.key.row_stride, p_.seqlen_k, p_.head_dim, key_);
    for (int64_t j = 0; j < p_.seqlen_k; ++j) value_rows_[j] = value + j * p_.value.row_stride;
    pack_rows(value_rows_, p_.seqlen_k, p_.head_dim_v, value_);
    return true;
  }
  bool pack_queries(const BFloat16* query, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      copy_padded(query + i * p_.query.row_stride, p_.head_dim, query_ + i * tile_stride(depth_));
    }
    return true;
  }

  // 2^x for x <= 127; exactly 0 below -126 (so for -inf), NaN for NaN. The polynomial of degree 5 with the least
  // relative error on [-1/2, 1/2] (Remez's exchange), its constant then set to 1 so that 2^0 = 1: within 2.2e-7, two
  // roundings of float, and far below one of bfloat16.
  static constexpr float kLogOfBase = 1.44269504088896341f;
  static Vec<float> exponential(Vec<float> x) {
    using I = Simd<float>::Int;
    const Vec<float> magic = splat(12582912.0f);  // 1.5·2^23: adding it leaves the nearest integer in the low bits
    const Vec<float> shifted = x + magic;
    const Vec<float> r = x - (shifted - magic);
    Vec<float> p = splat(0.00132764719f);
    p = p * r + 0.00967554104f;
    p = p * r + 0.0555071328f;
    p = p * r + 0.240221197f;
    p = p * r + 0.693146971f;
    p = p * r + 1.0f;
    return x < -126.0f ? Vec<float>{} : (Vec<float>)((I)p + ((I)shifted << 23));
  }

  void store_exponentials(int64_t i, int64_t key, Vec<float> low, Vec<float> high) const {
    _mm512_storeu_si512(probabilities_ + i * tile_stride(keys_per_block_) + key,
                        (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
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
  const int64_t keys_per_block_, depth_, padded_dim_v_;
  const BFloat16** value_rows_;
  BFloat16 *key_, *value_, *query_, *probabilities_;
};

template <class In>
class AttentionForwardTiles {
  using Operands = ForwardOperands<In>;
  static constexpr int64_t kQueries = 2 * kTileSide;
  static constexpr int64_t kPanelSize = kQueries * kTilePanel;  // floats of one panel of scores or output
  static_assert(kQueries == kPanel<float>, "the blocks of attention_forward.h");

 public:
  explicit AttentionForwardTiles(const AttentionParams& p)
      : p_(p),
        plain_(p),
        keys_per_block_(round_up(ceil_div(p.seqlen_k, ceil_div(p.seqlen_k, Operands::kKeys)), kTilePanel)),
        padded_dim_v_(round_up(p.head_dim_v, kTilePanel)),
        operands_(p, keys_per_block_),
        folded_(p.bias.type == BiasType::kNone && p.scale > 0),
        factor_((folded_ ? operands_.scale() : 1) * Operands::kLogOfBase) {}

  static int64_t blocks_per_head(const AttentionParams& p) { return ceil_div(p.seqlen_q, kQueries); }

  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure);
    return max64(measure.used(), plain_.scratch_bytes());
  }

  void run(int64_t begin, int64_t end) {
    if (!Operands::pays(p_)) return plain_.run(begin, end);
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
    const TileSession session;
    const int64_t per_head = blocks_per_head(p_);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / per_head, batch = index / p_.num_heads, head = index % p_.num_heads;
      if (index != loaded &&
          !operands_.pack_head(head_of<In>(p_.key, batch, head), head_of<In>(p_.value, batch, head))) {
        const int64_t last = min64(end, (index + 1) * per_head);
        plain_.run(task, last);  // in the same scratch
        task = last - 1;
        continue;
      }
      loaded = index;
      const int64_t first = task % per_head * kQueries, count = min64(kQueries, p_.seqlen_q - first);
      const In* query = head_of<In>(p_.query, batch, head) + first * p_.query.row_stride;
      if (operands_.pack_queries(query, count)) {
        run_block(batch, head, first, count);
      } else {
        plain_.run(task, task + 1);
        loaded = -1;
      }
    }
  }

 private:
  void allocate(Arena& arena) {
    operands_.allocate(arena);
    scores_ = arena.take<float>(kQueries * keys_per_block_);
    output_ = arena.take<float>(kQueries * padded_dim_v_);
    bias_ = arena.take<float>(keys_per_block_);
  }

  void run_block(int64_t batch, int64_t head, int64_t first, int64_t count) {
    // For writing, long before it happens. Beside bfloat16's few products this gains nothing.
    if constexpr (!__is_same(In, BFloat16)) {
      const In* output = head_of<In>(p_.output, batch, head) + first * p_.output.row_stride;
      fetch_rows<true>(output, p_.output.row_stride, count, p_.head_dim_v);
    }
    for (int64_t i = 0; i < count; ++i) {
      maximum_[i] = -kInfinity;
      sum_[i] = Vec<float>{};
    }
    const int64_t bias = batch * p_.bias.batch_stride + head * p_.bias.head_stride + first * p_.bias.query_stride;
    const int64_t all_keys = p_.is_causal ? min64(p_.seqlen_k, first + count) : p_.seqlen_k;
    for (int64_t key = 0; key < all_keys; key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - key), padded = round_up(keys, kTilePanel);
      operands_.multiply_keys(count, key, padded, scores_, kPanelSize);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t seen = p_.is_causal ? min64(keys, first + i + 1 - key) : keys;
        const int64_t offset = bias + i * p_.bias.query_stride + key * p_.bias.key_stride;
        const float high = folded_ ? finish_row<false>(i, seen, padded, nullptr)
                                   : finish_row<true>(i, seen, padded, bias_row(offset, seen));
        raise_maximum(i, high, key > 0);
      }
      for (int64_t chunk = 0; chunk < padded; chunk += Operands::kChunk) {
        const int64_t chunk_keys = min64(Operands::kChunk, padded - chunk);
        // Rows in a loop of their own: one's exponentials need not wait for the next one's maximum.
        for (int64_t i = 0; i < count; ++i) {
          factor_ == 1 ? exponentials<false>(i, chunk, chunk_keys) : exponentials<true>(i, chunk, chunk_keys);
        }
        operands_.multiply_values(count, key + chunk, chunk_keys, key + chunk > 0, output_, kPanelSize);
      }
    }
    write(batch, head, first, count);
  }

  // The bias of the first `seen` keys of a row: in place where it is stored as it is added, and where there is none, 0.
  const float* bias_row(int64_t offset, int64_t seen) const {
    if (p_.bias.type == BiasType::kFloat32 && p_.bias.key_stride == 1) {
      return static_cast<const float*>(p_.bias.data) + offset;
    }
    if (p_.bias.type == BiasType::kNone) {
      for (int64_t j = 0; j < seen; ++j) bias_[j] = 0;
    } else {
      load_bias_row(p_.bias, offset, seen, bias_);
    }
    return bias_;
  }

  // Sets the scores of row i from `seen` on to -inf, scales the others and adds the bias if Biased, and returns the
  // largest so far, NaN ignored.
  template <bool Biased>
  float finish_row(int64_t i, int64_t seen, int64_t padded, const float* bias) {
    __m512 highs[2] = {_mm512_set1_ps(maximum_[i]), _mm512_set1_ps(maximum_[i])};
    const auto finish = [&](int64_t j) {
      float* score = row(scores_, i, j);
      const __mmask16 lanes = __mmask16(first_lanes(seen - j));
      Vec<float> value = load(score);
      if (Biased) value = value * operands_.scale() + (Vec<float>)_mm512_maskz_loadu_ps(lanes, bias + j);
      if (Biased || lanes != 0xffff) {
        value = (Vec<float>)_mm512_mask_blend_ps(lanes, _mm512_set1_ps(-kInfinity), (__m512)value);
        store(score, value);
      }
      return (__m512)value;
    };
    for (int64_t j = 0; j < padded; j += kTilePanel) {
      // The second operand where the first is NaN.
      highs[0] = _mm512_max_ps(finish(j), highs[0]);
      highs[1] = _mm512_max_ps(finish(j + kTileSide), highs[1]);
    }
    return _mm512_reduce_max_ps(_mm512_max_ps(highs[0], highs[1]));
  }

  // Makes `high` the maximum of row i, and shrinks what was summed under a smaller one.
  void raise_maximum(int64_t i, float high, bool later) {
    // Without a key so far any finite offset will do; NaN scores must still reach the exponential.
    offset_[i] = high == -kInfinity ? 0 : high;
    if (later) {
      const Vec<float> factor = Operands::exponential(splat((maximum_[i] - offset_[i]) * factor_));
      sum_[i] *= factor;
      for (int64_t d = 0; d < padded_dim_v_; d += kTileSide) {
        store(row(output_, i, d), load(row(output_, i, d)) * factor);
      }
    }
    maximum_[i] = high;
  }

  // Makes the exponentials of row i and keys [chunk, chunk + keys) an operand, not yet divided by their sum. The
  // maximum is subtracted before the factor: its own exponential must be exactly 1, or the LSE of a row with one key is
  // not its score.
  template <bool Scaled>
  void exponentials(int64_t i, int64_t chunk, int64_t keys) {
    const auto exponential = [&](const float* score) {
      const Vec<float> centred = load(score) - offset_[i];
      return Operands::exponential(Scaled ? centred * factor_ : centred);
    };
    Vec<float> sums[2] = {};
    for (int64_t j = 0; j < keys; j += kTilePanel) {
      const float* scores = row(scores_, i, chunk + j);
      const Vec<float> low = exponential(scores), high = exponential(scores + kTileSide);
      sums[0] += low;
      sums[1] += high;
      operands_.store_exponentials(i, j, low, high);
    }
    sum_[i] += sums[0] + sums[1];
  }

  void write(int64_t batch, int64_t head, int64_t first, int64_t count) {
    float* lse = static_cast<float*>(p_.lse) + (batch * p_.num_heads + head) * p_.seqlen_q + first;
    In* output = mutable_head_of<In>(p_.output, batch, head) + first * p_.output.row_stride;
    alignas(64) float sums[kQueries] = {}, inverses[kQueries];
    for (int64_t i = 0; i < count; ++i) sums[i] = _mm512_reduce_add_ps((__m512)sum_[i]);
    for (int64_t i = 0; i < kQueries; i += kTileSide) {
      // A sum of exactly 0 is a row without keys: its output is 0. A NaN sum compares false and stays NaN.
      const Vec<float> sum = load(sums + i), maximum = load(maximum_ + i);
      store(inverses + i, sum == 0.0f ? Vec<float>{} : 1.0f / sum);
      const Vec<float> offset = maximum == -kInfinity ? Vec<float>{} : maximum * (folded_ ? operands_.scale() : 1.0f);
      store_first(offset + log_of_sum(sum), count - i, lse + i);
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < p_.head_dim_v; d += kTilePanel) {
        const Vec<float> low = load(row(output_, i, d)) * inverses[i];
        const Vec<float> high = load(row(output_, i, d + kTileSide)) * inverses[i];
        In* target = output + i * p_.output.row_stride + d;
        if constexpr (__is_same(In, BFloat16)) {
          store_panel(low, high, p_.head_dim_v - d, target);
        } else {
          store_first(low, p_.head_dim_v - d, target);
          store_first(high, p_.head_dim_v - d - kTileSide, target + kTileSide);
        }
      }
    }
  }

  static float* row(float* panels, int64_t i, int64_t column) {
    return panels + column / kTilePanel * kPanelSize + i * kTilePanel + column % kTilePanel;
  }

  const AttentionParams& p_;
  AttentionForward<In> plain_;
  const int64_t keys_per_block_, padded_dim_v_;
  Operands operands_;
  const bool folded_;   // the scale, into the exponent; else it is multiplied in before the bias is added
  const float factor_;  // of what is left of a score without the maximum, for Operands::exponential
  float *scores_, *output_, *bias_;
  float maximum_[kQueries] = {}, offset_[kQueries];
  Vec<float> sum_[kQueries];  // over every sixteenth key
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
