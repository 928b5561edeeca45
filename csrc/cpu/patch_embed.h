// Patch embedding as an implicit matrix product: patches are gathered from the image block by block, never as a whole.
//
// With X [tokens][K] the patches, W [D][K] the weight and Y [tokens][D] the tokens:
//   forward          Y  = X W^T + b    X packed as gathered, W transposed once per task
//   backward weight  dW = dY^T X       dY broadcast in place, X as gathered
//   backward images  dX = dY W         dY broadcast in place, the result scattered: patches that tile the image only
// Patches that overlap or leave gaps differ in where a patch begins, and in nothing else.
// On a processor with AMX bfloat16 has a form of its own (patch_embed_tiles.h). With AVX512-BF16 alone the forward
// multiplies bfloat16 pairs as they lie in memory; elsewhere 16-bit inputs are widened on the way in.
#pragma once

#include "arena.h"
#include "pack.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Splits `total` into equal parts of at most `limit`, each a multiple of `unit` but for the last.
struct Split {
  int64_t total, size, count;
  Split(int64_t total, int64_t limit, int64_t unit) : total(total) {
    int64_t parts = ceil_div(total, limit);
    size = round_up(ceil_div(total, parts), unit);
    count = ceil_div(total, size);
  }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t length(int64_t part) const { return min64(size, total - part * size); }
};

// Rows of W per forward task: each further part gathers the patches again. 384 · 768 · 4 bytes are 1.2 MB, read at two
// bytes per cycle.
constexpr int64_t kWeightRows = 384;
constexpr int64_t kForwardTokens = 56;  // tokens per forward task: four full tiles, whose patches stay in cache
constexpr int64_t kSquareRun = 4;       // pixels of a run from which on it is transposed as it is gathered
constexpr int64_t kPatchColumns = 64;   // columns of W per task of the gradient of the images
// Columns and rows of dW per task: each further column part reads dY again, each further row part gathers X again.
constexpr int64_t kGradientColumns = 192;
constexpr int64_t kGradientRows = 256;
constexpr int64_t kTokenRows = 256;  // tokens per step of the backward tasks

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
using PairStep = MultiplyPairs;
#else
constexpr bool kHasPairs = false;
using PairStep = MultiplyLong;
#endif

template <class In>
class PatchEmbed {
  using T = Compute<In>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t W = kPanel<T>;

 public:
  explicit PatchEmbed(const PatchEmbedParams& p)
      : p_(p),
        size_(p.in_channels * p.patch_height * p.patch_width),
        per_image_(p.rows * p.columns),
        images_(static_cast<In*>(p.images)),
        weight_(static_cast<In*>(p.weight)),
        bias_(static_cast<In*>(p.bias)),
        tokens_(static_cast<In*>(p.tokens)) {}

  int64_t num_tokens() const { return p_.batch * per_image_; }
  Split forward_tokens() const { return {num_tokens(), kForwardTokens, 1}; }
  Split forward_rows() const { return {p_.embed_dim, kWeightRows, W}; }
  Split token_steps() const { return {num_tokens(), kTokenRows, 1}; }
  Split columns() const { return {size_, kPatchColumns, W}; }
  Split gradient_columns() const { return {size_, kGradientColumns, W}; }
  Split gradient_rows() const { return {p_.embed_dim, kGradientRows, L}; }

  void forward(int64_t begin, int64_t end) { forward(forward_tokens(), forward_rows(), begin, end); }

  void backward_weight(int64_t begin, int64_t end) {
    const Split cols = gradient_columns(), rows = gradient_rows(), steps = token_steps();
    const int64_t width = round_up(cols.size, L);
    T *patches, *grads, *grad_weight;
    double* grad_bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<T>(steps.size * width);
      grads = arena.take<T>(steps.size * kTileStride<T>);
      grad_weight = arena.take<T>(rows.size * width);
      grad_bias = arena.take<double>(rows.size);
    };
    reserve(allocate);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / rows.count, row_part = task % rows.count;
      const int64_t column = cols.begin(part), num_columns = cols.length(part);
      const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
      for (int64_t i = 0; i < num_rows * width; ++i) grad_weight[i] = 0;
      for (int64_t d = 0; d < num_rows; ++d) grad_bias[d] = 0;
      for (int64_t step = 0; step < steps.count; ++step) {
        const int64_t first = steps.begin(step), count = steps.length(step);
        gather(first, count, column, num_columns, patches, width);
        const In* sources[kTokenRows];
        for_each_token(first, count, [&](int64_t t, In*, In* token) {
          sources[t] = token + row;
          for (int64_t k = num_columns; k < width; ++k) patches[t * width + k] = 0;
          // In double: a plain float sum over all tokens would lose digits that torch's pairwise sum keeps.
          if (part > 0) return;
          for (int64_t d = 0; d < num_rows; ++d) grad_bias[d] += double(widen(sources[t][d]));
        });
        for_each_tile(num_rows, [&](int64_t d, int64_t length, int64_t) {
          for (int64_t t = 0; t < count; ++t) {
            for (int64_t r = 0; r < length; r += L) {
              store(grads + t * kTileStride<T> + r, load_first(sources[t] + d + r, length - r));
            }
          }
          product<T, true, PackedTile<T>>(length, num_columns,
                                          {grads, 0, 0, patches, width, grad_weight + d * width, width, count});
        });
      }
      for (int64_t d = 0; d < num_rows; ++d) {
        store_row(grad_weight + d * width, num_columns, weight_ + (row + d) * size_ + column);
      }
      if (part == 0 && bias_ != nullptr) {
        for (int64_t d = 0; d < num_rows; ++d) grad_weight[d] = T(grad_bias[d]);
        store_row(grad_weight, num_rows, bias_ + row);
      }
    }
  }

  void backward_images(int64_t begin, int64_t end) { backward_images(token_steps(), columns(), begin, end); }

 protected:
  struct Matrix {
    const T* data;
    int64_t stride;
  };

  // The same for tasks of other sizes: at most kTokenRows tokens, and multiples of W rows or columns.
  void forward(const Split& tokens, const Split& rows, int64_t begin, int64_t end) {
    if constexpr (kHasPairs && __is_same(In, BFloat16)) {
      // An odd patch would end in half a pair.
      if (size_ % 2 == 0) return forward_units<BFloat16, PairStep>(tokens, rows, begin, end);
    }
    forward_units<T, MultiplyLong>(tokens, rows, begin, end);
  }

  void backward_images(const Split& steps, const Split& cols, int64_t begin, int64_t end) {
    const int64_t width = round_up(cols.size, L);
    T *panel, *grad_tokens = nullptr, *grad_patches;
    auto allocate = [&](Arena& arena) {
      panel = arena.take<T>(p_.embed_dim * width);
      grad_patches = arena.take<T>(steps.size * width);
      if constexpr (!__is_same(In, T)) grad_tokens = arena.take<T>(steps.size * p_.embed_dim);
    };
    reserve(allocate);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / steps.count, step = task % steps.count;
      const int64_t column = cols.begin(part), num_columns = cols.length(part);
      const int64_t first = steps.begin(step), count = steps.length(step);
      if (part != loaded) {
        for (int64_t d = 0; d < p_.embed_dim; ++d) {
          load_row(weight_ + d * size_ + column, num_columns, T(1), panel + d * width);
          for (int64_t k = num_columns; k < width; ++k) panel[d * width + k] = 0;
        }
        loaded = part;
      }
      for (int64_t t = 0; t < count;) {
        // Rows of one image are evenly spaced; the next image may lie elsewhere.
        const int64_t here = min64(count - t, per_image_ - (first + t) % per_image_);
        const Matrix grads = token_rows(first + t, here, grad_tokens);
        product<T, false>(here, num_columns,
                          {grads.data, grads.stride, 1, panel, width, grad_patches + t * width, width, p_.embed_dim});
        t += here;
      }
      scatter(grad_patches, width, first, count, column, num_columns);
    }
  }

  // The forward pass over units of 32 or 64 bits: one element of the compute type, or a pair of bfloat16.
  template <class Element, class Step>
  void forward_units(const Split& tokens, const Split& rows, int64_t begin, int64_t end) {
    constexpr int64_t kPerUnit = int64_t(sizeof(T) / sizeof(Element));
    const int64_t units = size_ / kPerUnit, padded = round_up(units, L);
    T *patches, *gathered, *weight, *results, *bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<T>(PackedMatrix<T>::size(tokens.size, units));
      gathered = arena.take<T>(max64(kTileRows, L) * padded);
      weight = arena.take<T>(rows.size * padded);
      results = arena.take<T>(tokens.size * W);
      bias = arena.take<T>(rows.size);
    };
    reserve(allocate);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / tokens.count, part = task % tokens.count;
      const int64_t first = tokens.begin(part), count = tokens.length(part);
      const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
      if (row_part != loaded) {
        transpose_weight<Element>(row, num_rows, units, gathered, weight);
        for (int64_t d = 0; d < num_rows; ++d) bias[d] = bias_ == nullptr ? T(0) : T(widen(bias_[row + d]));
        for (int64_t d = num_rows; d < rows.size; ++d) bias[d] = 0;
        loaded = row_part;
      }
      const PackedMatrix<T> packed{patches, count, units};
      for_each_tile(count, [&](int64_t from, int64_t length, int64_t tile) {
        if constexpr (kPerUnit == 1) {
          if (p_.width_stride == 1 && p_.patch_width >= kSquareRun) {
            return gather_transposed(first + from, length, packed.tile(tile), kTileStride<T>);
          }
        }
        gather(first + from, length, 0, size_, reinterpret_cast<Element*>(gathered), padded * kPerUnit);
        load_transposed(gathered, padded, length, length, units, Unscaled(), packed.tile(tile), kTileStride<T>);
      });
      for (int64_t d = 0; d < num_rows; d += W) {
        const int64_t lanes = min64(W, num_rows - d);
        const int vectors = int(ceil_div(lanes, L));
        packed_product<T, false, Step>(packed, count, 0, units, vectors, weight + d * padded, results);
        for_each_token(first, count, [&](int64_t t, In*, In* token) {
          for (int v = 0; v < vectors; ++v) {
            store_first(load(results + t * W + v * L) + load(bias + d + v * L), lanes - v * L, token + row + d + v * L);
          }
        });
      }
    }
  }

  // W [rows][K] → panels of [K][W] units, zero beyond the rows. `pairs` is scratch for L rows of bfloat16 pairs.
  template <class Element>
  void transpose_weight(int64_t first, int64_t count, int64_t units, T* pairs, T* panels) const {
    const int64_t padded = round_up(units, L);
    for (int64_t d = 0; d < count; d += L) {
      T* panel = panels + d / W * W * padded + d % W;
      const In* source = weight_ + (first + d) * size_;
      const int64_t rows = min64(L, count - d);
      if constexpr (__is_same(Element, T)) {
        load_transposed(source, size_, rows, count - d, units, Unscaled(), panel, W);
      } else {
        for (int64_t i = 0; i < rows; ++i) __builtin_memcpy(pairs + i * padded, source + i * size_, size_t(units) * 4);
        load_transposed(pairs, padded, rows, rows, units, Unscaled(), panel, W);
      }
    }
  }

  template <class F>
  void reserve(const F& allocate) {
    Arena measure;
    allocate(measure);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena);
  }

  In* token(int64_t index) const {
    return tokens_ + index / per_image_ * p_.token_batch_stride + index % per_image_ * p_.token_stride;
  }

  // Calls f(t, corner, token) for the tokens first + t, t in [0, count): the first pixel of its patch, and the token.
  template <class F>
  void for_each_token(int64_t first, int64_t count, const F& f) const {
    int64_t image = first / per_image_, cell = first % per_image_;
    int64_t y = cell / p_.columns, x = cell % p_.columns;
    for (int64_t t = 0; t < count; ++t) {
      f(t,
        images_ + image * p_.image_stride + y * p_.patch_row_step * p_.height_stride +
            x * p_.patch_column_step * p_.width_stride,
        tokens_ + image * p_.token_batch_stride + cell * p_.token_stride);
      ++cell;
      if (++x < p_.columns) continue;
      x = 0;
      if (++y < p_.rows) continue;
      y = cell = 0;
      ++image;
    }
  }

  // Calls f(pixel, offset, run) for each run of neighbouring pixels in columns [column, column + num_columns) of a
  // patch: where it begins, from the corner of the patch and from the first column, and its length.
  template <class F>
  void for_each_run(int64_t column, int64_t num_columns, const F& f) const {
    int64_t x = column % p_.patch_width, y = column / p_.patch_width % p_.patch_height;
    int64_t channel = column / (p_.patch_width * p_.patch_height);
    for (int64_t offset = 0; offset < num_columns;) {
      const int64_t run = min64(p_.patch_width - x, num_columns - offset);
      f(channel * p_.channel_stride + y * p_.height_stride + x * p_.width_stride, offset, run);
      offset += run;
      x = 0;
      if (++y == p_.patch_height) {
        y = 0;
        ++channel;
      }
    }
  }

  // Calls f(pixels, t, offset, run) for each token [first, first + count) and each run of its patch. The tokens are the
  // inner loop: theirs are neighbouring pixels of one image row, which is the order in which memory is read ahead.
  template <class F>
  void for_each_token_run(int64_t first, int64_t count, int64_t column, int64_t num_columns, const F& f) const {
    In* corners[kTokenRows];
    for_each_token(first, count, [&](int64_t t, In* corner, In*) { corners[t] = corner; });
    for_each_run(column, num_columns, [&](int64_t pixel, int64_t offset, int64_t run) {
      for (int64_t t = 0; t < count; ++t) f(corners[t] + pixel, t, offset, run);
    });
  }

  // Copies, or widens, a run of elements. Runs are as short as a patch is wide: no call, and whole vectors while they
  // last.
  template <class Element>
  static void copy_run(const In* source, int64_t count, Element* target) {
    if constexpr (!__is_same(In, Element)) {
      load_row(source, count, T(1), target);
    } else {
      constexpr int64_t kBytes = 16, kStep = kBytes / int64_t(sizeof(Element));
      int64_t i = 0;
      for (; i + kStep <= count; i += kStep) __builtin_memcpy(target + i, source + i, kBytes);
      for (; i < count; ++i) target[i] = source[i];
    }
  }

  // Gathers columns of the patches of consecutive tokens into `target`, one token per row.
  template <class Element>
  void gather(int64_t first, int64_t count, int64_t column, int64_t num_columns, Element* target,
              int64_t target_stride) const {
    for_each_token_run(first, count, column, num_columns,
                       [&](const In* pixels, int64_t t, int64_t offset, int64_t run) {
                         Element* row = target + t * target_stride + offset;
                         if (p_.width_stride == 1) return copy_run(pixels, run, row);
                         for (int64_t i = 0; i < run; ++i) copy_run(pixels + i * p_.width_stride, 1, row + i);
                       });
  }

  // Gathers the whole patches of consecutive tokens, at most a tile of them, one token per column.
  void gather_transposed(int64_t first, int64_t count, T* target, int64_t target_stride) const {
    const In* corners[kTileStride<T>];
    for_each_token(first, count, [&](int64_t t, In* corner, In*) { corners[t] = corner; });
    for_each_run(0, size_, [&](int64_t pixel, int64_t offset, int64_t run) {
      for (int64_t c = 0; c < run; c += L) {
        for (int64_t r = 0; r < count; r += L) {
          load_square<false, In>([&](int64_t t) { return corners[r + t] + pixel + c; }, count - r, run - c, Unscaled(),
                                 target + (offset + c) * target_stride + r, target_stride);
        }
      }
    });
  }

  void scatter(const T* source, int64_t source_stride, int64_t first, int64_t count, int64_t column,
               int64_t num_columns) const {
    for_each_token_run(first, count, column, num_columns, [&](In* pixels, int64_t t, int64_t offset, int64_t run) {
      const T* row = source + t * source_stride + offset;
      if (p_.width_stride == 1) return store_row(row, run, pixels);
      for (int64_t i = 0; i < run; ++i) store_row(row + i, 1, pixels + i * p_.width_stride);
    });
  }

  // Tokens of one image only: those are evenly spaced.
  Matrix token_rows(int64_t first, int64_t count, T* buffer) const {
    return widen_rows(token(first), p_.token_stride, count, p_.embed_dim, buffer);
  }

  static Matrix widen_rows(const In* source, int64_t stride, int64_t count, int64_t columns, T* buffer) {
    if constexpr (__is_same(In, T)) {
      return {source, stride};
    } else {
      for (int64_t r = 0; r < count; ++r) load_row(source + r * stride, columns, T(1), buffer + r * columns);
      return {buffer, columns};
    }
  }

  const PatchEmbedParams& p_;
  const int64_t size_;       // elements of a patch
  const int64_t per_image_;  // tokens of an image
  In *images_, *weight_, *bias_, *tokens_;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
