// The one matrix-product tile on which both ops stand: C[rows][lanes] (+)= A[rows][k] · B[k][lanes].
//
// A is read one element at a time and broadcast, by any two strides, so a row-major operand serves as itself or as its
// transpose without a copy; B and C are rows of vectors.
#pragma once

#include "simd.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Registers: kTileRows · kTileVectors accumulators, kTileVectors of B and one broadcast must fit the register file.
#if defined(__AVX512F__)
constexpr int kTileRows = 14;  // 28 + 2 + 1 of 32
#else
constexpr int kTileRows = 6;  // 12 + 2 + 1 of 16
#endif
constexpr int kTileVectors = 2;

template <class T>
constexpr int kPanel = kTileVectors * kLanes<T>;

template <class T>
struct TileArgs {
  const T* a;
  int64_t a_row;
  int64_t a_k;
  const T* b;
  int64_t b_stride;
  T* c;
  int64_t c_stride;
  int64_t k;
};

// What one step of k multiplies: one element of A with a vector of B, ...
struct Multiply {
  static constexpr int64_t kTerms = 32;
  template <class T>
  static Vec<T> add(Vec<T> sum, Vec<T> left, Vec<T> right) {
    return sum + left * right;
  }
};
// The same in longer chains, for sums so long that PyTorch's own are no shorter.
struct MultiplyLong : Multiply {
  static constexpr int64_t kTerms = 128;
};
// ... or, where the processor has it, a pair of neighbouring bfloat16 (in the bits of a float) with a vector of pairs.
#if defined(__AVX512BF16__)
struct MultiplyPairs {
  static constexpr int64_t kTerms = 128;
  template <class T>
  static Vec<T> add(Vec<T> sum, Vec<T> left, Vec<T> right) {
    return (Vec<T>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
};
#endif

// Terms that a register sums up before it is added to the next level. A long chain of additions loses digits that
// PyTorch, which sums blocks or lanes, keeps; a small tile has time for short chains and registers for a level between
// them and C, and PyTorch's small products, being dot products over lanes, have the shortest.
template <int Rows, int Vectors>
constexpr bool kSmallTile = Rows * Vectors <= kTileRows;
template <class Step, int Rows, int Vectors>
constexpr int64_t kChain = kSmallTile<Rows, Vectors>             ? 8
                           : Rows * Vectors <= 3 * kTileRows / 2 ? 16
                                                                 : Step::kTerms;
template <class Step, int Rows, int Vectors>
constexpr int64_t kStored = kSmallTile<Rows, Vectors> ? 64 : kChain<Step, Rows, Vectors>;

template <class Step, class T, int Rows, int Vectors>
inline void add_products(Vec<T> (&sum)[Rows][Vectors], const TileArgs<T>& args, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const T* a = args.a + begin * args.a_k;
  const T* b = args.b + begin * args.b_stride;
  for (int64_t k = begin; k < end; ++k) {
    Vec<T> right[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      Vec<T> left = splat(a[r * args.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sum[r][v] = Step::template add<T>(sum[r][v], left, right[v]);
    }
    a += args.a_k;
    b += args.b_stride;
  }
}

template <class Step, class T, int Rows, int Vectors, bool Accumulate>
void tile(const TileArgs<T>& args) {
  constexpr int64_t chain = kChain<Step, Rows, Vectors>, stored = kStored<Step, Rows, Vectors>;
  for (int64_t begin = 0; begin < args.k; begin += stored) {
    const int64_t end = min64(begin + stored, args.k);
    Vec<T> sum[Rows][Vectors] = {};
    add_products<Step, T, Rows, Vectors>(sum, args, begin, min64(begin + chain, end));
    if constexpr (chain < stored) {
      for (int64_t middle = begin + chain; middle < end; middle += chain) {
        Vec<T> next[Rows][Vectors] = {};
        add_products<Step, T, Rows, Vectors>(next, args, middle, min64(middle + chain, end));
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < Vectors; ++v) sum[r][v] += next[r][v];
        }
      }
    }
    const bool add = Accumulate || begin > 0;
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        T* c = args.c + r * args.c_stride + v * kLanes<T>;
        store(c, add ? load(c) + sum[r][v] : sum[r][v]);
      }
    }
  }
}

template <class Step, class T, int Vectors, bool Accumulate, int Rows = kTileRows>
inline void call_tile(int rows, const TileArgs<T>& args) {
  if (rows == Rows) {
    tile<Step, T, Rows, Vectors, Accumulate>(args);
  } else if constexpr (Rows > 1) {
    call_tile<Step, T, Vectors, Accumulate, Rows - 1>(rows, args);
  }
}

// C [m][lanes] (+)= A [m][k] · B [k][lanes] for any m and `vectors` vectors of lanes, at most kTileVectors. Rows are
// dealt out evenly over the tiles, so that no tile is left with too few accumulators to hide the latency of an FMA.
template <class T, bool Accumulate, class Step = Multiply>
inline void panel_product(int64_t m, int vectors, TileArgs<T> args) {
  int64_t tiles = ceil_div(m, kTileRows);
  int64_t rows = m / tiles, longer = m % tiles;
  for (int64_t t = 0; t < tiles; ++t) {
    int current = int(rows + (t < longer));
    if (vectors == 2) {
      call_tile<Step, T, 2, Accumulate>(current, args);
    } else {
      call_tile<Step, T, 1, Accumulate>(current, args);
    }
    args.a += current * args.a_row;
    args.c += current * args.c_stride;
  }
}

// C (+)= A · B for any number of lanes, panel by panel; B and C are row-major and padded to whole vectors.
template <class T, bool Accumulate>
inline void product(int64_t m, int64_t lanes, TileArgs<T> args) {
  for (int64_t lane = 0; lane < lanes; lane += kPanel<T>) {
    int vectors = int(min64(ceil_div(lanes - lane, kLanes<T>), kTileVectors));
    panel_product<T, Accumulate>(m, vectors, args);
    args.b += kPanel<T>;
    args.c += kPanel<T>;
  }
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
