// Products of float matrices in AMX tiles, which multiply bfloat16: C [rows][32] = A [rows][k] · B [k][32].
//
// A float of 24 significant bits is the sum of three bfloat16 of 8, exactly: the nearest one, the one nearest to what
// it leaves, and the rest. Of the nine products of parts, the six largest are computed; the others are below 2^-26 of
// the product. So a float product costs six of bfloat16, which tiles multiply at sixteen times the rate of a float FMA
// (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision
// Computations", 2019). A half of 11 bits is the sum of two, and takes all four.
//
// Sums are in float: sixteen terms in a register, then one addition to C, so chains are shorter than an FMA's.
// What tiles do differently from an FMA, operands are asked for (`Range`): subnormal parts count as zero, and a number
// that is infinite or NaN is not the sum of its parts.
#pragma once

#include "pack.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

constexpr int64_t kTileElements = kTileSide * kTileDepth;

// Parts that hold an element exactly.
template <class In>
constexpr int kParts = __is_same(In, float)  ? 3
                       : __is_same(In, Half) ? 2
                                             : 1;

// Parts of what is computed from such elements. Of a float all; of the others two, which is 2^-16 of a number and far
// below a rounding of the result.
template <class In>
constexpr int kComputedParts = kParts<In> == 3 ? 3 : 2;

// Whether attention is faster in parts than with FMAs: few keys are packed for too few products, and padded to whole
// tiles. Measured at 16 to 128 keys and head dims 32 and 64 (benchmarks/NOTES.md).
template <class In>
bool split_pays(const AttentionParams& p, double work = 1) {
  constexpr int64_t kLeast = kParts<In> == 3 ? 64 * 64 : kParts<In> == 2 ? 64 * 32 : 40 * 32;
  return p.seqlen_q >= kTileDepth && double(p.seqlen_k * min64(p.head_dim, 64)) >= kLeast * work;
}

// The largest magnitude of what was packed, asked once per operand.
class Range {
 public:
  // `words` are first parts: what they lose of a magnitude does not matter here.
  void add(__m512i words) { largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(words, _mm512_set1_epi16(0x7fff))); }
  void add(Vec<float> value) { add(_mm512_and_si512((__m512i)value, _mm512_set1_epi32(int(0xffff0000)))); }
  // Whether the parts and the products of all of it, with operands that pass as well, are far from overflow and far
  // enough above the subnormals: 2^-30 to 2^30, or zero. Beside a largest element of 2^-30, what an element loses by a
  // part below 2^-126 is nothing.
  bool fits() const {
    alignas(64) uint16_t words[32];
    _mm512_store_si512(words, largest_);
    uint16_t largest = 0;
    for (const uint16_t word : words) largest = word > largest ? word : largest;
    return largest == 0 || (largest >= (127 - 30) << 7 && largest <= (127 + 30) << 7);
  }

 private:
  __m512i largest_ = _mm512_setzero_si512();
};

// The parts of two vectors, side by side in the pairs of a tile's row: `low` in the even places, `high` in the odd.
// target points to the row in the first part's tile; the other parts' tiles follow. Returns the first part.
//
// Rounded, what a part leaves has either sign, and so has what is lost with the products that are left out; cut off, it
// has the sign of the number. It is enough that one of the two operands of a product is rounded.
template <int Parts, bool Rounded>
[[gnu::always_inline]] inline __m512i split_pair(__m512 low, __m512 high, BFloat16* target) {
  const __m512i half = _mm512_set1_epi32(0x8000), kept = _mm512_set1_epi32(int(0xffff0000));
  // Of each pair of words the upper one, twice.
  const __m512i upper_words = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
  __m512i first{};
#pragma GCC unroll 3
  for (int part = 0; part < Parts; ++part) {
    // Nothing is left after the last part of an element, and where there is, cutting it off is near enough; rounding
    // could carry a NaN's bits to zero.
    const bool last = part + 1 == Parts, cut = last || !Rounded;
    const __m512i lows = cut ? (__m512i)low : _mm512_add_epi32((__m512i)low, half);
    const __m512i highs = cut ? (__m512i)high : _mm512_add_epi32((__m512i)high, half);
    const __m512i words = _mm512_mask_shuffle_epi8(highs, 0x3333333333333333, lows, upper_words);
    _mm512_storeu_si512(target + part * kTileElements, words);
    if (part == 0) first = words;
    if (!last) {
      low = _mm512_sub_ps(low, (__m512)_mm512_and_si512(lows, kept));
      high = _mm512_sub_ps(high, (__m512)_mm512_and_si512(highs, kept));
    }
  }
  return first;
}

// An operand: for each 16 lanes (rows of A, columns of B) and each 32 of k the tiles of its parts. Pair i of a step of
// k is (i, i + 16) in both: neighbours in memory are neighbours in a register, and need no shuffle.
template <int Parts>
struct SplitMatrix {
  BFloat16* data;
  int64_t steps;  // of k

  static constexpr int64_t kStep = Parts * kTileElements;
  // The same operand from a lane and an element of k on, both multiples of a tile's.
  SplitMatrix from(int64_t lane, int64_t k) const { return {tile(lane, k), steps}; }
  static SplitMatrix take(Arena& arena, int64_t lanes, int64_t k) {
    const int64_t steps = ceil_div(k, kTileDepth);
    return {arena.take<BFloat16>(ceil_div(lanes, kTileSide) * steps * kStep), steps};
  }
  BFloat16* tile(int64_t lane, int64_t k) const { return data + (lane / kTileSide * steps + k / kTileDepth) * kStep; }
};

// Packs an operand A [lanes][k], times `factor`; in between it keeps tiles awake if Awake.
template <bool Awake = false, int Parts, class In>
inline void split_a(const In* source, int64_t stride, int64_t lanes, int64_t k, float factor,
                    const SplitMatrix<Parts>& target, Range& range) {
  for (int64_t lane = 0; lane < round_up(lanes, kTileSide); ++lane) {
    fetch_next(lane, source, stride, lanes, k);
    if (Awake && lane % 11 == 0) keep_tiles_awake();
    for (int64_t first = 0; first < k; first += kTileDepth) {
      const In* corner = source + lane * stride + first;
      const int64_t count = lane < lanes ? k - first : 0;
      const Vec<float> low = load_first(corner, count) * factor;
      const Vec<float> high = load_first(corner + kTileSide, count - kTileSide) * factor;
      range.add(
          split_pair<Parts, true>((__m512)low, (__m512)high, target.tile(lane, first) + lane % kTileSide * kTileDepth));
    }
  }
}

// Packs an operand B [k][lanes], times `factor`; Awake as above.
template <bool Awake = false, int Parts, class In>
inline void split_b(const In* source, int64_t stride, int64_t lanes, int64_t k, float factor,
                    const SplitMatrix<Parts>& target, Range& range) {
  for (int64_t first = 0; first < k; first += kTileDepth) {
    fetch_next(first, source, stride, k, lanes);
    for (int64_t i = 0; i < kTileSide; ++i) {
      if (Awake && i % 5 == 0) keep_tiles_awake();
      const In* row = source + (first + i) * stride;
      for (int64_t lane = 0; lane < lanes; lane += kTileSide) {
        const Vec<float> low = load_first(row + lane, first + i < k ? lanes - lane : 0) * factor;
        const Vec<float> high =
            load_first(row + kTileSide * stride + lane, first + i + kTileSide < k ? lanes - lane : 0) * factor;
        range.add(split_pair<Parts, true>((__m512)low, (__m512)high, target.tile(lane, first) + i * kTileDepth));
      }
    }
  }
}

constexpr int64_t kAhead = 3 * kTileDepth;  // of k, to the elements asked for in advance

template <class In>
[[gnu::always_inline]] inline Vec<float> load_all(const In* source) {
  return load_first(source, kTileSide);
}

template <int Parts>
[[gnu::always_inline]] inline void split_loaded(Vec<float> low, Vec<float> high, BFloat16* row, Range& range) {
  range.add(split_pair<Parts, true>((__m512)low, (__m512)high, row));
}

// Packs 16 lanes of an operand A, of which the first `count` count: at(lane, k) points to their elements from k on.
template <int Parts, class At>
inline void split_lanes(int64_t count, int64_t k, const At& at, BFloat16* target, Range& range) {
  for (int64_t first = 0; first < k; first += kTileDepth) {
    for (int64_t i = 0; i < count; ++i) {
      BFloat16* row = target + i * kTileDepth;
      if (k - first >= kTileDepth) {
        // Lanes lie apart, and there are too many for the processor to see where each goes on.
        const int64_t next = min64(first + kAhead, k - kTileDepth);
        _mm_prefetch(at(i, next), _MM_HINT_T0);
        _mm_prefetch(at(i, next + kTileSide), _MM_HINT_T0);
        split_loaded<Parts>(load_all(at(i, first)), load_all(at(i, first + kTileSide)), row, range);
      } else {
        const Vec<float> low = load_first(at(i, first), k - first);
        const bool more = k - first > kTileSide;
        split_loaded<Parts>(low, more ? load_first(at(i, first + kTileSide), k - first - kTileSide) : Vec<float>{}, row,
                            range);
      }
    }
    target += SplitMatrix<Parts>::kStep;
  }
}

// Packs a step of k of an operand B, of which the first `count` rows count: at(k, lane) points to their elements from
// that lane on.
template <int Parts, class At>
inline void split_depth(int64_t count, int64_t lanes, const At& at, BFloat16* target, int64_t target_stride,
                        Range& range) {
  for (int64_t lane = 0; lane < lanes; lane += kTileSide) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      BFloat16* row = target + i * kTileDepth;
      if (count == kTileDepth && lanes - lane >= kTileSide) {
        split_loaded<Parts>(load_all(at(i, lane)), load_all(at(i + kTileSide, lane)), row, range);
      } else {
        const Vec<float> low = i < count ? load_first(at(i, lane), lanes - lane) : Vec<float>{};
        const bool more = i + kTileSide < count;
        split_loaded<Parts>(low, more ? load_first(at(i + kTileSide, lane), lanes - lane) : Vec<float>{}, row, range);
      }
    }
    target += target_stride;
  }
}

// Transposes 16 rows of 16 elements, times `factor`; zero beyond the given rows and columns.
template <class In>
[[gnu::always_inline]] inline void load_square_transposed(const In* source, int64_t stride, int64_t rows,
                                                          int64_t columns, float factor, float* target) {
  if (rows >= 16 && columns >= 16) {
    load_square<true, In>([&](int64_t i) { return source + i * stride; }, 16, 16, factor, target, 16);
  } else {
    for (int i = 0; i < 256; i += 16) store(target + i, Vec<float>{});
    load_square<false, In>([&](int64_t i) { return source + i * stride; }, rows, columns, factor, target, 16);
  }
}

// Packs sixteen lanes and 32 of k from two squares of the source, those of the pairs' first and second elements.
template <int Parts>
inline void split_squares(const float* low, const float* high, BFloat16* target, Range& range) {
  for (int i = 0; i < kTileSide; ++i) {
    range.add(
        split_pair<Parts, true>((__m512)load(low + 16 * i), (__m512)load(high + 16 * i), target + i * kTileDepth));
  }
}

// Packs an operand B from its transpose [lanes][k], times `factor`; Awake as above.
template <bool Awake = false, int Parts, class In>
inline void split_b_transposed(const In* source, int64_t stride, int64_t lanes, int64_t k, float factor,
                               const SplitMatrix<Parts>& target, Range& range) {
  alignas(64) float low[256], high[256];
  for (int64_t lane = 0; lane < lanes; lane += kTileSide) {
    fetch_next(lane, source, stride, lanes, k);
    for (int64_t first = 0; first < k; first += kTileDepth) {
      if (Awake) keep_tiles_awake();
      const In* corner = source + lane * stride + first;
      load_square_transposed(corner, stride, lanes - lane, k - first, factor, low);
      load_square_transposed(corner + kTileSide, stride, lanes - lane, k - first - kTileSide, factor, high);
      split_squares<Parts>(low, high, target.tile(lane, first), range);
    }
  }
}

// Packs an operand A from its transpose [k][lanes].
template <int Parts, class In>
inline void split_a_transposed(const In* source, int64_t stride, int64_t lanes, int64_t k,
                               const SplitMatrix<Parts>& target, Range& range) {
  alignas(64) float low[256], high[256];
  for (int64_t first = 0; first < k; first += kTileDepth) {
    fetch_next(first, source, stride, k, lanes);
    for (int64_t lane = 0; lane < lanes; lane += kTileSide) {
      const In* corner = source + first * stride + lane;
      load_square_transposed(corner, stride, k - first, lanes - lane, 1.0f, low);
      load_square_transposed(corner + kTileSide * stride, stride, k - first - kTileSide, lanes - lane, 1.0f, high);
      split_squares<Parts>(low, high, target.tile(lane, first), range);
    }
  }
}

// Products of one part of A with one part of B, added to R × C tiles of C. The operands that the last call left in
// registers 4 to 7 are loaded again only where they change.
template <int R, int C, bool LoadA, bool LoadB>
[[gnu::always_inline]] inline void multiply_parts(const BFloat16* a, int64_t a_next, const BFloat16* b,
                                                  int64_t b_next) {
  if constexpr (LoadA) _tile_loadd(4, a, 64);
  if constexpr (LoadB) _tile_loadd(6, b, 64);
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (LoadA && R == 2) _tile_loadd(5, a + a_next, 64);
  if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (LoadB && C == 2) _tile_loadd(7, b + b_next, 64);
  if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
}

// R × C tiles of C over `steps` steps of k; `add` continues the sums that C holds. The small products of a step come
// first: in the first step they are rounded at their own size.
template <int PartsA, int PartsB, int R, int C>
inline void split_block(const SplitMatrix<PartsA>& a, const SplitMatrix<PartsB>& b, int64_t steps, bool add, float* c,
                        int64_t c_stride) {
  constexpr int64_t E = kTileElements;
  const int64_t a_next = a.steps * a.kStep, b_next = b.steps * b.kStep;
  if (add) {
    load_tiles<R, C>(c, c_stride);
  } else {
    zero_tiles<R, C>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    const BFloat16 *left = a.data + step * a.kStep, *right = b.data + step * b.kStep;
    if constexpr (PartsA == 3 && PartsB == 3) {
      multiply_parts<R, C, true, true>(left, a_next, right + 2 * E, b_next);
      multiply_parts<R, C, false, true>(left, a_next, right + E, b_next);
      multiply_parts<R, C, true, false>(left + E, a_next, right, b_next);
      multiply_parts<R, C, false, true>(left, a_next, right, b_next);
      multiply_parts<R, C, true, false>(left + 2 * E, a_next, right, b_next);
      multiply_parts<R, C, true, false>(left, a_next, right, b_next);
    } else {
      static_assert(PartsA <= 2 && PartsB <= 2);
      if constexpr (PartsB == 2) multiply_parts<R, C, true, true>(left, a_next, right + E, b_next);
      if constexpr (PartsA == 2 && PartsB == 2) multiply_parts<R, C, true, false>(left + E, a_next, right, b_next);
      if constexpr (PartsA == 2) multiply_parts<R, C, PartsB == 1, true>(left + E, a_next, right, b_next);
      multiply_parts<R, C, true, PartsA == 1>(left, a_next, right, b_next);
    }
  }
  store_tiles<R, C>(c, c_stride);
}

// C [rows][lanes] (+)= A [rows][k] · B [k][lanes] over the first `steps` steps of k; lanes at most 32. Whole tiles of C
// are written.
template <int PartsA, int PartsB>
inline void split_product(SplitMatrix<PartsA> a, const SplitMatrix<PartsB>& b, int64_t rows, int64_t lanes,
                          int64_t steps, bool add, float* c, int64_t c_stride) {
  // The compiler's tile loads do not say that they read memory; what was stored for them must be there.
  asm volatile("" ::: "memory");
  for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
    if (rows - row > kTileSide) {
      lanes > kTileSide ? split_block<PartsA, PartsB, 2, 2>(a, b, steps, add, c, c_stride)
                        : split_block<PartsA, PartsB, 2, 1>(a, b, steps, add, c, c_stride);
    } else {
      lanes > kTileSide ? split_block<PartsA, PartsB, 1, 2>(a, b, steps, add, c, c_stride)
                        : split_block<PartsA, PartsB, 1, 1>(a, b, steps, add, c, c_stride);
    }
    a.data += 2 * a.steps * a.kStep;
    c += 2 * kTileSide * c_stride;
  }
  asm volatile("" ::: "memory");
}

// Steps of k per pass over C, when C is more than a block: two operands of 24 KiB.
constexpr int64_t kPassSteps = 4;

// C [rows][32] (+)= A · B, in passes over k that leave the panel of B in the first-level cache; lanes at most 32. A
// pass sums from zero and is added to C whole: continued sums would round every product, the small ones too, at the
// size of C.
template <int Parts>
inline void split_panel(const SplitMatrix<Parts>& a, const SplitMatrix<Parts>& b, int64_t rows, int64_t lanes,
                        int64_t all_steps, bool accumulate, float* c) {
  const int64_t passes = ceil_div(all_steps, kPassSteps), longest = ceil_div(all_steps, passes);
  alignas(64) float spare[2][2 * kTileSide * kTilePanel];
  // Added one block later: the processor cannot read what it has just stored as tiles before it is in the cache.
  float *waiting = nullptr, *sum = spare[0], *last_sum = spare[1];
  int64_t waiting_rows = 0;
  const auto add_waiting = [&] {
    for (int64_t i = 0; waiting != nullptr && i < waiting_rows * kTilePanel; i += kTileSide) {
      store(waiting + i, load(waiting + i) + load(last_sum + i));
    }
  };
  for (int64_t step = 0; step < all_steps; step += longest) {
    const int64_t steps = min64(longest, all_steps - step);
    const bool add = accumulate || step > 0;
    for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
      float* const target = c + row * kTilePanel;
      const int64_t here = min64(2 * kTileSide, rows - row);
      split_product(a.from(row, step * kTileDepth), b.from(0, step * kTileDepth), here, lanes, steps, false,
                    add ? sum : target, kTilePanel);
      if (!add) continue;
      add_waiting();
      waiting = target;
      waiting_rows = round_up(here, kTileSide);
      float* const next = last_sum;
      last_sum = sum;
      sum = next;
    }
  }
  add_waiting();
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
