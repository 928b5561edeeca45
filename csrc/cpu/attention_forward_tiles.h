// Attention forward of bfloat16 in AMX tiles: O = softmax(scale Q K^T + bias) V for one block of queries at a time.
//
// K is packed as pairs of its columns and V as pairs of its rows, once per head. The scores stand one query per row, in
// float; the exponentials are rounded to bfloat16 for the second product, as PyTorch's own CPU kernel rounds them, and
// summed before that.
#pragma once

#include "attention_forward.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

class AttentionForwardTiles {
  static constexpr int64_t kQueries = 2 * kTileSide;
  // Scores of 32 queries and 512 keys are 64 KiB: in the second-level cache, beside K and V of most heads.
  static constexpr int64_t kKeys = 512;
  static constexpr int64_t kPanelSize = kQueries * kTilePanel;  // floats of one panel of scores or output

 public:
  explicit AttentionForwardTiles(const AttentionParams& p)
      : p_(p),
        blocks_(ceil_div(p.seqlen_k, kKeys)),
        keys_per_block_(round_up(ceil_div(p.seqlen_k, blocks_), kTilePanel)),
        depth_(round_up(p.head_dim, kTileDepth)),
        padded_dim_v_(round_up(p.head_dim_v, kTilePanel)),
        folded_(p.bias.type == BiasType::kNone && p.scale > 0),
        base_(float((folded_ ? p.scale : 1.0) * 1.44269504088896341)) {}

  static int64_t blocks_per_head(const AttentionParams& p) { return ceil_div(p.seqlen_q, kQueries); }

  int64_t scratch_bytes() {
    Arena measure;
    allocate(measure);
    return measure.used();
  }

  void run(int64_t begin, int64_t end) {
    Arena arena(thread_scratch(scratch_bytes()));
    allocate(arena);
    const TileSession session;
    const int64_t per_head = blocks_per_head(p_);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / per_head, batch = index / p_.num_heads, head = index % p_.num_heads;
      if (index != loaded) pack_head(batch, head);
      loaded = index;
      const int64_t first = task % per_head * kQueries;
      run_block(batch, head, first, min64(kQueries, p_.seqlen_q - first));
    }
  }

 private:
  void allocate(Arena& arena) {
    const int64_t keys = round_up(p_.seqlen_k, kTilePanel);
    value_rows_ = arena.take<const BFloat16*>(p_.seqlen_k);
    key_ = arena.take<BFloat16>(packed_size(keys, depth_));
    value_ = arena.take<BFloat16>(packed_size(p_.head_dim_v, keys));
    query_ = arena.take<BFloat16>(kQueries * tile_stride(depth_));
    probabilities_ = arena.take<BFloat16>(kQueries * tile_stride(keys_per_block_));
    scores_ = arena.take<float>(kQueries * keys_per_block_);
    output_ = arena.take<float>(kQueries * padded_dim_v_);
    bias_ = arena.take<float>(keys_per_block_);
  }

  void pack_head(int64_t batch, int64_t head) {
    pack_transposed(head_of<BFloat16>(p_.key, batch, head), p_.key.row_stride, p_.seqlen_k, p_.head_dim, key_);
    const BFloat16* value = head_of<BFloat16>(p_.value, batch, head);
    for (int64_t j = 0; j < p_.seqlen_k; ++j) value_rows_[j] = value + j * p_.value.row_stride;
    // Each block of keys on its own: it is a product on its own.
    for (int64_t first = 0; first < p_.seqlen_k; first += keys_per_block_) {
      pack_rows(value_rows_ + first, min64(keys_per_block_, p_.seqlen_k - first), p_.head_dim_v,
                value_ + first * padded_dim_v_);
    }
  }

  void run_block(int64_t batch, int64_t head, int64_t first, int64_t count) {
    const BFloat16* query = head_of<BFloat16>(p_.query, batch, head) + first * p_.query.row_stride;
    for (int64_t i = 0; i < count; ++i) {
      copy_padded(query + i * p_.query.row_stride, p_.head_dim, query_ + i * tile_stride(depth_));
      maximum_[i] = -kInfinity;
      sum_[i] = 0;
    }
    const int64_t bias = batch * p_.bias.batch_stride + head * p_.bias.head_stride + first * p_.bias.query_stride;
    const int64_t all_keys = p_.is_causal ? min64(p_.seqlen_k, first + count) : p_.seqlen_k;
    const auto nothing = [](int64_t) {};
    for (int64_t key = 0; key < all_keys; key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - key), padded = round_up(keys, kTilePanel);
      // V of this block is packed to all its keys; a causal block may end before them.
      const int64_t packed = round_up(min64(keys_per_block_, p_.seqlen_k - key), kTilePanel);
      const int64_t stride = tile_stride(keys_per_block_);
      tile_product({query_, tile_stride(depth_), key_ + key * depth_, scores_, kTilePanel, kPanelSize}, count, padded,
                   depth_, false, nothing);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t seen = p_.is_causal ? min64(keys, first + i + 1 - key) : keys;
        if (!folded_) add_bias(i, bias + i * p_.bias.query_stride + key * p_.bias.key_stride, seen);
        mask(i, max64(seen, 0), padded);
        find_maximum(i, padded, key > 0);
      }
      // Rows in a loop of their own: one's exponentials need not wait for the next one's maximum.
      for (int64_t i = 0; i < count; ++i) {
        exponentials(i, padded, probabilities_ + i * stride);
        for (int64_t j = padded; j < packed; ++j) probabilities_[i * stride + j] = {};
      }
      tile_product({probabilities_, stride, value_ + key * padded_dim_v_, output_, kTilePanel, kPanelSize}, count,
                   p_.head_dim_v, packed, key > 0, nothing);
    }
    write(batch, head, first, count);
  }

  // Scales the first `seen` scores of row i and adds the bias.
  void add_bias(int64_t i, int64_t bias, int64_t seen) {
    if (seen <= 0) return;
    const bool has_bias = p_.bias.type != BiasType::kNone;
    if (has_bias) load_bias_row(p_.bias, bias, seen, bias_);
    for (int64_t j = 0; j < seen; j += kTileSide) {
      const Vec<float> score = load(row(scores_, i, j)) * float(p_.scale);
      store(row(scores_, i, j), has_bias ? score + load(bias_ + j) : score);
    }
  }

  // Sets the scores of row i from `seen` on to -inf.
  void mask(int64_t i, int64_t seen, int64_t padded) {
    const __m512 none = _mm512_set1_ps(-kInfinity);
    if (seen % kTileSide != 0) {
      _mm512_mask_storeu_ps(row(scores_, i, seen / kTileSide * kTileSide), __mmask16(~first_lanes(seen % kTileSide)),
                            none);
    }
    for (int64_t j = round_up(seen, kTileSide); j < padded; j += kTileSide) store(row(scores_, i, j), (Vec<float>)none);
  }

  // Finds the largest score of row i so far, NaN ignored, and shrinks what was summed under a smaller one.
  void find_maximum(int64_t i, int64_t padded, bool later) {
    __m512 highs[2] = {_mm512_set1_ps(maximum_[i]), _mm512_set1_ps(maximum_[i])};
    for (int64_t j = 0; j < padded; j += kTilePanel) {
      // The second operand where the first is NaN.
      highs[0] = _mm512_max_ps((__m512)load(row(scores_, i, j)), highs[0]);
      highs[1] = _mm512_max_ps((__m512)load(row(scores_, i, j + kTileSide)), highs[1]);
    }
    const float high = _mm512_reduce_max_ps(_mm512_max_ps(highs[0], highs[1]));
    // Without a key so far any finite offset will do; NaN scores must still reach the exponential.
    offset_[i] = high == -kInfinity ? 0 : high;
    if (later) {
      const Vec<float> factor = exp2(splat((maximum_[i] - offset_[i]) * base_));
      sum_[i] *= factor[0];
      for (int64_t d = 0; d < padded_dim_v_; d += kTileSide) {
        store(row(output_, i, d), load(row(output_, i, d)) * factor);
      }
    }
    maximum_[i] = high;
  }

  // Writes the exponentials of row i, not yet divided by their sum, as an operand. The maximum is subtracted before
  // the factor: its own exponential must be exactly 1, or the LSE of a row with one key is not its score.
  void exponentials(int64_t i, int64_t padded, BFloat16* target) {
    Vec<float> sums[2] = {};
    for (int64_t j = 0; j < padded; j += kTilePanel) {
      const Vec<float> low = exp2((load(row(scores_, i, j)) - offset_[i]) * base_);
      const Vec<float> high = exp2((load(row(scores_, i, j + kTileSide)) - offset_[i]) * base_);
      sums[0] += low;
      sums[1] += high;
      _mm512_storeu_si512(target + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
    sum_[i] += _mm512_reduce_add_ps((__m512)(sums[0] + sums[1]));
  }

  // 2^x for x <= 127; exactly 0 below -126 (so for -inf), NaN for NaN. The polynomial of degree 5 with the least
  // relative error on [-1/2, 1/2] (Remez's exchange), its constant then set to 1 so that 2^0 = 1: within 2.2e-7, two
  // roundings of float, and far below one of bfloat16.
  static Vec<float> exp2(Vec<float> x) {
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

  void write(int64_t batch, int64_t head, int64_t first, int64_t count) {
    float* lse = static_cast<float*>(p_.lse) + (batch * p_.num_heads + head) * p_.seqlen_q + first;
    BFloat16* output = mutable_head_of<BFloat16>(p_.output, batch, head) + first * p_.output.row_stride;
    for (int64_t i = 0; i < count; ++i) {
      // A sum of exactly 0 is a row without keys: its output is 0. A NaN sum compares false and stays NaN.
      const float inverse = sum_[i] == 0 ? 0 : 1 / sum_[i];
      for (int64_t d = 0; d < p_.head_dim_v; d += kTilePanel) {
        const Vec<float> low = load(row(output_, i, d)) * inverse,
                         high = load(row(output_, i, d + kTileSide)) * inverse;
        store_panel(low, high, p_.head_dim_v - d, output + i * p_.output.row_stride + d);
      }
      lse[i] = (maximum_[i] == -kInfinity ? 0 : maximum_[i] * (folded_ ? float(p_.scale) : 1)) + ::logf(sum_[i]);
    }
  }

  static float* row(float* panels, int64_t i, int64_t column) {
    return panels + column / kTilePanel * kPanelSize + i * kTilePanel + column % kTilePanel;
  }

  const AttentionParams& p_;
  const int64_t blocks_, keys_per_block_, depth_, padded_dim_v_;
  const bool folded_;  // the scale, into the exponent; else it is multiplied in before the bias is added
  const float base_;   // log2 of the number whose powers the exponentials are
  const BFloat16** value_rows_;
  BFloat16 *key_, *value_, *query_, *probabilities_;
  float *scores_, *output_, *bias_;
  float maximum_[kQueries], offset_[kQueries], sum_[kQueries];
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
