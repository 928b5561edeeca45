// Patch embedding as an implicit matrix product: patches are gathered from the image block by block, never as a whole.
//
// With X [tokens][K] the patches, W [D][K] the weight and Y [tokens][D] the tokens:
//   forward          Y^T = W X^T + b        one token per vector lane, W broadcast in place
//   backward weight  dW  = dY^T X           dY broadcast, X as gathered
//   backward images  dX  = dY W             dY broadcast in place, scattered without overlap
#pragma once

#include "arena.h"
#include "gemm.h"

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

constexpr int64_t kWeightRows = 192;        // rows of W per forward task: 192 · 768 · 4 bytes fit the second-level cache
constexpr int64_t kPatchBytes = 512 << 10;  // gathered patches per forward task
constexpr int64_t kPatchColumns = 128;      // columns of X or W per backward task
constexpr int64_t kTokenRows = 256;         // tokens per step of the backward tasks

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
  Split forward_tokens() const {
    int64_t panels = max64(1, min64(8, kPatchBytes / (size_ * W * int64_t(sizeof(T)))));
    return {num_tokens(), panels * W, W};
  }
  Split forward_rows() const { return {p_.embed_dim, kWeightRows, L}; }
  Split token_steps() const { return {num_tokens(), kTokenRows, 1}; }
  Split columns() const { return {size_, kPatchColumns, W}; }
  // Small problems are cut finer, so that every thread has work.
  Split gradient_rows() const {
    return {p_.embed_dim, max64(48, min64(384, p_.embed_dim * columns().count / 16)), L};
  }

  void forward(int64_t begin, int64_t end) {
    const Split tokens = forward_tokens(), rows = forward_rows();
    T *gathered, *panels, *product_lanes, *product_rows, *weight = nullptr;
    T* bias = nullptr;
    const int64_t padded = round_up(size_, L), padded_rows = round_up(rows.size, L);
    auto allocate = [&](Arena& arena) {
      gathered = arena.take<T>(W * padded);
      panels = arena.take<T>(round_up(tokens.size, W) * padded);
      product_lanes = arena.take<T>(padded_rows * W);
      product_rows = arena.take<T>(W * padded_rows);
      bias = arena.take<T>(rows.size);
      if constexpr (!__is_same(In, T)) weight = arena.take<T>(rows.size * size_);
    };
    reserve(allocate);
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / rows.count, row_part = task % rows.count;
      const int64_t first = tokens.begin(part), count = tokens.length(part);
      const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
      if (part != loaded) {
        for (int64_t t = 0; t < count; t += W) gather_lanes(first + t, min64(W, count - t), gathered, panels + t * padded);
        loaded = part;
      }
      const Matrix matrix = weight_rows(row, num_rows, weight);
      for (int64_t d = 0; d < num_rows; ++d) bias[d] = bias_ == nullptr ? T(0) : T(widen(bias_[row + d]));
      for (int64_t t = 0; t < count; t += W) {
        const int64_t lanes = min64(W, count - t);
        const int vectors = int(ceil_div(lanes, L));
        multiply_lanes(matrix, num_rows, vectors, panels + t * padded, product_lanes);
        transpose(product_lanes, W, padded_rows, int64_t(vectors) * L, product_rows, padded_rows);
        for (int64_t i = 0; i < lanes; ++i) {
          T* result = product_rows + i * padded_rows;
          for (int64_t d = 0; d < num_rows; ++d) result[d] += bias[d];
          store_row(result, num_rows, token(first + t + i) + row);
        }
      }
    }
  }

  void backward_weight(int64_t begin, int64_t end) {
    const Split cols = columns(), rows = gradient_rows(), steps = token_steps();
    const int64_t width = round_up(cols.size, L);
    T *patches, *grad_tokens, *grad_weight;
    double* grad_bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<T>(steps.size * width);
      grad_tokens = arena.take<T>(steps.size * rows.size);
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
        for (int64_t t = 0; t < count; ++t) {
          gather(first + t, column, num_columns, patches + t * width);
          for (int64_t k = num_columns; k < width; ++k) patches[t * width + k] = 0;
          T* grads = grad_tokens + t * num_rows;
          load_row(token(first + t) + row, num_rows, T(1), grads);
          // In double: a plain float sum over all tokens would lose digits that torch's pairwise sum keeps.
          if (part == 0) {
            for (int64_t d = 0; d < num_rows; ++d) grad_bias[d] += grads[d];
          }
        }
        product<T, true>(num_rows, num_columns, {grad_tokens, 1, num_rows, patches, width, grad_weight, width, count});
      }
      for (int64_t d = 0; d < num_rows; ++d) {
        store_row(grad_weight + d * width, num_columns, weight_ + (row + d) * size_ + column);
      }
      if (part == 0 && bias_ != nullptr) {
        for (int64_t d = 0; d < num_rows; ++d) grad_tokens[d] = T(grad_bias[d]);
        store_row(grad_tokens, num_rows, bias_ + row);
      }
    }
  }

  void backward_images(int64_t begin, int64_t end) {
    const Split cols = columns(), steps = token_steps();
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
        for (int64_t k = 0; k < num_columns; k += W) {
          const int vectors = int(ceil_div(min64(W, num_columns - k), L));
          panel_product_in_steps<T>(
              here, vectors,
              {grads.data, grads.stride, 1, panel + k, width, grad_patches + t * width + k, width, p_.embed_dim}, false);
        }
        t += here;
      }
      for (int64_t t = 0; t < count; ++t) scatter(grad_patches + t * width, first + t, column, num_columns);
    }
  }

 private:
  struct Matrix {
    const T* data;
    int64_t stride;
  };

  template <class F>
  void reserve(const F& allocate) {
    Arena measure;
    allocate(measure);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena);
  }

  In* token(int64_t index) const {
    return tokens_ + index / per_image_ * p_.token_batch_stride +
           index % per_image_ * p_.token_stride;
  }

  // Calls f(pixels, offset, run) for each run of pixels in columns [column, column + count) of the token's patch.
  template <class F>
  void for_each_run(int64_t index, int64_t column, int64_t count, const F& f) const {
    const int64_t image = index / per_image_, cell = index % per_image_;
    In* corner = images_ + image * p_.image_stride + cell / p_.columns * p_.patch_height * p_.height_stride +
                 cell % p_.columns * p_.patch_width * p_.width_stride;
    int64_t x = column % p_.patch_width, y = column / p_.patch_width % p_.patch_height;
    int64_t channel = column / (p_.patch_width * p_.patch_height);
    for (int64_t offset = 0; offset < count;) {
      const int64_t run = min64(p_.patch_width - x, count - offset);
      f(corner + channel * p_.channel_stride + y * p_.height_stride + x * p_.width_stride, offset, run);
      offset += run;
      x = 0;
      if (++y == p_.patch_height) {
        y = 0;
        ++channel;
      }
    }
  }

  void gather(int64_t index, int64_t column, int64_t count, T* target) const {
    for_each_run(index, column, count, [&](const In* pixels, int64_t offset, int64_t run) {
      if (p_.width_stride == 1) return load_row(pixels, run, T(1), target + offset);
      for (int64_t i = 0; i < run; ++i) target[offset + i] = T(widen(pixels[i * p_.width_stride]));
    });
  }

  void scatter(const T* source, int64_t index, int64_t column, int64_t count) const {
    for_each_run(index, column, count, [&](In* pixels, int64_t offset, int64_t run) {
      if (p_.width_stride == 1) return store_row(source + offset, run, pixels);
      for (int64_t i = 0; i < run; ++i) store_row(source + offset + i, 1, pixels + i * p_.width_stride);
    });
  }

  // Gathers up to W tokens and transposes them into `lanes` [padded][W], zero beyond the data.
  void gather_lanes(int64_t first, int64_t count, T* rows, T* lanes) const {
    const int64_t padded = round_up(size_, L);
    for (int64_t t = 0; t < W; ++t) {
      int64_t filled = t < count ? size_ : 0;
      if (t < count) gather(first + t, 0, size_, rows + t * padded);
      for (int64_t k = filled; k < padded; ++k) rows[t * padded + k] = 0;
    }
    transpose(rows, padded, W, padded, lanes, W);
  }

  // [rows][lanes] = matrix [rows][K] · lanes [K][W]
  void multiply_lanes(Matrix matrix, int64_t rows, int vectors, const T* lanes, T* result) const {
    panel_product_in_steps<T>(rows, vectors, {matrix.data, matrix.stride, 1, lanes, W, result, W, size_}, false);
  }

  Matrix weight_rows(int64_t first, int64_t count, T* buffer) const {
    return widen_rows(weight_ + first * size_, size_, count, size_, buffer);
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

#define FASTVIT_PATCH_EMBED_KERNEL(name, task_count)                                  \
  inline int64_t patch_embed_##name##_tasks(const PatchEmbedParams& p) {              \
    int64_t tasks = 0;                                                                \
    dispatch_dtype(p.dtype, [&](auto tag) {                                           \
      PatchEmbed<typename decltype(tag)::type> op(p);                                 \
      tasks = task_count;                                                             \
    });                                                                               \
    return tasks;                                                                     \
  }                                                                                   \
  inline void patch_embed_##name(const PatchEmbedParams& p, int64_t begin, int64_t end) { \
    dispatch_dtype(p.dtype, [&](auto tag) {                                           \
      PatchEmbed<typename decltype(tag)::type>(p).name(begin, end);                   \
    });                                                                               \
  }

FASTVIT_PATCH_EMBED_KERNEL(forward, op.forward_tokens().count * op.forward_rows().count)
FASTVIT_PATCH_EMBED_KERNEL(backward_weight, op.columns().count * op.gradient_rows().count)
FASTVIT_PATCH_EMBED_KERNEL(backward_images, op.columns().count * op.token_steps().count)
#undef FASTVIT_PATCH_EMBED_KERNEL

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
