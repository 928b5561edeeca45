// What the forward and the backward kernel share: the block of queries, its scores, bias and causal mask.
//
// Everything is computed transposed, one query per vector lane: S^T [keys][queries] = K · Q^T. Then the softmax runs
// down the lanes without a horizontal reduction, keys need no padding, and K and V are broadcast operands. They are
// packed once per head, widened if they have 16 bits: in a packed projection each row of a head lies in a page of its
// own, and rows that far apart fall into the same few sets of the cache.
#pragma once

#include "pack.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
inline const In* head_of(const View4& view, int64_t batch, int64_t head) {
  return static_cast<const In*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}
template <class In>
inline In* mutable_head_of(const View4& view, int64_t batch, int64_t head) {
  return static_cast<In*>(view.data) + batch * view.batch_stride + head * view.head_stride;
}

// Whether forward's output is streamed.
template <class In>
inline bool streams_output(const AttentionParams& p) {
  return is_streamed<In>(p.output, p.head_dim_v,
                         p.batch * p.num_heads * p.seqlen_q * p.head_dim_v * int64_t(sizeof(In)));
}

template <class T>
inline T bias_element(const BiasView& bias, int64_t offset) {
  switch (bias.type) {
    case BiasType::kBool:
      return static_cast<const uint8_t*>(bias.data)[offset] ? T(0) : T(-kInfinity);
    case BiasType::kFloat16:
      return widen(static_cast<const Half*>(bias.data)[offset]);
    case BiasType::kBFloat16:
      return widen(static_cast<const BFloat16*>(bias.data)[offset]);
    case BiasType::kFloat32:
      return T(static_cast<const float*>(bias.data)[offset]);
    default:
      return T(static_cast<const double*>(bias.data)[offset]);
  }
}

// Whether the bias of neighbouring keys lies as it is added.
inline bool lies_as_added(const BiasView& bias) { return bias.type == BiasType::kFloat32 && bias.key_stride == 1; }

// One row of the bias, keys [begin, begin + count), as additive values.
template <class T>
void load_bias_row(const BiasView& bias, int64_t offset, int64_t count, T* target) {
  if (bias.key_stride == 1) {
    if constexpr (__is_same(T, float)) {
      switch (bias.type) {
        case BiasType::kFloat16:
          return load_row(static_cast<const Half*>(bias.data) + offset, count, 1.0f, target);
        case BiasType::kBFloat16:
          return load_row(static_cast<const BFloat16*>(bias.data) + offset, count, 1.0f, target);
        case BiasType::kFloat32:
          return load_row(static_cast<const float*>(bias.data) + offset, count, 1.0f, target);
        case BiasType::kBool: {
          const uint8_t* source = static_cast<const uint8_t*>(bias.data) + offset;
          for (int64_t j = 0; j < count; ++j) target[j] = source[j] ? 0.0f : -kInfinity;
          return;
        }
        default:
          break;
      }
    }
  }
  for (int64_t j = 0; j < count; ++j) target[j] = bias_element<T>(bias, offset + j * bias.key_stride);
}

// Where one block of queries stands, and the scratch for its bias.
template <class T>
struct QueryBlock {
  int64_t batch;
  int64_t head;
  int64_t first;  // index of the query in lane 0
  int64_t count;  // queries in this block, at most kPanel
  int64_t vectors() const { return ceil_div(count, kLanes<T>); }
};

template <class T>
inline int64_t bias_offset(const BiasView& bias, const QueryBlock<T>& block, int64_t first_key) {
  return block.batch * bias.batch_stride + block.head * bias.head_stride + block.first * bias.query_stride +
         first_key * bias.key_stride;
}

// Adds the bias of keys [first_key, first_key + keys) to the scores [keys][kPanel]. `rows` and `lanes` are scratch of
// kPanel · round_up(keys, kLanes) elements each.
template <class T>
void add_bias(const BiasView& bias, const QueryBlock<T>& block, int64_t first_key, int64_t keys, T* scores, T* rows,
              T* lanes) {
  constexpr int L = kLanes<T>;
  const int64_t base = bias_offset(bias, block, first_key);
  if (bias.query_stride == 0) {
    load_bias_row(bias, base, keys, rows);
    for (int64_t j = 0; j < keys; ++j) {
      T* row = scores + j * kPanel<T>;
      for (int v = 0; v < block.vectors(); ++v) store(row + v * L, load(row + v * L) + rows[j]);
    }
    return;
  }
  const int64_t padded = round_up(keys, L);
  for (int64_t i = 0; i < block.vectors() * L; ++i) {
    T* row = rows + i * padded;
    if (i < block.count) {
      load_bias_row(bias, base + i * bias.query_stride, keys, row);
    } else {
      for (int64_t j = 0; j < keys; ++j) row[j] = 0;
    }
    for (int64_t j = keys; j < padded; ++j) row[j] = 0;
  }
  transpose(rows, padded, int64_t(block.vectors()) * L, padded, lanes, kPanel<T>);
  for (int64_t j = 0; j < keys; ++j) {
    T* row = scores + j * kPanel<T>;
    for (int v = 0; v < block.vectors(); ++v) {
      store(row + v * L, load(row + v * L) + load(lanes + j * kPanel<T> + v * L));
    }
  }
}

// Scores [keys][kPanel] · scale + a bias with keys side by side, transposed square by square in registers; `source`
// points to the block's first query and key.
template <class In, class T>
void add_bias_in_squares(const In* source, int64_t query_stride, int64_t queries, T scale, int64_t keys, T* scores) {
  constexpr int L = kLanes<T>;
  alignas(64) T square[L * L];
  for (int64_t query = 0; query < queries; query += L) {
    for (int64_t key = 0; key < keys; key += L) {
      const auto row = [&](int64_t i) { return source + (query + i) * query_stride + key; };
      const int64_t columns = min64(keys - key, L);
      if (queries - query >= L && columns == L) {
        load_square<true, In>(row, L, L, Unscaled(), square, L);
      } else {
        load_square<false, In>(row, queries - query, columns, Unscaled(), square, L);
      }
      for (int64_t j = 0; j < columns; ++j) {
        T* score = scores + (key + j) * kPanel<T> + query;
        store(score, load(score) * scale + load(square + j * L));
      }
    }
  }
}

// The same for a bias of a type that vectors are loaded from, with a row for each query; false for any other.
template <class T>
bool add_bias_as_it_lies(const BiasView& bias, const QueryBlock<T>& block, T scale, int64_t first_key, int64_t keys,
                         T* scores) {
  if (bias.key_stride != 1 || bias.query_stride == 0) return false;
  const auto add = [&](auto tag) {
    using In = typename decltype(tag)::type;
    const In* source = static_cast<const In*>(bias.data) + bias_offset(bias, block, first_key);
    add_bias_in_squares<In, T>(source, bias.query_stride, block.count, scale, keys, scores);
    return true;
  };
  if constexpr (__is_same(T, float)) {
    switch (bias.type) {
      case BiasType::kFloat16:
        return add(Tag<Half>{});
      case BiasType::kBFloat16:
        return add(Tag<BFloat16>{});
      case BiasType::kFloat32:
        return add(Tag<float>{});
      default:
        return false;
    }
  } else {
    return bias.type == BiasType::kFloat64 && add(Tag<T>{});
  }
}

// Sets the scores of keys after their query to -inf.
template <class T>
void mask_causal(const QueryBlock<T>& block, int64_t first_key, int64_t keys, T* scores) {
  constexpr int L = kLanes<T>;
  Vec<T> iota;
  for (int lane = 0; lane < L; ++lane) iota[lane] = T(lane);
  for (int64_t j = max64(0, block.first + 1 - first_key); j < keys; ++j) {
    T* row = scores + j * kPanel<T>;
    for (int v = 0; v < block.vectors(); ++v) {
      Vec<T> query = iota + T(block.first + v * L - first_key - j);  // query index minus key index
      store(row + v * L, query < T(0) ? splat(T(-kInfinity)) : load(row + v * L));
    }
  }
}

// Keys that a sum over a row takes in before it is added to the row's total. In a sharp row one key outweighs the
// others, and every later addition to it would be rounded at its size; hundreds of those are what the tolerance does
// not allow.
constexpr int64_t kSumKeys = 32;

// Calls f(begin, end) for each run of kSumKeys keys.
template <class F>
inline void for_each_run(int64_t keys, const F& f) {
  for (int64_t begin = 0; begin < keys; begin += kSumKeys) f(begin, min64(begin + kSumKeys, keys));
}

// Calls f(j, odd, exp(value(j))) for each j in [begin, end), `odd` as in for_each_pair.
template <class T, class Value, class F>
inline void for_each_exponential(int64_t begin, int64_t end, const Value& value, const F& f) {
  constexpr int N = kVectorBytes == 64 ? 4 : 2;  // as the registers allow
  for (; begin + N <= end; begin += N) {
    Vec<T> x[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) x[i] = value(begin + i);
    exp(x);
#pragma GCC unroll 2
    for (int i = 0; i < N; i += 2) {
      f(begin + i, Constant<0>{}, x[i]);
      f(begin + i + 1, Constant<1>{}, x[i + 1]);
    }
  }
  for_each_pair(begin, end, [&](int64_t j, auto odd) { f(j, odd, exp(value(j))); });
}

// The sum of a row over its runs, in four parts: so many additions of a quarter of the size. In one, 32 roundings at
// the size of the whole are an error that every gradient of the row has in common.
template <class T>
class RowSum {
 public:
  void add(Vec<T> run) { parts_[next_++ % 4] += run; }
  void scale(Vec<T> factor) {
    for (Vec<T>& part : parts_) part *= factor;
  }
  Vec<T> total() const { return (parts_[0] + parts_[1]) + (parts_[2] + parts_[3]); }

 private:
  Vec<T> parts_[4] = {};
  int64_t next_ = 0;
};

// The largest score of each lane over the keys, NaN ignored; -inf without keys.
template <class T>
Vec<T> maximum_of_lanes(const T* scores, int64_t keys) {
  Vec<T> high[2] = {splat(T(-kInfinity)), splat(T(-kInfinity))};
  for_each_pair(0, keys,
                [&](int64_t j, auto odd) { high[odd.value] = maximum(load(scores + j * kPanel<T>), high[odd.value]); });
  return maximum(high[0], high[1]);
}

// The softmax scale, in two factors: a power of two (the scale of head dims 16, 64 and 256) is multiplied into the
// queries, exactly; any other would round each of them, so it is left for the scores.
template <class T>
struct Scale {
  explicit Scale(double scale) {
    int exponent;
    const bool exact = ::frexp(scale, &exponent) == 0.5;
    queries = exact ? T(scale) : T(1);
    scores = exact ? T(1) : T(scale);
  }
  T queries;
  T scores;
};

// Scales the products K · Q^T of keys [first_key, first_key + keys), and adds bias and causal mask.
template <class T>
void finish_scores(const AttentionParams& p, const QueryBlock<T>& block, T scale, int64_t first_key, int64_t keys,
                   T* scores, T* bias_rows, T* bias_lanes) {
  if (p.bias.type == BiasType::kNone || !add_bias_as_it_lies(p.bias, block, scale, first_key, keys, scores)) {
    if (scale != T(1)) {
      for (int64_t i = 0; i < keys * kPanel<T>; i += kLanes<T>) store(scores + i, load(scores + i) * scale);
    }
    if (p.bias.type != BiasType::kNone) add_bias(p.bias, block, first_key, keys, scores, bias_rows, bias_lanes);
  }
  if (p.is_causal) mask_causal(block, first_key, keys, scores);
}

// S^T = K · Q^T · scale (+ bias, causal mask) for the first `keys` of the keys in `key`, of which the first is
// `first_key`. Keys beyond them in the same tile may get scores too.
template <class T>
void compute_scores(const AttentionParams& p, const QueryBlock<T>& block, const PackedMatrix<T>& key,
                    const T* query_lanes, T scale, int64_t first_key, int64_t keys, T* scores, T* bias_rows,
                    T* bias_lanes) {
  packed_product<T, false>(key, keys, 0, p.head_dim, block.vectors(), query_lanes, scores);
  finish_scores(p, block, scale, first_key, keys, scores, bias_rows, bias_lanes);
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
