// Matrix products in AMX tiles: C [rows][columns] float = A [rows][k] bfloat16 · B [k][columns] bfloat16.
//
// A is row-major. B is packed: panels of 32 columns, in each one block of two tiles per 32 rows, in each tile the
// pairs of rows (2i, 2i + 1) side by side, as `tdpbf16ps` wants them (Intel SDM, volume 2, TDPBF16PS). Sums are in
// float, rounded to nearest even pair by pair; subnormal inputs and results count as zero.
#pragma once

#include "pack.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

constexpr int64_t kTileSide = 16;              // rows of a tile, and float columns of its 64 bytes
constexpr int64_t kTileDepth = 32;             // bfloat16 elements of a row of A's tile
constexpr int64_t kTilePanel = 2 * kTileSide;  // columns of a panel of B: two accumulators side by side
// Steps of k per pass over C. 8 · 32 rows of two panels, A's and B's, are 32 KiB and stay in the first-level cache;
// from the second level two loads per product would take longer than the products.
constexpr int64_t kTileSteps = 8;

// Configures this thread's tiles for its lifetime. Left configured they would make every context switch of the thread
// save 8 KiB, and keep the core from its deeper sleep states.
class TileSession {
 public:
  TileSession() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof(Configuration) == 64, "as ldtilecfg reads it");
    for (int tile = 0; tile < 8; ++tile) {
      configuration.bytes_per_row[tile] = 64;
      configuration.rows[tile] = kTileSide;
    }
    asm volatile("" ::"m"(configuration));
    _tile_loadconfig(&configuration);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Keeps the unit that multiplies tiles awake, by a product that nobody reads: after about a thousand cycles without one
// it goes to sleep, and the next product waits for some 700 (290 ns, measured with products that lie 0.37 and 0.42 µs
// apart; tile loads do not count). Where there was none for milliseconds the first waits are ten times as long, and get
// shorter over the next millisecond, which is all that a call for one image takes. Overwrites tile 0.
[[gnu::always_inline]] inline void keep_tiles_awake() { _tile_dpbf16ps(0, 4, 6); }

// Elements of packed B: `k` is a multiple of kTileDepth.
inline int64_t packed_size(int64_t columns, int64_t k) { return round_up(columns, kTilePanel) * k; }

// Row stride, in elements, for A: whole lines, and an odd number of them, so that the rows of a tile lie in different
// sets of the cache.
inline int64_t tile_stride(int64_t k) { return (ceil_div(k, kTileDepth) | 1) * kTileDepth; }

// The transpose of 16 × 16 pairs: target[i][j] = pair i of row j. By loading quarters of four rows into one vector,
// half of the shuffles, of which the processor does one per cycle, become loads.
inline void transpose_pairs(const BFloat16* source, int64_t stride, float* target, int64_t target_stride) {
  const auto quarter = [&](int64_t row, int group) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(source + row * stride) + 4 * group);
  };
#pragma GCC unroll 4
  for (int group = 0; group < 4; ++group) {
    __m512 rows[4];  // in lane l of rows[i]: pairs 4 · group … of row 4 l + i
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castps128_ps512(quarter(i, group));
      rows[i] = _mm512_insertf32x4(rows[i], quarter(4 + i, group), 1);
      rows[i] = _mm512_insertf32x4(rows[i], quarter(8 + i, group), 2);
      rows[i] = _mm512_insertf32x4(rows[i], quarter(12 + i, group), 3);
    }
    const __m512d low[2] = {(__m512d)_mm512_unpacklo_ps(rows[0], rows[1]),
                            (__m512d)_mm512_unpacklo_ps(rows[2], rows[3])};
    const __m512d high[2] = {(__m512d)_mm512_unpackhi_ps(rows[0], rows[1]),
                             (__m512d)_mm512_unpackhi_ps(rows[2], rows[3])};
    store(target + 4 * group * target_stride, (Vec<float>)_mm512_unpacklo_pd(low[0], low[1]));
    store(target + (4 * group + 1) * target_stride, (Vec<float>)_mm512_unpackhi_pd(low[0], low[1]));
    store(target + (4 * group + 2) * target_stride, (Vec<float>)_mm512_unpacklo_pd(high[0], high[1]));
    store(target + (4 * group + 3) * target_stride, (Vec<float>)_mm512_unpackhi_pd(high[0], high[1]));
  }
}

// Packs B from its transpose, source [columns][k] with rows `stride` apart; zero beyond the columns, and beyond k up to
// a multiple of kTileDepth.
inline void pack_transposed(const BFloat16* source, int64_t stride, int64_t columns, int64_t k, BFloat16* packed) {
  const int64_t steps = ceil_div(k, kTileDepth);
  for (int64_t column = 0; column < round_up(columns, kTilePanel); column += kTileSide) {
    fetch_next(column, source, stride, columns, k);
    float* tile = reinterpret_cast<float*>(packed + column / kTilePanel * kTilePanel * steps * kTileDepth +
                                           column % kTilePanel * kTileDepth);
    for (int64_t step = 0; step < steps; ++step) {
      const BFloat16* corner = source + column * stride + step * kTileDepth;
      if (column + kTileSide <= columns && (step + 1) * kTileDepth <= k) {
        transpose_pairs(corner, stride, tile, kTileSide);
      } else {
        alignas(64) BFloat16 rows[kTileSide * kTileDepth];
        for (int64_t i = 0; i < kTileSide; ++i) {
          const __mmask32 mask = column + i < columns ? first_lanes(k - step * kTileDepth) : 0;
          _mm512_store_si512(rows + i * kTileDepth, _mm512_maskz_loadu_epi16(mask, corner + i * stride));
        }
        transpose_pairs(rows, kTileDepth, tile, kTileSide);
      }
      tile += 2 * kTileSide * kTileSide;
    }
  }
}

// The pairs of two rows of 16 elements side by side; rows that are null count as zero.
inline __m512i interleave(const BFloat16* low, const BFloat16* high, __mmask16 mask) {
  const __m256i lows = _mm256_maskz_loadu_epi16(low == nullptr ? 0 : mask, low);
  const __m256i highs = _mm256_maskz_loadu_epi16(high == nullptr ? 0 : mask, high);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(lows), _mm512_slli_epi32(_mm512_cvtepu16_epi32(highs), 16));
}

// Packs B from itself: rows[i] points to row i of `columns` elements. Zero beyond the columns, and beyond k up to a
// multiple of kTileDepth.
inline void pack_rows(const BFloat16* const* rows, int64_t k, int64_t columns, BFloat16* packed) {
  const int64_t steps = ceil_div(k, kTileDepth);
  for (int64_t pair = 0; pair < steps * kTileSide; ++pair) {
    const BFloat16* low = 2 * pair < k ? rows[2 * pair] : nullptr;
    const BFloat16* high = 2 * pair + 1 < k ? rows[2 * pair + 1] : nullptr;
    BFloat16* target = packed + pair / kTileSide * 2 * kTileSide * kTileDepth + pair % kTileSide * kTileDepth;
    for (int64_t column = 0; column < round_up(columns, kTilePanel); column += kTileSide) {
      const int64_t panel = column / kTilePanel * kTilePanel * steps * kTileDepth;
      _mm512_storeu_si512(target + panel + column % kTilePanel * kTileSide * 2,
                          interleave(low == nullptr ? low : low + column, high == nullptr ? high : high + column,
                                     __mmask16(first_lanes(columns - column))));
    }
  }
}

// Copies a row of an operand A, zero up to a multiple of kTileDepth.
inline void copy_padded(const BFloat16* source, int64_t count, BFloat16* target) {
  for (int64_t i = 0; i < count; i += kTileDepth) {
    _mm512_storeu_si512(target + i, _mm512_maskz_loadu_epi16(first_lanes(count - i), source + i));
  }
}

// Writes the transpose [columns][k] as an operand A, zero beyond the columns, and beyond k up to a multiple of
// kTileDepth; rows[i] points to row i of `columns` elements.
inline void transpose_rows(const BFloat16* const* rows, int64_t k, int64_t columns, BFloat16* target, int64_t stride) {
  for (int64_t first = 0; first < k; first += kTileDepth) {
    for (int64_t column = 0; column < columns; column += kTileSide) {
      const __mmask16 mask = __mmask16(first_lanes(columns - column));
      alignas(64) BFloat16 pairs[kTileSide * kTileDepth];
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t row = first + 2 * i;
        _mm512_store_si512(pairs + i * kTileDepth, interleave(row < k ? rows[row] + column : nullptr,
                                                              row + 1 < k ? rows[row + 1] + column : nullptr, mask));
      }
      transpose_pairs(pairs, kTileDepth, reinterpret_cast<float*>(target + column * stride + first), stride / 2);
    }
  }
}

struct TileOperands {
  const BFloat16* a;
  int64_t a_stride;
  const BFloat16* b;
  float* c;
  int64_t c_stride;
  int64_t c_panel = kTilePanel;  // from one panel of columns of C to the next
  int64_t b_depth = 0;           // k of the packed B, where the product takes only a part of it
};

// Tiles 0 and 1 are the first row of R × C tiles of C, 2 and 3 the second; rows of C are c_stride floats apart.
template <int R, int C>
[[gnu::always_inline]] inline void zero_tiles() {
  _tile_zero(0);
  if constexpr (C == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && C == 2) _tile_zero(3);
}
template <int R, int C>
[[gnu::always_inline]] inline void load_tiles(const float* c, int64_t c_stride) {
  _tile_loadd(0, c, c_stride * 4);
  if constexpr (C == 2) _tile_loadd(1, c + kTileSide, c_stride * 4);
  if constexpr (R == 2) _tile_loadd(2, c + kTileSide * c_stride, c_stride * 4);
  if constexpr (R == 2 && C == 2) _tile_loadd(3, c + kTileSide * c_stride + kTileSide, c_stride * 4);
}
template <int R, int C>
[[gnu::always_inline]] inline void store_tiles(float* c, int64_t c_stride) {
  _tile_stored(0, c, c_stride * 4);
  if constexpr (C == 2) _tile_stored(1, c + kTileSide, c_stride * 4);
  if constexpr (R == 2) _tile_stored(2, c + kTileSide * c_stride, c_stride * 4);
  if constexpr (R == 2 && C == 2) _tile_stored(3, c + kTileSide * c_stride + kTileSide, c_stride * 4);
}

// R × C tiles of C over `steps` steps of k; `add` continues the sums that C holds.
template <int R, int C>
inline void tile_block(const TileOperands& o, int64_t steps, bool add) {
  const int64_t a_bytes = o.a_stride * 2;
  const BFloat16 *a = o.a, *b = o.b;
  if (add) {
    load_tiles<R, C>(o.c, o.c_stride);
  } else {
    zero_tiles<R, C>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    if constexpr (R == 2) _tile_loadd(5, a + kTileSide * o.a_stride, a_bytes);
    if constexpr (C == 2) _tile_loadd(7, b + kTileSide * kTileDepth, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
    a += kTileDepth;
    b += 2 * kTileSide * kTileDepth;
  }
  store_tiles<R, C>(o.c, o.c_stride);
}

// C (+)= A · B, and done(column) for each panel of columns once it is whole, while the cache has it. A has memory for
// whole tiles of rows, C for whole tiles both ways; what lies beyond A's rows is multiplied, into rows of C beyond its
// own. k is a multiple of kTileDepth.
template <class Done>
inline void tile_product(const TileOperands& o, int64_t rows, int64_t columns, int64_t k, bool accumulate,
                         const Done& done) {
  // The compiler's tile loads do not say that they read memory; what was stored for them must be there.
  asm volatile("" ::: "memory");
  const int64_t all_steps = k / kTileDepth, passes = ceil_div(all_steps, kTileSteps);
  const int64_t longest = ceil_div(all_steps, passes);
  for (int64_t step = 0; step < all_steps; step += longest) {
    const int64_t steps = min64(longest, all_steps - step);
    const bool add = accumulate || step > 0;
    for (int64_t column = 0; column < columns; column += kTilePanel) {
      const BFloat16* b = o.b + column * (o.b_depth == 0 ? k : o.b_depth) + step * 2 * kTileSide * kTileDepth;
      for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
        const TileOperands block{o.a + row * o.a_stride + step * kTileDepth, o.a_stride, b,
                                 o.c + column / kTilePanel * o.c_panel + row * o.c_stride, o.c_stride};
        const bool two_rows = rows - row > kTileSide, two_columns = columns - column > kTileSide;
        if (two_rows) {
          two_columns ? tile_block<2, 2>(block, steps, add) : tile_block<2, 1>(block, steps, add);
        } else {
          two_columns ? tile_block<1, 2>(block, steps, add) : tile_block<1, 1>(block, steps, add);
        }
      }
      // One panel later: the processor cannot read what it has just stored as tiles before it is in the cache.
      if (step + steps == all_steps && column > 0) done(column - kTilePanel);
    }
  }
  done((ceil_div(columns, kTilePanel) - 1) * kTilePanel);
}

// Steps of k of which tiles of one operand, 36 KiB, stay in a first-level cache of 48 KiB beside what passes through
// it.
constexpr int64_t kKeptSteps = 18;

// Tiles 4 and 5 from A, 6 and 7 from B; streamed, they do not take the place of others in the first-level cache.
template <int R, bool Stream>
[[gnu::always_inline]] inline void load_a(const BFloat16* a, int64_t next, int64_t bytes) {
  if constexpr (Stream) {
    _tile_stream_loadd(4, a, bytes);
    if constexpr (R == 2) _tile_stream_loadd(5, a + next, bytes);
  } else {
    _tile_loadd(4, a, bytes);
    if constexpr (R == 2) _tile_loadd(5, a + next, bytes);
  }
}
template <int C, bool Stream>
[[gnu::always_inline]] inline void load_b(const BFloat16* b) {
  if constexpr (Stream) {
    _tile_stream_loadd(6, b, 64);
    if constexpr (C == 2) _tile_stream_loadd(7, b + kTileSide * kTileDepth, 64);
  } else {
    _tile_loadd(6, b, 64);
    if constexpr (C == 2) _tile_loadd(7, b + kTileSide * kTileDepth, 64);
  }
}

template <int R, int C, bool StreamA, bool StreamB>
[[gnu::always_inline]] inline void stream_steps(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t begin,
                                                int64_t end) {
  for (int64_t step = begin; step < end; ++step) {
    load_a<R, StreamA>(a + step * kTileDepth, kTileSide * a_stride, a_stride * 2);
    load_b<C, StreamB>(b + step * kTileDepth * kTilePanel);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (R == 2 && C == 2) _tile_dpbf16ps(3, 5, 7);
  }
}

// R × C tiles of C [][kTilePanel] over all steps of k. The operand that the next block reads again is kept, as far as
// it fits; everything else is streamed.
template <int R, int C>
inline void stream_block(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t steps, bool keep_a, float* c) {
  const int64_t kept = min64(steps, kKeptSteps);
  zero_tiles<R, C>();
  if (keep_a) {
    stream_steps<R, C, false, true>(a, a_stride, b, 0, kept);
  } else {
    stream_steps<R, C, true, false>(a, a_stride, b, 0, kept);
  }
  stream_steps<R, C, true, true>(a, a_stride, b, kept, steps);
  store_tiles<R, C>(c, kTilePanel);
}

// A · B in blocks of 32 rows and a panel, each over all of k: done(row, column, sums) gets sums [32][kTilePanel].
// Beside tile_product, sums are never read again, and one of the operands passes through the first-level cache only:
// for a B that fills the second-level cache. A has memory for whole tiles of rows.
template <class Done>
inline void stream_product(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t rows, int64_t columns,
                           int64_t k, const Done& done) {
  constexpr int64_t kRows = 2 * kTileSide;
  alignas(64) float sums[2][kRows * kTilePanel];
  const int64_t row_blocks = ceil_div(rows, kRows), blocks = row_blocks * ceil_div(columns, kTilePanel);
  const auto finish = [&](int64_t block) {
    done(block % row_blocks * kRows, block / row_blocks * kTilePanel, sums[block % 2]);
  };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = block % row_blocks * kRows, column = block / row_blocks * kTilePanel;
    const auto multiply = [&](auto product) {
      product(a + row * a_stride, a_stride, b + column * k, k / kTileDepth, row_blocks == 1, sums[block % 2]);
    };
    // The compiler's tile loads and stores do not say that they use memory.
    asm volatile("" ::: "memory");
    if (rows - row > kTileSide) {
      columns - column > kTileSide ? multiply(stream_block<2, 2>) : multiply(stream_block<2, 1>);
    } else {
      columns - column > kTileSide ? multiply(stream_block<1, 2>) : multiply(stream_block<1, 1>);
    }
    asm volatile("" ::: "memory");
    // One block later: the processor cannot read what it has just stored as tiles before it is in the cache.
    if (block > 0) finish(block - 1);
  }
  if (blocks > 0) finish(blocks - 1);
}

// Stores the first `count` of one panel's 32 columns, rounded to nearest even.
inline void store_panel(Vec<float> low, Vec<float> high, int64_t count, BFloat16* target, bool streamed = false) {
  if (streamed) {
    return _mm512_stream_si512(reinterpret_cast<__m512i*>(target),
                               (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
  }
  _mm512_mask_storeu_epi16(target, first_lanes(count), (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
