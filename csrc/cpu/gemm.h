// The one matrix-product tile on which both ops stand: C[rows][lanes] (+)= A[rows][k] · B[k][lanes].
//
// A is read one element at a time and broadcast: by any two strides, so that a row-major operand serves as itself or as
// its transpose without a copy, or packed as the tiles read it (pack.h). B and C are rows of vectors.
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

// Elements from one k to the next in a packed A: the rows of a tile, in whole vectors.
template <class T>
constexpr int64_t kTileStride = (kTileRows + kLanes<T> - 1) / kLanes<T> * kLanes<T>;

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

// How a tile finds its operands. Strides that the compiler knows become part of the instructions; others take more
// registers than there are, one for each row of A.
struct Strided {
  template <class T, int Rows>
  static int64_t a_row(const TileArgs<T>& args) {
    return args.a_row;
  }
  template <class T, int Rows>
  static int64_t a_k(const TileArgs<T>& args) {
    return args.a_k;
  }
  template <class T>
  static int64_t b_stride(const TileArgs<T>& args) {
    return args.b_stride;
  }
};
// A as it is packed by pack.h, B in rows of kPanel.
struct Packed {
  template <class T, int Rows>
  static constexpr int64_t a_row(const TileArgs<T>&) {
    return 1;
  }
  template <class T, int Rows>
  static constexpr int64_t a_k(const TileArgs<T>&) {
    return kTileStride<T>;
  }
  template <class T>
  static constexpr int64_t b_stride(const TileArgs<T>&) {
    return kPanel<T>;
  }
};
// One tile of A packed like that, B in any rows.
struct PackedTile : Packed {
  template <class T>
  static int64_t b_stride(const TileArgs<T>& args) {
    return args.b_stride;
  }
};
// A the transpose of rows of kPanel, as scores are.
struct Lanes {
  template <class T, int Rows>
  static constexpr int64_t a_row(const TileArgs<T>&) {
    return kPanel<T>;
  }
  template <class T, int Rows>
  static constexpr int64_t a_k(const TileArgs<T>&) {
    return 1;
  }
  template <class T>
  static int64_t b_stride(const TileArgs<T>& args) {
    return args.b_stride;
  }
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

// Steps of k between two jumps: where strides are known, the steps cost no arithmetic on addresses.
template <class Layout>
constexpr int kUnroll = __is_same(Layout, Strided) ? 1 : 4;

template <class Step, class Layout, class T, int Rows, int Vectors>
inline void add_product(Vec<T> (&sum)[Rows][Vectors], const T* a, int64_t a_row, const T* b) {
  Vec<T> right[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) right[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
    Vec<T> left = splat(a[r * a_row]);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) sum[r][v] = Step::template add<T>(sum[r][v], left, right[v]);
  }
}

template <class Step, class Layout, class T, int Rows, int Vectors>
inline void add_products(Vec<T> (&sum)[Rows][Vectors], const TileArgs<T>& args, int64_t begin, int64_t end) {
  const int64_t a_row = Layout::template a_row<T, Rows>(args), a_k = Layout::template a_k<T, Rows>(args);
  const int64_t b_stride = Layout::template b_stride<T>(args);
  const T* a = args.a + begin * a_k;
  const T* b = args.b + begin * b_stride;
  int64_t k = begin;
  for (; k + kUnroll<Layout> <= end; k += kUnroll<Layout>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll<Layout>; ++u) {
      add_product<Step, Layout, T, Rows, Vectors>(sum, a + u * a_k, a_row, b + u * b_stride);
    }
    a += kUnroll<Layout> * a_k;
    b += kUnroll<Layout> * b_stride;
  }
  for (; k < end; ++k) {
    add_product<Step, Layout, T, Rows, Vectors>(sum, a, a_row, b);
    a += a_k;
    b += b_stride;
  }
}

template <class Step, class Layout, class T, int Rows, int Vectors, bool Accumulate>
void tile(const TileArgs<T>& args) {
  constexpr int64_t chain = kChain<Step, Rows, Vectors>, stored = kStored<Step, Rows, Vectors>;
  for (int64_t begin = 0; begin < args.k; begin += stored) {
    const int64_t end = min64(begin + stored, args.k);
    Vec<T> sum[Rows][Vectors] = {};
    add_products<Step, Layout, T, Rows, Vectors>(sum, args, begin, min64(begin + chain, end));
    if constexpr (chain < stored) {
      for (int64_t middle = begin + chain; middle < end; middle += chain) {
        Vec<T> next[Rows][Vectors] = {};
        add_products<Step, Layout, T, Rows, Vectors>(next, args, middle, min64(middle + chain, end));
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

template <class Step, class Layout, class T, int Vectors, bool Accumulate, int Rows = kTileRows>
inline void call_tile(int rows, const TileArgs<T>& args) {
  if (rows == Rows) {
    tile<Step, Layout, T, Rows, Vectors, Accumulate>(args);
  } else if constexpr (Rows > 1) {
    call_tile<Step, Layout, T, Vectors, Accumulate, Rows - 1>(rows, args);
  }
}

// Deals rows out evenly over the tiles, so that no tile is left with too few accumulators to hide the latency of an
// FMA, and calls f(first, rows, tile) for each.
template <class F>
inline void for_each_tile(int64_t m, const F& f) {
  const int64_t tiles = ceil_div(m, kTileRows);
  if (tiles == 0) return;
  int64_t rows = ceil_div(m, tiles), longer = m - (rows - 1) * tiles;
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    if (t == longer) --rows;
    f(first, rows, t);
    first += rows;
  }
}

// C [m][lanes] (+)= A [m][k] · B [k][lanes] for any m and `vectors` vectors of lanes, at most kTileVectors.
template <class T, bool Accumulate, class Step = Multiply, class Layout = Strided>
inline void panel_product(int64_t m, int vectors, const TileArgs<T>& args) {
  for_each_tile(m, [&](int64_t first, int64_t rows, int64_t) {
    TileArgs<T> current = args;
    current.a += first * Layout::template a_row<T, 1>(args);
    current.c += first * args.c_stride;
    if (vectors == 2) {
      call_tile<Step, Layout, T, 2, Accumulate>(int(rows), current);
    } else {
      call_tile<Step, Layout, T, 1, Accumulate>(int(rows), current);
    }
  });
}

// C (+)= A · B for any number of lanes, panel by panel; B and C are row-major and padded to whole vectors.
template <class T, bool Accumulate, class Layout = Strided, class Step = Multiply>
inline void product(int64_t m, int64_t lanes, TileArgs<T> args) {
  for (int64_t lane = 0; lane < lanes; lane += kPanel<T>) {
    int vectors = int(min64(ceil_div(lanes - lane, kLanes<T>), kTileVectors));
    panel_product<T, Accumulate, Step, Layout>(m, vectors, args);
    args.b += kPanel<T>;
    args.c += kPanel<T>;
  }
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
