// Attention forward in AMX tiles: O = softmax(scale Q K^T + bias) V for one block of queries at a time.
//
// K is packed as columns of an operand B and V as rows of one, once per head. The scores stand one query per row, in
// float; the exponentials become an operand A for the second product, and are summed before that. The few keys beside
// whole panels of tiles take part without them (attention_forward_rest.h).
//
// bfloat16 is multiplied as it is, its exponentials rounded to bfloat16, as PyTorch's own CPU kernel rounds them. float
// and half are multiplied in parts (split.h); heads and blocks that do not fit these go to attention_forward.h.
#pragma once

#include "attention_forward.h"
#include "attention_forward_operands.h"
#include "attention_forward_rest.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

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
        rest_(p, Operands::kRestKeys),
        tiled_(without_keys(p, rest_.count())),
        keys_per_block_(round_up(ceil_div(tiled_.seqlen_k, ceil_div(tiled_.seqlen_k, Operands::kKeys)), kTilePanel)),
        padded_dim_v_(round_up(p.head_dim_v, kTilePanel)),
        streamed_(!__is_same(In, Half) && streams_output<In>(p)),
        operands_(tiled_, keys_per_block_),
        folded_(p.bias.type == BiasType::kNone && operands_.scale() > 0),
        scale_(folded_ ? 1 : operands_.scale()),
        left_(folded_ ? operands_.scale() : 1),
        factor_(left_ * Operands::kLogOfBase) {}

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
      if (index != loaded) {
        const In *key = head_of<In>(p_.key, batch, head), *value = head_of<In>(p_.value, batch, head);
        if (!operands_.pack_head(key, value)) {
          const int64_t last = min64(end, (index + 1) * per_head);
          plain_.run(task, last);  // in the same scratch
          task = last - 1;
          continue;
        }
        rest_.load_head(key, value);
        loaded = index;
      }
      const int64_t first = task % per_head * kQueries;
      const QueryBlock<float> block{batch, head, first, min64(kQueries, p_.seqlen_q - first)};
      const In* query = head_of<In>(p_.query, batch, head) + first * p_.query.row_stride;
      if (operands_.pack_queries(query, block.count)) {
        run_block(block, query);
      } else {
        plain_.run(task, task + 1);
        loaded = -1;
      }
    }
    end_stream(streamed_);
  }

 private:
  void allocate(Arena& arena) {
    operands_.allocate(arena);
    rest_.allocate(arena);
    scores_ = arena.take<float>(kQueries * keys_per_block_);
    output_ = arena.take<float>(kQueries * padded_dim_v_);
    bias_ = arena.take<float>(keys_per_block_);
  }

  void run_block(const QueryBlock<float>& block, const In* query) {
    const int64_t count = block.count;
    // For writing, long before it happens.
    if (!streamed_) fetch_rows<true>(output_of(block), p_.output.row_stride, count, p_.head_dim_v);
    for (int64_t i = 0; i < count; ++i) {
      maximum_[i] = -kInfinity;
      sum_[i] = Vec<float>{};
    }
    rest_.multiply_keys(block, query, operands_.query_scale() * scale_, maximum_);
    const int64_t all_keys = p_.is_causal ? min64(tiled_.seqlen_k, block.first + count) : tiled_.seqlen_k;
    for (int64_t key = 0; key < all_keys; key += keys_per_block_) {
      const int64_t keys = min64(keys_per_block_, all_keys - key), padded = round_up(keys, kTilePanel);
      operands_.multiply_keys(count, key, padded, scores_, kPanelSize);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t seen = p_.is_causal ? min64(keys, block.first + i + 1 - key) : keys;
        const int64_t offset = bias_offset(p_.bias, block, key) + i * p_.bias.query_stride;
        const float high = folded_ ? finish_row<false>(i, seen, padded, nullptr)
                                   : finish_row<true>(i, seen, padded, bias_row(offset, seen));
        raise_maximum(i, high, key > 0);
      }
      for (int64_t chunk = 0; chunk < padded; chunk += Operands::kChunk) {
        const int64_t chunk_keys = min64(Operands::kChunk, padded - chunk);
        // Rows in a loop of their own: one's exponentials need not wait for the next one's maximum.
        const auto between_rows = [&](int64_t i) {
          if (Operands::kChunk > 64) return;           // the vectors between longer ones would take too many
          if (i == 10 || i == 21) keep_tiles_awake();  // a third of a short chunk takes 0.2 µs
          if (block.first + kQueries + i < p_.seqlen_q) fetch_bias(block, kQueries + i, key + chunk, chunk_keys);
        };
        factor_ == 1 ? exponentials<false>(count, chunk, chunk_keys, between_rows)
                     : exponentials<true>(count, chunk, chunk_keys, between_rows);
        operands_.multiply_values(count, key + chunk, chunk_keys, key + chunk > 0, output_, kPanelSize);
      }
    }
    write(block);
  }

  // Asks for the bias of row i and keys [key, key + keys) where it is read in place, into the second-level cache: the
  // next block's, a little at a time, since all of it together waits for memory.
  [[gnu::always_inline]] void fetch_bias(const QueryBlock<float>& block, int64_t i, int64_t key, int64_t keys) const {
    if (!lies_as_added(p_.bias)) return;
    const float* source = static_cast<const float*>(p_.bias.data) + bias_offset(p_.bias, block, key);
    for (int64_t j = 0; j < keys; j += kTileSide) _mm_prefetch(source + i * p_.bias.query_stride + j, _MM_HINT_T1);
  }

  // The bias of the first `seen` keys of a row: in place where it is stored as it is added, and where there is none, 0.
  const float* bias_row(int64_t offset, int64_t seen) const {
    if (lies_as_added(p_.bias)) {
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
      if (Biased) value = value * scale_ + (Vec<float>)_mm512_maskz_loadu_ps(lanes, bias + j);
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
      const Vec<float> factor = exponential(splat((maximum_[i] - offset_[i]) * factor_));
      sum_[i] *= factor;
      for (int64_t d = 0; d < padded_dim_v_; d += kTileSide) {
        store(row(output_, i, d), load(row(output_, i, d)) * factor);
      }
    }
    maximum_[i] = high;
  }

  // Makes the exponentials of keys [chunk, chunk + keys) an operand, not yet divided by their row's sum. The maximum is
  // subtracted before the factor: its own exponential must be exactly 1, or the LSE of a row with one key is not its
  // score.
  template <bool Scaled, class F>
  void exponentials(int64_t count, int64_t chunk, int64_t keys, const F& between_rows) {
    const float factor = factor_;
    for (int64_t i = 0; i < count; ++i) {
      const float offset = offset_[i], *scores = row(scores_, i, chunk);
      BFloat16* target = operands_.exponentials_of(i);
      Vec<float> sums[2] = {};
      const auto take = [&](auto panels) {
        constexpr int N = 2 * panels.value;
        Vec<float> x[N];
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
          x[k] = load(scores + k / 2 * kPanelSize + k % 2 * kTileSide) - offset;
          if (Scaled) x[k] *= factor;
        }
        Operands::exponentials(x);
#pragma GCC unroll 4
        for (int k = 0; k < N; k += 2) {
          sums[0] += x[k];
          sums[1] += x[k + 1];
          Operands::store_exponentials(x[k], x[k + 1], target + k / 2 * Operands::kStep);
        }
        scores += N / 2 * kPanelSize;
        target += N / 2 * Operands::kStep;
      };
      int64_t left = keys / kTilePanel;
      for (; left >= 2; left -= 2) take(Constant<2>{});
      if (left > 0) take(Constant<1>{});
      sum_[i] += sums[0] + sums[1];
      between_rows(i);
    }
  }

  static Vec<float> exponential(Vec<float> x) {
    Vec<float> one[] = {x};
    Operands::exponentials(one);
    return one[0];
  }

  In* output_of(const QueryBlock<float>& block) const {
    return mutable_head_of<In>(p_.output, block.batch, block.head) + block.first * p_.output.row_stride;
  }

  void write(const QueryBlock<float>& block) {
    const int64_t count = block.count;
    float* lse = static_cast<float*>(p_.lse) + (block.batch * p_.num_heads + block.head) * p_.seqlen_q + block.first;
    In* output = output_of(block);
    alignas(64) float sums[kQueries] = {}, inverses[kQueries];
    for (int64_t i = 0; i < count; ++i) sums[i] = _mm512_reduce_add_ps((__m512)sum_[i]);
    rest_.add_exponentials(
        count, [&](Vec<float> scores, int64_t i) { return exponential((scores - load(offset_ + i)) * factor_); }, sums);
    for (int64_t i = 0; i < kQueries; i += kTileSide) {
      // A sum of exactly 0 is a row without keys: its output is 0. A NaN sum compares false and stays NaN.
      const Vec<float> sum = load(sums + i), maximum = load(maximum_ + i);
      store(inverses + i, sum == 0.0f ? Vec<float>{} : 1.0f / sum);
      const Vec<float> offset = maximum == -kInfinity ? Vec<float>{} : maximum * left_;
      store_first(offset + log_of_sum(sum), count - i, lse + i);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (i % 11 == 0) keep_tiles_awake();
      for (int64_t d = 0; d < p_.head_dim_v; d += kTilePanel) {
        Vec<float> low = load(row(output_, i, d)), high = load(row(output_, i, d + kTileSide));
        rest_.add_values(i, d, low, high);
        low *= inverses[i];
        high *= inverses[i];
        In* target = output + i * p_.output.row_stride + d;
        if constexpr (__is_same(In, BFloat16)) {
          store_panel(low, high, p_.head_dim_v - d, target, streamed_);
        } else {
          store_first(low, p_.head_dim_v - d, target, streamed_);
          if (p_.head_dim_v - d > kTileSide) {
            store_first(high, p_.head_dim_v - d - kTileSide, target + kTileSide, streamed_);
          }
        }
      }
    }
  }

  static AttentionParams without_keys(AttentionParams p, int64_t keys) {
    p.seqlen_k -= keys;
    return p;
  }

  static float* row(float* panels, int64_t i, int64_t column) {
    return panels + column / kTilePanel * kPanelSize + i * kTilePanel + column % kTilePanel;
  }

  const AttentionParams& p_;
  AttentionForward<In> plain_;
  RestOfKeys<In> rest_;
  const AttentionParams tiled_;  // without the keys in `rest_`
  const int64_t keys_per_block_, padded_dim_v_;
  const bool streamed_;
  Operands operands_;
  const bool folded_;   // the scale, into the exponent; else it is multiplied in before the bias is added
  const float scale_;   // of scores, before the bias and the maximum
  const float left_;    // of what is left of them without the maximum; of these two one is 1
  const float factor_;  // the same, for Operands::exponential
  float *scores_, *output_, *bias_;
  float maximum_[kQueries] = {}, offset_[kQueries] = {};
  Vec<float> sum_[kQueries];  // over every sixteenth key
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
