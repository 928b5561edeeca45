// Tiles of 16-bit elements in shared memory, the way to them from global memory, and products of fragments with them.
#pragma once

#include "primitives.cuh"

namespace fastvit::cuda {

constexpr int kWarpThreads = 32;
constexpr int kChunkElements = 8;  // 16 bytes
constexpr int kElementBytes = 2;

__host__ __device__ constexpr int greatest_common_divisor(int a, int b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int64_t a, int b) { return int(ceil_div(a, b) * b); }

// Rows of kDim elements, without padding. ldmatrix reads the same chunk of eight consecutive rows: chunks are permuted
// within a row (xor, by bits of the row) so that those eight lie in eight different groups of four banks.
template <int kDim>
struct Tile {
  static_assert(kDim % kChunkElements == 0);
  static constexpr int kChunks = kDim / kChunkElements;
  static constexpr int kRowBytes = kDim * kElementBytes;
  // Eight rows meet kPermuted chunks in the same banks; as many neighbours in a row can be exchanged.
  static constexpr int kPermuted = greatest_common_divisor(kChunks, 8);

  static __device__ __forceinline__ uint32_t address(uint32_t begin, int row, int chunk) {
    const int permuted = chunk ^ (row / (8 / kPermuted) & (kPermuted - 1));
    return begin + uint32_t(row * kChunks + permuted) * sizeof(Chunk);
  }

  // The same of row first + row, where first is a multiple of 8: the permutation has that period, so that addresses of
  // one lane in many tiles differ by a constant.
  static __device__ __forceinline__ uint32_t address(uint32_t begin, int first, int row, int chunk) {
    return address(begin, row, chunk) + uint32_t(first * kRowBytes);
  }

  // The address of chunk + more of a row, of which `at` is the address of a chunk that has no bit in common with more.
  // It is one instruction: nothing is kept in registers for each `more`. Tiles begin at a multiple of 128 bytes.
  static __device__ __forceinline__ uint32_t advance(uint32_t at, int more) {
    const int permuted = more & (kPermuted - 1);
    return (at ^ uint32_t(permuted) * sizeof(Chunk)) + uint32_t(more - permuted) * sizeof(Chunk);
  }
};

// A matrix in global memory whose rows are contiguous.
struct Rows {
  const char* data;
  int64_t row_bytes;  // from one row to the next
  int rows;
  int columns;
  bool vectorized;  // every chunk begins at a multiple of 16 bytes, and columns is a multiple of 8

  __device__ __forceinline__ const char* at(int row, int column) const {
    return data + row * row_bytes + column * kElementBytes;
  }

  __device__ __forceinline__ bool has(int row, int column) const { return row < rows && column < columns; }
};

// The ways between global memory and a tile go by chunks where the matrix is vectorized, and else by elements: slowly,
// but for any strides. `thread` of `threads` does its part of rows [first, first + count) of the matrix, which are the
// first count rows of the tile; what lies beyond the matrix is zero there.

template <int kDim>
__device__ __forceinline__ void load_tile_elements(uint32_t begin, const Rows& source, int first, int count, int thread,
                                                   int threads) {
#pragma unroll 1
  for (int i = thread; i < count * kDim; i += threads) {
    const int row = i / kDim, column = i % kDim;
    const uint32_t element = Tile<kDim>::address(begin, row, column / kChunkElements);
    const bool inside = source.has(first + row, column);
    store_shared<uint16_t>(element + column % kChunkElements * kElementBytes,
                           inside ? load_global<uint16_t>(source.at(first + row, column)) : uint16_t(0));
  }
}

// By cp.async: visible after commit, wait and barrier.
template <int kDim>
__device__ __forceinline__ void load_tile_async(uint32_t begin, const Rows& source, int first, int count, int thread,
                                                int threads) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  if (!source.vectorized) return load_tile_elements<kDim>(begin, source, first, count, thread, threads);
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool inside = source.has(first + row, chunk * kChunkElements);
    cp_async<16>(Tile<kDim>::address(begin, row, chunk),
                 inside ? source.at(first + row, chunk * kChunkElements) : source.data, inside);
  }
}

// At once: visible after a barrier.
template <int kDim>
__device__ __forceinline__ void load_tile(uint32_t begin, const Rows& source, int first, int count, int thread,
                                          int threads) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  if (!source.vectorized) return load_tile_elements<kDim>(begin, source, first, count, thread, threads);
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    Chunk value{};
    if (source.has(first + row, chunk * kChunkElements)) {
      value = load_global<Chunk>(source.at(first + row, chunk * kChunkElements));
    }
    store_shared<Chunk>(Tile<kDim>::address(begin, row, chunk), value);
  }
}

// Eight elements from a column on that is a multiple of eight; zeros beyond the matrix.
__device__ __forceinline__ Chunk load_chunk(const Rows& source, int row, int column) {
  Chunk value{};
  if (source.vectorized) {
    if (source.has(row, column)) value = load_global<Chunk>(source.at(row, column));
    return value;
  }
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    if (!source.has(row, column + i)) continue;
    value.word[i / 2] |= uint32_t(load_global<uint16_t>(source.at(row, column + i))) << 16 * (i % 2);
  }
  return value;
}

__device__ __forceinline__ void store_chunk(const Rows& target, int row, int column, const Chunk& value) {
  char* pointer = const_cast<char*>(target.at(row, column));
  if (target.vectorized) {
    if (target.has(row, column)) store_global<Chunk>(pointer, value);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunkElements; ++i) {
    if (!target.has(row, column + i)) continue;
    store_global<uint16_t>(pointer + i * kElementBytes, uint16_t(value.word[i / 2] >> 16 * (i % 2)));
  }
}

template <int kDim>
__device__ __forceinline__ void store_tile(uint32_t begin, const Rows& target, int first, int count, int thread,
                                           int threads) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  if (!target.vectorized) {
#pragma unroll 1
    for (int i = thread; i < count * kDim; i += threads) {
      const int row = i / kDim, column = i % kDim;
      if (!target.has(first + row, column)) continue;
      const uint32_t element = Tile<kDim>::address(begin, row, column / kChunkElements);
      store_global<uint16_t>(const_cast<char*>(target.at(first + row, column)),
                             load_shared<uint16_t>(element + column % kChunkElements * kElementBytes));
    }
    return;
  }
  for (int i = thread; i < count * kChunks; i += threads) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (!target.has(first + row, chunk * kChunkElements)) continue;
    store_global<Chunk>(const_cast<char*>(target.at(first + row, chunk * kChunkElements)),
                        load_shared<Chunk>(Tile<kDim>::address(begin, row, chunk)));
  }
}

// Sixteen rows of kDim elements as left operands: chunk[c][i] is half i (rows 0–7, 8–15) of columns 8c … 8c + 7.
template <int kDim>
struct RowFragment {
  uint32_t chunk[Tile<kDim>::kChunks][2];

  __device__ __forceinline__ void load(uint32_t begin, int first_row, int lane) {
    const uint32_t at = Tile<kDim>::address(begin, first_row, lane % 16, lane / 16);
#pragma unroll
    for (int c = 0; c + 2 <= Tile<kDim>::kChunks; c += 2) {
      uint32_t word[4];
      ldmatrix<4, false>(word, Tile<kDim>::advance(at, c));
      chunk[c][0] = word[0], chunk[c][1] = word[1], chunk[c + 1][0] = word[2], chunk[c + 1][1] = word[3];
    }
    if constexpr (Tile<kDim>::kChunks % 2) {
      constexpr int kLast = Tile<kDim>::kChunks - 1;
      ldmatrix<2, false>(chunk[kLast], Tile<kDim>::advance(at, kLast));
    }
  }
};

// product[m] [16, 8] += a[m] [16, kDim] · (rows first_row … first_row + 7 of the tile)ᵀ.
template <typename T, int kDim, int kM>
__device__ __forceinline__ void multiply_rows(float (&product)[kM][4], const RowFragment<kDim> (&a)[kM], uint32_t begin,
                                              int first_row, int lane) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  const uint32_t at = Tile<kDim>::address(begin, first_row, lane % 8, lane / 8);
#pragma unroll
  for (int c = 0; c + 2 <= kChunks; c += 4) {
    uint32_t b[4];
    if (c + 4 <= kChunks) {
      ldmatrix<4, false>(b, Tile<kDim>::advance(at, c));
    } else {
      uint32_t half[2];
      ldmatrix<2, false>(half, Tile<kDim>::advance(at, c));
      b[0] = half[0], b[1] = half[1];
    }
#pragma unroll
    for (int k = c; k < c + 4 && k + 2 <= kChunks; k += 2) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t left[4] = {a[m].chunk[k][0], a[m].chunk[k][1], a[m].chunk[k + 1][0], a[m].chunk[k + 1][1]};
        mma_m16n8k16<T>(product[m], left, b[k - c], b[k - c + 1]);
      }
    }
  }
  if constexpr (kChunks % 2) {
    constexpr int kLast = kChunks - 1;
    uint32_t b[1];
    ldmatrix<1, false>(b, Tile<kDim>::advance(at, kLast));
#pragma unroll
    for (int m = 0; m < kM; ++m) mma_m16n8k8<T>(product[m], a[m].chunk[kLast][0], a[m].chunk[kLast][1], b[0]);
  }
}

// product[j] [16, 8] += a [16, kDim] · (rows 8j … 8j + 7 of b)ᵀ, where a and b are the addresses of 16 rows of tiles
// (from a row that is a multiple of 8 on): for an a that would take too many registers as a fragment.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_rows_of_tiles(float (&product)[2][1][4], uint32_t a, uint32_t b, int lane) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  const uint32_t left_at = Tile<kDim>::address(a, lane % 16, lane / 16);
  const uint32_t right_at = Tile<kDim>::address(b, lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (int c = 0; c + 2 <= kChunks; c += 2) {
    uint32_t left[4], right[4];
    ldmatrix<4, false>(left, Tile<kDim>::advance(left_at, c));
    ldmatrix<4, false>(right, Tile<kDim>::advance(right_at, c));
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_m16n8k16<T>(product[j][0], left, right[2 * j], right[2 * j + 1]);
  }
  if constexpr (kChunks % 2) {
    uint32_t left[2], right[2];
    ldmatrix<2, false>(left, Tile<kDim>::advance(left_at, kChunks - 1));
    ldmatrix<2, false>(right, Tile<kDim>::address(b, lane % 16, kChunks - 1));
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_m16n8k8<T>(product[j][0], left[0], left[1], right[j]);
  }
}

// product[m][c] [16, 8] += left[m] [16, 16] · (columns 8c … 8c + 7 of rows first_row … first_row + 15 of the tile).
template <typename T, int kDim, int kM>
__device__ __forceinline__ void multiply_columns(float (&product)[kM][Tile<kDim>::kChunks][4],
                                                 const uint32_t (&left)[kM][4], uint32_t begin, int first_row,
                                                 int lane) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  const uint32_t at = Tile<kDim>::address(begin, first_row, lane % 16, lane / 16);
#pragma unroll
  for (int c = 0; c + 2 <= kChunks; c += 2) {
    uint32_t b[4];
    ldmatrix<4, true>(b, Tile<kDim>::advance(at, c));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma_m16n8k16<T>(product[m][c], left[m], b[0], b[1]);
      mma_m16n8k16<T>(product[m][c + 1], left[m], b[2], b[3]);
    }
  }
  if constexpr (kChunks % 2) {
    uint32_t b[2];
    ldmatrix<2, true>(b, Tile<kDim>::advance(at, kChunks - 1));
#pragma unroll
    for (int m = 0; m < kM; ++m) mma_m16n8k16<T>(product[m][kChunks - 1], left[m], b[0], b[1]);
  }
}

// The same with the first eight columns of left and eight rows of the tile.
template <typename T, int kDim, int kM>
__device__ __forceinline__ void multiply_columns_half(float (&product)[kM][Tile<kDim>::kChunks][4],
                                                      const uint32_t (&left)[kM][4], uint32_t begin, int first_row,
                                                      int lane) {
  constexpr int kChunks = Tile<kDim>::kChunks;
  const uint32_t at = Tile<kDim>::address(begin, first_row, lane % 8, lane / 8 % 2);
#pragma unroll
  for (int c = 0; c < kChunks; c += 2) {
    uint32_t b[2];
    // A last chunk without neighbour is read twice.
    ldmatrix<2, true>(
        b, c + 1 < kChunks ? Tile<kDim>::advance(at, c) : Tile<kDim>::address(begin, first_row, lane % 8, c));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma_m16n8k8<T>(product[m][c], left[m][0], left[m][1], b[0]);
      if (c + 1 < kChunks) mma_m16n8k8<T>(product[m][c + 1], left[m][0], left[m][1], b[1]);
    }
  }
}

// The left operand [16, 16] made of two accumulators [16, 8] rounded to T, side by side.
template <typename T>
__device__ __forceinline__ void pack_left(uint32_t (&left)[4], const float (&first)[4], const float (&second)[4]) {
  left[0] = pack<T>(first[0], first[1]);
  left[1] = pack<T>(first[2], first[3]);
  left[2] = pack<T>(second[0], second[1]);
  left[3] = pack<T>(second[2], second[3]);
}

__device__ __forceinline__ float as_float(uint32_t word) { return __builtin_bit_cast(float, word); }

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t word, int mask) {
  return __builtin_bit_cast(uint32_t, shuffle_xor(as_float(word), mask));
}

// The four lanes 4g … 4g + 3 exchange words: word i of lane t becomes word t of lane i.
__device__ __forceinline__ void transpose_words(Chunk& chunk, int lane) {
#pragma unroll
  for (int step = 1; step <= 2; ++step) {
    const bool odd = lane & step;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t& low = chunk.word[step == 1 ? 2 * k : k];
      uint32_t& high = chunk.word[step == 1 ? 2 * k + 1 : k + 2];
      const uint32_t received = shuffle_xor(odd ? low : high, step);
      low = odd ? received : low;
      high = odd ? high : received;
    }
  }
}

// Writes accumulators [16, kDim], times factor and rounded to T, to the rows from first_row on. A lane has two elements
// of a chunk; by exchange with its neighbours it gets whole chunks, without a way through shared memory.
template <typename T, int kDim>
__device__ __forceinline__ void store_accumulators(const float (&value)[Tile<kDim>::kChunks][4], float factor,
                                                   const Rows& target, int first_row, int lane) {
  constexpr int kChunks = Tile<kDim>::kChunks;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + 8 * half + lane / 4;
#pragma unroll
    for (int c = 0; c < kChunks; c += 4) {
      Chunk chunk{};
#pragma unroll
      for (int i = 0; i < 4 && c + i < kChunks; ++i) {
        chunk.word[i] = pack<T>(value[c + i][2 * half] * factor, value[c + i][2 * half + 1] * factor);
      }
      transpose_words(chunk, lane);
      const int mine = c + lane % 4;
      if (mine < kChunks) store_chunk(target, row, mine * kChunkElements, chunk);
    }
  }
}

// Over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float row_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// A NaN is ignored here and comes back through the sums.
__device__ __forceinline__ float row_maximum(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace fastvit::cuda
