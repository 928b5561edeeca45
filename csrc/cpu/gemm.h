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

// How a tile finds its operands. Strides that the compiler knows, those that are not 0 here, become part of the
// instructions; others take more registers than there are, one for each row of A.
template <int64_t ARow = 0, int64_t AK = 0, int64_t BStride = 0>
struct Layout {
  static constexpr bool kKnown = ARow != 0 && AK != 0;
  template <class T>
  static constexpr int64_t a_row(const TileArgs<T>& args) {
    return ARow != 0 ? ARow : args.a_row;
  }
  template <class T>
  static constexpr int64_t a_k(const TileArgs<T>& args) {
    return AK != 0 ? AK : args.a_k;
  }
  template <class T>
  static constexpr int64_t b_stride(const TileArgs<T>& args) {
    return BStride != 0 ? BStride : args.b_stride;
  }
};
using Strided = Layout<>;
// A as it is packed by pack.h, B in rows of kPanel.
template <class T>
using Packed = Layout<1, kTileStride<T>, kPanel<T>>;
// One tile of A packed like that, B in any rows.
template <class T>
using PackedTile = Layout<1, kTileStride<T>>;
// A the transpose of rows of kPanel, as scores are.
template <class T>
using Lanes = Layout<kPanel<T>, 1>;

// What one step of k multiplies: one element of A with a vector of B, ...
struct Multiply {
  // Twice as many where a tile is small against its way through C: the 16 registers of AVX2.
  static constexpr int64_t kTerms = kTileRows < 14 ? 64 : 32;
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
constexpr bool is_small(int64_t accumulators) { return accumulators <= kTileRows; }
template <class Step>
constexpr int64_t chain_terms(int64_t accumulators) {
  return is_small(accumulators) ? 8 : accumulators <= 3 * kTileRows / 2 ? 16 : Step::kTerms;
}
// Terms after which a tile of rows · vectors accumulators adds to C.
template <class Step>
constexpr int64_t stored_terms(int64_t accumulators) {
  return is_small(accumulators) ? 64 : chain_terms<Step>(accumulators);
}

// Steps of k between two jumps: where strides are known, the steps cost no arithmetic on addresses.
template <class Layout>
constexpr int kUnroll = Layout::kKnown ? 4 : 1;

template <class Step, class T, int Rows, int Vectors>
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
  const int64_t a_row = Layout::a_row(args), a_k = Layout::a_k(args);
  const int64_t b_stride = Layout::b_stride(args);
  const T* a = args.a + begin * a_k;
  const T* b = args.b + begin * b_stride;
  int64_t k = begin;
  for (; k + kUnroll<Layout> <= end; k += kUnroll<Layout>) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll<Layout>; ++u) {
      add_product<Step, T, Rows, Vectors>(sum, a + u * a_k, a_row, b + u * b_stride);
    }
    a += kUnroll<Layout> * a_k;
    b += kUnroll<Layout> * b_stride;
  }
  for (; k < end; ++k) {
    add_product<Step, T, Rows, Vectors>(sum, a, a_row, b);
    a += a_k;
    b += b_stride;
  }
}

template <class Step, class Layout, class T, int Rows, int Vectors, bool Accumulate>
void tile(const TileArgs<T>& args) {
  constexpr int64_t chain = chain_terms<Step>(Rows * Vectors), stored = stored_terms<Step>(Rows * Vectors);
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
inline void call_rows(int64_t rows, const TileArgs<T>& args) {
  if (rows == Rows) {
    tile<Step, Layout, T, Rows, Vectors, Accumulate>(args);
  } else if constexpr (Rows > 1) {
    call_rows<Step, Layout, T, Vectors, Accumulate, Rows - 1>(rows, args);
  }
}

// One tile of C, of 1 to kTileRows rows and 1 to kTileVectors vectors.
template <class T, bool Accumulate, class Step, class Layout>
inline void call_tile(int64_t rows, int64_t vectors, const TileArgs<T>& args) {
  if (vectors == 2) {
    call_rows<Step, Layout, T, 2, Accumulate>(rows, args);
  } else {
    call_rows<Step, Layout, T, 1, Accumulate>(rows, args);
  }
}

// A number that the compiler knows, as an argument.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(j, odd) for each j in [begin, end). What the even and what the odd ones add up stays in a register each,
// which it does only because the compiler knows `odd`.
template <class F>
inline void for_each_pair(int64_t begin, int64_t end, const F& f) {
  for (int64_t j = begin; j < end; j += 2) {
    f(j, Constant<0>{});
    if (j + 1 < end) f(j + 1, Constant<1>{});
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

// C (+)= A · B for any number of rows and lanes, panel by panel; B and C are row-major and padded to whole vectors.
template <class T, bool Accumulate, class Layout = Strided, class Step = Multiply>
inline void product(int64_t m, int64_t lanes, const TileArgs<T>& args) {
  for (int64_t lane = 0; lane < lanes; lane += kPanel<T>) {
    const int64_t vectors = min64(ceil_div(lanes - lane, kLanes<T>), kTileVectors);
    for_each_tile(m, [&](int64_t first, int64_t rows, int64_t) {
      TileArgs<T> current = args;
      current.a += first * Layout::a_row(args);
      current.b += lane;
      current.c += first * args.c_stride + lane;
      call_tile<T, Accumulate, Step, Layout>(rows, vectors, current);
    });
  }
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
