// The matrices of a patch embedding as its kernels see them: patches where they lie in the images, tokens, the weight;
// and the ways between them and shared memory.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../params.h"
#include "launch.h"
#include "tile.cuh"

namespace fastvit::cuda {

// Division of 0 … 2^31 − 1 by a number known at launch, as a product: with 2^(s − 1) < d ≤ 2^s and
// m = ⌈2^(31 + s) / d⌉ < 2^32, ⌊n m / 2^(31 + s)⌋ = ⌊n / d⌋ for n < 2^31 (Granlund & Montgomery 1994, theorem 4.2).
struct Divisor {
  uint32_t multiplier = 0;
  int shift = 0;
  int divisor = 1;

  Divisor() = default;
  explicit Divisor(int64_t d) : shift(31), divisor(int(d)) {
    while (int64_t(1) << (shift - 31) < d) ++shift;
    multiplier = uint32_t(((uint64_t(1) << shift) + uint64_t(d) - 1) / uint64_t(d));
  }

  __device__ __forceinline__ int quotient(int n) const { return int(uint64_t(uint32_t(n)) * multiplier >> shift); }
};

struct PatchEmbedArguments : PatchEmbedParams {
  int num_tokens = 0;  // B·N
  int patch_size = 0;  // K = C·Ph·Pw
  Divisor by_image;    // N
  Divisor by_columns;
  Divisor by_patch_height;
  Divisor by_patch_width;
  // Elements that move at once: 8, 4, 2 or 1.
  int pixel_width = 1;
  int weight_width = 1;
  int token_width = 1;
};

// The widest vectors that begin aligned and end within a row, where all of `multiples` are distances between them.
inline int vector_width(const void* data, std::initializer_list<int64_t> multiples) {
  int64_t all = int64_t(reinterpret_cast<uintptr_t>(data) / kElementBytes);
  for (int64_t multiple : multiples) all |= multiple;
  return all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : all % 2 == 0 ? 2 : 1;
}

// Positions are counted in 32 bits, addresses in 64.
inline PatchEmbedArguments patch_embed_arguments(const PatchEmbedParams& params) {
  constexpr int64_t kLargest = 1 << 30;
  PatchEmbedArguments p;
  static_cast<PatchEmbedParams&>(p) = params;
  const int64_t per_image = p.rows * p.columns;
  if (p.batch * per_image < 1) throw std::invalid_argument("images: the CUDA kernels take at least one patch");
  const auto check = [](int64_t size, int64_t factor, const char* what) {
    if (size > kLargest / factor) throw std::invalid_argument(std::string(what) + ": the CUDA kernels count to 2^30");
  };
  check(p.batch, per_image, "images: batch · tokens");
  check(p.in_channels * p.patch_height, p.patch_width, "weight: channels · patch height · patch width");
  check(p.embed_dim, 1, "weight: embed_dim");
  p.num_tokens = int(p.batch * per_image);
  p.patch_size = int(p.in_channels * p.patch_height * p.patch_width);
  p.by_image = Divisor(per_image);
  p.by_columns = Divisor(p.columns);
  p.by_patch_height = Divisor(p.patch_height);
  p.by_patch_width = Divisor(p.patch_width);
  // The stride of a dimension of one means nothing.
  const auto step = [](int64_t size, int64_t stride) { return size == 1 ? 0 : stride; };
  if (p.width_stride == 1) {
    p.pixel_width =
        vector_width(p.images, {p.patch_width, step(p.columns, p.patch_column_step), step(p.batch, p.image_stride),
                                step(p.in_channels, p.channel_stride), step(p.rows * p.patch_height, p.height_stride)});
  }
  p.weight_width = vector_width(p.weight, {p.patch_size});
  p.token_width =
      vector_width(p.tokens, {p.embed_dim, step(p.batch, p.token_batch_stride), step(per_image, p.token_stride)});
  return p;
}

// A position is not negative: without its sign the product takes two instructions instead of four.
__device__ __forceinline__ int64_t product(int position, int64_t stride) {
  return int64_t(uint32_t(position)) * stride;
}

// Where a token begins, in bytes: in the images (low half of the chunk) and among the tokens (high half).
__device__ __forceinline__ Chunk place_of(const PatchEmbedArguments& p, int token) {
  // Tokens beyond the last are neither read nor written.
  token = min(token, p.num_tokens - 1);
  const int image = p.by_image.quotient(token);
  const int index = token - image * p.by_image.divisor;
  const int row = p.by_columns.quotient(index);
  const int column = index - row * p.by_columns.divisor;
  const int64_t pixels = product(image, p.image_stride) + product(row, p.patch_row_step * p.height_stride) +
                         product(column, p.patch_column_step * p.width_stride);
  const int64_t tokens = product(image, p.token_batch_stride) + product(index, p.token_stride);
  const auto pixel_bytes = uint64_t(pixels * kElementBytes), token_bytes = uint64_t(tokens * kElementBytes);
  return {{uint32_t(pixel_bytes), uint32_t(pixel_bytes >> 32), uint32_t(token_bytes), uint32_t(token_bytes >> 32)}};
}

// Tokens first … first + count − 1 to places in shared memory; seen by others after a barrier.
__device__ __forceinline__ void store_places(uint32_t places, const PatchEmbedArguments& p, int first, int count) {
  const int i = thread_index();
  if (i < count) store_shared<Chunk>(places + i * sizeof(Chunk), place_of(p, first + i));
}

// The three matrices as the loops below see them: bytes from `data` to a row of the slice or tile and to a column, and
// how many of each there are.

struct PatchView {
  const PatchEmbedArguments& p;
  uint32_t places;  // of row 0
  int rows;

  __device__ __forceinline__ char* data() const { return static_cast<char*>(p.images); }
  __device__ __forceinline__ int columns() const { return p.patch_size; }
  __device__ __forceinline__ int width() const { return p.pixel_width; }

  __device__ __forceinline__ int64_t row(int row) const {
    const Chunk place = load_shared<Chunk>(places + row * sizeof(Chunk));
    return int64_t(uint64_t(place.word[1]) << 32 | place.word[0]);
  }

  __device__ __forceinline__ int64_t column(int k) const {
    const int line = p.by_patch_width.quotient(k), x = k - line * p.by_patch_width.divisor;
    const int channel = p.by_patch_height.quotient(line), y = line - channel * p.by_patch_height.divisor;
    return (product(channel, p.channel_stride) + product(y, p.height_stride) + product(x, p.width_stride)) *
           kElementBytes;
  }
};

struct TokenView {
  const PatchEmbedArguments& p;
  uint32_t places;
  int rows;

  __device__ __forceinline__ char* data() const { return static_cast<char*>(p.tokens); }
  __device__ __forceinline__ int columns() const { return int(p.embed_dim); }
  __device__ __forceinline__ int width() const { return p.token_width; }

  __device__ __forceinline__ int64_t row(int row) const {
    const Chunk place = load_shared<Chunk>(places + row * sizeof(Chunk));
    return int64_t(uint64_t(place.word[3]) << 32 | place.word[2]);
  }

  __device__ __forceinline__ int64_t column(int d) const { return int64_t(d) * kElementBytes; }
};

struct WeightView {
  const PatchEmbedArguments& p;
  int first;
  int rows;

  __device__ __forceinline__ WeightView(const PatchEmbedArguments& p, int first)
      : p(p), first(first), rows(int(p.embed_dim) - first) {}

  __device__ __forceinline__ char* data() const { return static_cast<char*>(p.weight); }
  __device__ __forceinline__ int columns() const { return p.patch_size; }
  __device__ __forceinline__ int width() const { return p.weight_width; }
  __device__ __forceinline__ int64_t row(int row) const {
    return product(first + row, int64_t(uint32_t(p.patch_size)) * kElementBytes);
  }
  __device__ __forceinline__ int64_t column(int k) const { return int64_t(k) * kElementBytes; }
};

// Calls function(std::integral_constant<int, width>). A switch in one kernel, instead of a kernel for each width: all
// threads take the same way, and three matrices would make many kernels.
template <typename Function>
__device__ __forceinline__ void dispatch_width(int width, Function function) {
  switch (width) {
    case 8:
      return function(std::integral_constant<int, 8>());
    case 4:
      return function(std::integral_constant<int, 4>());
    case 2:
      return function(std::integral_constant<int, 2>());
    default:
      return function(std::integral_constant<int, 1>());
  }
}

// thread_index() from the lane, so that what is derived from it is computed where it is used (see lane_index), and
// unsigned, so that divisions by powers of two are single instructions.
__device__ __forceinline__ uint32_t thread_index_here() {
  return uint32_t(thread_index()) / kWarpThreads * kWarpThreads + uint32_t(lane_index());
}

// A thread's part of kRows rows of kDim elements, by vectors: one column, each kStep-th row.
template <int kDim, int kRows, int kWidth, int kThreads>
struct Walk {
  static constexpr int kVectors = kDim / kWidth;
  static constexpr int kStep = kThreads / kVectors;
  static constexpr int kCount = kRows / kStep;
  static_assert(kThreads % kVectors == 0 && kRows % kStep == 0);

  int row, column;

  explicit __device__ __forceinline__ Walk(uint32_t thread)
      : row(int(thread / kVectors)), column(int(thread % kVectors * kWidth)) {}

  // Of step i, in the tile.
  __device__ __forceinline__ uint32_t address(uint32_t begin, int i) const {
    return Tile<kDim>::address(begin, row + i * kStep, column / kChunkElements) +
           column % kChunkElements * kElementBytes;
  }
};

// The slice or tile that begins at first_column of a view, to kRows rows of kDim elements in shared memory.
template <int kDim, int kRows, int kThreads, typename View>
__device__ __forceinline__ void load_view(uint32_t begin, const View& view, int first_column) {
  dispatch_width(view.width(), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    using W = Walk<kDim, kRows, kWidth, kThreads>;
    const W walk(thread_index_here());
    const bool has_column = first_column + walk.column < view.columns();
    const char* source = view.data() + view.column(first_column + walk.column);
    if constexpr (kWidth > 1) {
#pragma unroll
      for (int i = 0; i < W::kCount; ++i) {
        const int row = walk.row + i * W::kStep;
        const bool valid = has_column && row < view.rows;
        // Not read, but aligned all the same.
        cp_async<kWidth * kElementBytes>(walk.address(begin, i), valid ? source + view.row(row) : view.data(), valid);
      }
    } else {
      // cp.async cannot carry two bytes. Several loads are on their way before the first is stored.
      constexpr int kBatch = 8;
      static_assert(W::kCount % kBatch == 0);
#pragma unroll 1
      for (int i = 0; i < W::kCount; i += kBatch) {
        uint16_t value[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int row = walk.row + (i + j) * W::kStep;
          value[j] = has_column && row < view.rows ? load_global<uint16_t>(source + view.row(row)) : uint16_t(0);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) store_shared<uint16_t>(walk.address(begin, i + j), value[j]);
      }
    }
  });
}

// And back.
template <int kDim, int kRows, int kThreads, typename View>
__device__ __forceinline__ void store_view(uint32_t begin, const View& view, int first_column) {
  dispatch_width(view.width(), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    using W = Walk<kDim, kRows, kWidth, kThreads>;
    const W walk(thread_index_here());
    if (first_column + walk.column >= view.columns()) return;
    char* target = view.data() + view.column(first_column + walk.column);
#pragma unroll 4
    for (int i = 0; i < W::kCount; ++i) {
      const int row = walk.row + i * W::kStep;
      if (row >= view.rows) break;
      char* pointer = target + view.row(row);
      const uint32_t address = walk.address(begin, i);
      if constexpr (kWidth == 8) {
        store_global<Chunk>(pointer, load_shared<Chunk>(address));
      } else if constexpr (kWidth == 4) {
        const uint64_t high = load_shared<uint32_t>(address + 4);
        store_global<uint64_t>(pointer, high << 32 | load_shared<uint32_t>(address));
      } else if constexpr (kWidth == 2) {
        store_global<uint32_t>(pointer, load_shared<uint32_t>(address));
      } else {
        store_global<uint16_t>(pointer, load_shared<uint16_t>(address));
      }
    }
  });
}

}  // namespace fastvit::cuda
