// Operands in the order in which tiles read them, and what it takes to bring them there: transposes on the way from the
// caller's memory to the scratch, and back.
#pragma once

#include "arena.h"
#include "gemm.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Rows that are asked for before they are packed.
constexpr int64_t kFetchedRows = 64;

// Asks for the lines that `bytes` bytes lie in.
//
// Inlined always, as all that only prefetch: to GCC 12 such a function has no effect, and calls of it are left out.
template <bool ToWrite>
[[gnu::always_inline]] inline void fetch_lines(const void* first, int64_t bytes) {
  constexpr uintptr_t kLine = 64;
  const uintptr_t begin = uintptr_t(first);
  for (uintptr_t byte = begin & ~(kLine - 1); byte < begin + bytes; byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(byte), ToWrite, 3);
  }
}

// Asks for the lines of `rows` rows. Rows of one head lie apart, where the processor sees no stream; and a loop that
// loads them and stores as much has the few buffers for lines on their way taken by both. Asked for beforehand, rows
// that lie beyond the second-level cache are packed in half the time. Long rows are streams, which it does see.
template <bool ToWrite = false, class In>
[[gnu::always_inline]] inline void fetch_rows(const In* source, int64_t stride, int64_t rows, int64_t columns) {
  const int64_t bytes = columns * int64_t(sizeof(In));
  if (bytes > 1024) return;
  for (int64_t i = 0; i < rows; ++i) fetch_lines<ToWrite>(source + i * stride, bytes);
}

// At every 64th row of `rows`, asks for the next 64 of them: for loops that pack one row, or a multiple of it, at a
// time.
template <class In>
[[gnu::always_inline]] inline void fetch_next(int64_t row, const In* source, int64_t stride, int64_t rows,
                                              int64_t columns) {
  if (row % kFetchedRows != 0) return;
  fetch_rows(source + row * stride, stride, min64(kFetchedRows, rows - row), columns);
}

// Outputs of more bytes are streamed: written past the caches. An ordinary store first reads the line that it
// overwrites, and pushes another one out, both in vain where the output is gone from the cache before it is read.
// Measured with a reader after it (benchmarks/NOTES.md): at 2 to 4 MiB the reader loses what the kernel gains.
constexpr int64_t kStreamedBytes = int64_t(4) << 20;

// Whether an output of `bytes` bytes with rows of `columns` is streamed: only in whole lines, of which one store has to
// write all.
template <class Out>
inline bool is_streamed(const View4& view, int64_t columns, int64_t bytes) {
  constexpr int64_t kLine = 64;
  int64_t all = int64_t(uintptr_t(view.data));
  for (const int64_t size : {columns, view.batch_stride, view.head_stride, view.row_stride}) {
    all |= size * int64_t(sizeof(Out));
  }
  return kVectorBytes == kLine && bytes > kStreamedBytes && all % kLine == 0;
}

// Makes the stores of a streamed output visible to whoever waits for this thread.
inline void end_stream([[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed) _mm_sfence();
#endif
}

// target[r][c] = factor · source[r][c] for `rows` rows, widened and padded with zeros to `padded` columns, a multiple
// of the vector.
template <class In>
inline void load_rows(const In* source, int64_t stride, int64_t rows, int64_t columns, Compute<In> factor,
                      Compute<In>* target, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < padded; c += kLanes<Compute<In>>) {
      store(target + r * padded + c, load_first(source + r * stride + c, columns - c) * factor);
    }
  }
}

// A [rows][depth] in the order in which tiles read it: tile after tile, for each k the elements of its rows.
template <class T>
struct PackedMatrix {
  T* data;
  int64_t rows;
  int64_t depth;

  static int64_t size(int64_t rows, int64_t depth) { return ceil_div(rows, kTileRows) * kTileStride<T> * depth; }
  static PackedMatrix take(Arena& arena, int64_t rows, int64_t depth) {
    return {arena.take<T>(size(rows, depth)), rows, depth};
  }
  T* tile(int64_t index) const { return data + index * kTileStride<T> * depth; }
};

// C [rows][kPanel] (+)= A [rows][first_k, first_k + k) · B [k][kPanel], at least for the first `rows` rows of A.
template <class T, bool Accumulate, class Step = Multiply>
inline void packed_product(const PackedMatrix<T>& a, int64_t rows, int64_t first_k, int64_t k, int64_t vectors,
                           const T* b, T* c) {
  constexpr int64_t W = kPanel<T>;
  for_each_tile(a.rows, [&](int64_t first, int64_t count, int64_t tile) {
    if (first >= rows) return;
    const TileArgs<T> args{a.tile(tile) + first_k * kTileStride<T>, 0, 0, b, W, c + first * W, W, k};
    call_tile<T, Accumulate, Step, Packed<T>>(count, vectors, args);
  });
}

// c[i] (+)= sum over k of a[k] · B[i][first_k + k], at least for the first `rows` rows of a packed B: one row of B per
// lane, where packed_product has one column per lane and would fill the vector with nothing. Tile t of the sums begins
// at target(first row, t) and is kTileStride long, whatever its rows.
template <class T, bool Accumulate, class F>
inline void row_product(const PackedMatrix<T>& b, int64_t rows, int64_t first_k, int64_t k, const T* a,
                        const F& target) {
  constexpr int64_t V = kTileStride<T> / kLanes<T>;
  for_each_tile(b.rows, [&](int64_t first, int64_t, int64_t tile) {
    if (first >= rows) return;
    const T* source = b.tile(tile) + first_k * kTileStride<T>;
    Vec<T> total[V] = {};
    for (int64_t begin = 0; begin < k; begin += Multiply::kTerms) {
      Vec<T> sum[2][V] = {};
      for_each_pair(begin, min64(begin + Multiply::kTerms, k), [&](int64_t j, auto odd) {
        const Vec<T> left = splat(a[j]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; ++v) {
          sum[odd.value][v] += left * load(source + j * kTileStride<T> + v * kLanes<T>);
        }
      });
#pragma GCC unroll 4
      for (int64_t v = 0; v < V; ++v) total[v] += sum[0][v] + sum[1][v];
    }
    T* c = target(first, tile);
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v, c += kLanes<T>) store(c, Accumulate ? load(c) + total[v] : total[v]);
  });
}

// A factor that is no arithmetic: what is moved may be no number, such as two bfloat16 side by side in a float.
struct Unscaled {
  template <class V>
  friend V operator*(V value, Unscaled) {
    return value;
  }
};

// target[c][r] = factor · row(r)[c], widened, for one vector of rows and one of columns: rows and columns beyond the
// given ones are zero, and columns beyond them are not written.
template <bool Full, class In, class F, class Factor>
[[gnu::always_inline]] inline void load_square(const F& row, int64_t rows, int64_t columns, Factor factor,
                                               Compute<In>* target, int64_t target_stride) {
  using T = Compute<In>;
  constexpr int L = kLanes<T>;
  Vec<T> block[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    block[i] = load_first(row(Full || i < rows ? i : 0), Full ? L : i < rows ? columns : 0) * factor;
  }
  transpose_step<T, 1>(block);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (Full || i < columns) store(target + i * target_stride, block[i]);
  }
}

// target[c][r] = factor · source[r][c] for rows [0, rows), widened. Whole vectors are written: beyond the rows, the
// next ones as far as `readable` of them may be read, then zeros.
template <class In, class Factor>
inline void load_transposed(const In* source, int64_t stride, int64_t rows, int64_t readable, int64_t columns,
                            Factor factor, Compute<In>* target, int64_t target_stride) {
  constexpr int L = kLanes<Compute<In>>;
  for (int64_t c = 0; c < columns; c += L) {
    for (int64_t r = 0; r < rows; r += L) {
      const In* corner = source + r * stride + c;
      const auto row = [&](int64_t i) { return corner + i * stride; };
      Compute<In>* to = target + c * target_stride + r;
      if (readable - r >= L && columns - c >= L) {
        load_square<true, In>(row, L, L, factor, to, target_stride);
      } else {
        load_square<false, In>(row, readable - r, columns - c, factor, to, target_stride);
      }
    }
  }
}

// One square of store_transposed.
template <bool Full, class Out>
[[gnu::always_inline]] inline void store_square(const Compute<Out>* source, int64_t source_stride,
                                                Vec<Compute<Out>> factor, int64_t rows, int64_t columns, Out* target,
                                                int64_t stride, bool streamed) {
  using T = Compute<Out>;
  constexpr int L = kLanes<T>;
  Vec<T> block[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    block[i] = Full || i < columns ? load(source + i * source_stride) * factor : Vec<T>{};
  }
  transpose_step<T, 1>(block);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (Full || i < rows) store_first(block[i], Full ? L : columns, target + i * stride, streamed);
  }
}

// target[r][c] = factor[r] · source[c][r] for the rows [0, rows) that one vector holds, narrowed.
template <class Out>
inline void store_transposed(const Compute<Out>* source, int64_t source_stride, Vec<Compute<Out>> factor, int64_t rows,
                             int64_t columns, Out* target, int64_t stride, bool streamed) {
  constexpr int L = kLanes<Compute<Out>>;
  for (int64_t c = 0; c < columns; c += L) {
    if (rows >= L && columns - c >= L) {
      store_square<true>(source + c * source_stride, source_stride, factor, L, L, target + c, stride, streamed);
    } else {
      store_square<false>(source + c * source_stride, source_stride, factor, rows, columns - c, target + c, stride,
                          streamed);
    }
  }
}

// Packs A from its rows, source[row][k].
template <class In>
inline void pack_rows(const In* source, int64_t stride, const PackedMatrix<Compute<In>>& target) {
  int64_t fetched = 0;
  for_each_tile(target.rows, [&](int64_t first, int64_t rows, int64_t tile) {
    for (; fetched < first + rows; ++fetched) fetch_next(fetched, source, stride, target.rows, target.depth);
    load_transposed(source + first * stride, stride, rows, target.rows - first, target.depth, Unscaled(),
                    target.tile(tile), kTileStride<Compute<In>>);
  });
}

// Packs A from its columns, source[k][row]: a few of them at a time, for all tiles, since they may lie far apart.
template <class In>
inline void pack_columns(const In* source, int64_t stride, const PackedMatrix<Compute<In>>& target) {
  using T = Compute<In>;
  constexpr int64_t kStep = 16;
  for (int64_t begin = 0; begin < target.depth; begin += kStep) {
    const int64_t end = min64(begin + kStep, target.depth);
    fetch_next(begin, source, stride, target.depth, target.rows);
    for_each_tile(target.rows, [&](int64_t first, int64_t rows, int64_t tile) {
      for (int64_t r = 0; r < rows; r += kLanes<T>) {
        T* column = target.tile(tile) + r;
        for (int64_t k = begin; k < end; ++k) {
          store(column + k * kTileStride<T>, load_first(source + k * stride + first + r, rows - r));
        }
      }
    });
  }
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
