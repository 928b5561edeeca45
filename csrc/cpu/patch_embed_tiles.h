// Patch embedding of bfloat16 in AMX tiles; the products are those of patch_embed.h.
#pragma once

#include "patch_embed.h"
#include "tiles.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

class PatchEmbedTiles : public PatchEmbed<BFloat16> {
  // Packed W of a task, beside its patches and sums, in a second-level cache of 2 MiB.
  static constexpr int64_t kWeightElements = 640 * 1024;
  static constexpr int64_t kPatchElements = 24 * 1024;

 public:
  using PatchEmbed<BFloat16>::PatchEmbed;

  // Where there are few tokens, one task holds all their patches and packs few rows of W; else one task packs as much
  // of W as its cache holds, and takes few tokens. Either way a range of tasks prepares the held operand once.
  bool few_tokens() const { return num_tokens() <= kTokenRows; }
  Split forward_tokens() const {
    const int64_t many = min64(max64(kPatchElements / depth() / kTilePanel, 1) * kTilePanel, kTokenRows);
    return {num_tokens(), few_tokens() ? kTokenRows : many, kTilePanel};
  }
  Split forward_rows() const {
    const int64_t many = max64(kWeightElements / depth() / kTilePanel, 1) * kTilePanel;
    return {p_.embed_dim, few_tokens() ? min64(many, 2 * kTilePanel) : many, kTilePanel};
  }

  void forward(int64_t begin, int64_t end) {
    const Split tokens = forward_tokens(), rows = forward_rows();
    const int64_t stride = tile_stride(size_), columns = round_up(rows.size, kTilePanel);
    BFloat16 *patches, *weight;
    float* bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<BFloat16>(tokens.size * stride);
      weight = arena.take<BFloat16>(packed_size(rows.size, depth()));
      bias = arena.take<float>(columns);
    };
    reserve(allocate);
    const TileSession session;
    int64_t loaded = -1, gathered = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row_part = task / tokens.count, part = task % tokens.count;
      const int64_t first = tokens.begin(part), count = tokens.length(part);
      const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
      if (row_part != loaded) {
        pack_transposed(weight_ + row * size_, size_, num_rows, size_, weight);
        for (int64_t d = 0; d < columns; ++d) {
          bias[d] = bias_ == nullptr || d >= num_rows ? 0.0f : widen(bias_[row + d]);
        }
        loaded = row_part;
      }
      if (part != gathered) gather_patches(first, count, 0, size_, patches, stride);
      gathered = part;
      BFloat16* targets[kTokenRows];
      for (int64_t t = 0; t < count; ++t) targets[t] = token(first + t) + row;
      // For writing, two panels before it happens.
      const int64_t fetched = min64(num_rows, 2 * kTilePanel) * int64_t(sizeof(BFloat16));
      for (int64_t t = 0; t < count; ++t) fetch_lines<true>(targets[t], fetched);
      stream_product(patches, stride, weight, count, num_rows, depth(),
                     [&](int64_t first_token, int64_t column, const float* sums) {
                       const Vec<float> low = load(bias + column), high = load(bias + column + kTileSide);
                       const int64_t end_token = min64(first_token + 2 * kTileSide, count);
                       for (int64_t t = first_token; t < end_token; ++t, sums += kTilePanel) {
                         store_panel(load(sums) + low, load(sums + kTileSide) + high, num_rows - column,
                                     targets[t] + column);
                         if (const int64_t next = column + 2 * kTilePanel; next < num_rows) {
                           __builtin_prefetch(targets[t] + next, 1);
                         }
                       }
                     });
    }
  }

  // Sums of a task, and its operands for one step of tokens, in the second-level cache.
  Split token_steps() const { return {num_tokens(), kTokenRows, kTilePanel}; }
  Split columns() const { return {size_, 192, kTilePanel}; }
  // gradient_columns() is the base class's.
  static_assert(kPanel<float> == kTilePanel);
  Split gradient_rows() const { return {p_.embed_dim, 256, kTilePanel}; }

  void backward_weight(int64_t begin, int64_t end) {
    const Split cols = gradient_columns(), rows = gradient_rows(), steps = token_steps();
    const int64_t k = round_up(steps.size, kTileDepth), stride = tile_stride(k), patch_stride = tile_stride(cols.size);
    BFloat16 *patches, *packed, *grad_tokens;
    float *grad_weight, *sums;
    double* grad_bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<BFloat16>(steps.size * patch_stride);
      packed = arena.take<BFloat16>(packed_size(cols.size, k));
      grad_tokens = arena.take<BFloat16>(rows.size * stride);
      grad_weight = arena.take<float>(rows.size * cols.size);
      sums = arena.take<float>(rows.size);
      grad_bias = arena.take<double>(rows.size);
    };
    reserve(allocate);
    const TileSession session;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / rows.count, row_part = task % rows.count;
      const int64_t column = cols.begin(part), num_columns = cols.length(part);
      const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
      for (int64_t d = 0; d < num_rows; ++d) grad_bias[d] = 0;
      for (int64_t step = 0; step < steps.count; ++step) {
        const int64_t first = steps.begin(step), count = steps.length(step);
        const BFloat16 *patch_rows[kTokenRows], *grad_rows[kTokenRows];
        for (int64_t t = 0; t < count; ++t) {
          patch_rows[t] = patches + t * patch_stride;
          grad_rows[t] = token(first + t) + row;
        }
        gather_patches(first, count, column, num_columns, patches, patch_stride);
        pack_rows(patch_rows, count, num_columns, packed);
        transpose_rows(grad_rows, count, num_rows, grad_tokens, stride);
        tile_product({grad_tokens, stride, packed, grad_weight, kTilePanel, rows.size * kTilePanel}, num_rows,
                     num_columns, round_up(count, kTileDepth), step > 0, [](int64_t) {});
        if (part == 0) add_rows(grad_rows, count, num_rows, sums, grad_bias);
      }
      for (int64_t d = 0; d < num_rows; ++d) {
        for (int64_t k = 0; k < num_columns; k += kTilePanel) {
          store_row(grad_weight + k * rows.size + d * kTilePanel, min64(kTilePanel, num_columns - k),
                    weight_ + (row + d) * size_ + column + k);
        }
      }
      if (part == 0 && bias_ != nullptr) {
        for (int64_t d = 0; d < num_rows; ++d) sums[d] = float(grad_bias[d]);
        store_row(sums, num_rows, bias_ + row);
      }
    }
  }

  void backward_images(int64_t begin, int64_t end) {
    const Split cols = columns(), steps = token_steps();
    const int64_t k = round_up(p_.embed_dim, kTileDepth), stride = tile_stride(k);
    const BFloat16** rows;
    BFloat16 *packed, *grad_tokens;
    float* grad_patches;
    auto allocate = [&](Arena& arena) {
      rows = arena.take<const BFloat16*>(p_.embed_dim);
      packed = arena.take<BFloat16>(packed_size(cols.size, k));
      grad_tokens = arena.take<BFloat16>(steps.size * stride);
      grad_patches = arena.take<float>(steps.size * cols.size);
    };
    reserve(allocate);
    const TileSession session;
    int64_t loaded = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / steps.count, step = task % steps.count;
      const int64_t column = cols.begin(part), num_columns = cols.length(part);
      const int64_t first = steps.begin(step), count = steps.length(step);
      if (part != loaded) {
        for (int64_t d = 0; d < p_.embed_dim; ++d) rows[d] = weight_ + d * size_ + column;
        pack_rows(rows, p_.embed_dim, num_columns, packed);
        loaded = part;
      }
      for (int64_t t = 0; t < count; ++t) copy_padded(token(first + t), p_.embed_dim, grad_tokens + t * stride);
      tile_product({grad_tokens, stride, packed, grad_patches, cols.size}, count, num_columns, k, false,
                   [](int64_t) {});
      scatter(grad_patches, cols.size, first, count, column, num_columns);
    }
  }

 private:
  // Adds the sum of the rows to `totals`: in float over one step of tokens, which is exact enough for a result of
  // eight bits, and in double over the steps.
  static void add_rows(const BFloat16* const* rows, int64_t count, int64_t columns, float* sums, double* totals) {
    for (int64_t d = 0; d < columns; ++d) sums[d] = 0;
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t d = 0; d < columns; ++d) sums[d] += widen(rows[t][d]);
    }
    for (int64_t d = 0; d < columns; ++d) totals[d] += double(sums[d]);
  }

  int64_t depth() const { return round_up(size_, kTileDepth); }

  // Gathers columns [column, column + num_columns) of the patches, one token per row, zero up to whole steps of k.
  void gather_patches(int64_t first, int64_t count, int64_t column, int64_t num_columns, BFloat16* target,
                      int64_t stride) const {
    const auto with = [&](const auto& copy) {
      for_each_token_run(first, count, column, num_columns,
                         [&](const BFloat16* pixels, int64_t t, int64_t offset, int64_t run) {
                           copy(pixels, run, target + t * stride + offset);
                         });
    };
    const bool whole = column % p_.patch_width == 0 && num_columns % p_.patch_width == 0;
    if (p_.width_stride != 1) {
      with([&](const BFloat16* pixels, int64_t run, BFloat16* row) {
        for (int64_t i = 0; i < run; ++i) row[i] = pixels[i * p_.width_stride];
      });
    } else if (whole && p_.patch_width == 16) {
      with([](const BFloat16* pixels, int64_t, BFloat16* row) { __builtin_memcpy(row, pixels, 32); });
    } else if (whole && p_.patch_width == 8) {
      with([](const BFloat16* pixels, int64_t, BFloat16* row) { __builtin_memcpy(row, pixels, 16); });
    } else if (whole && p_.patch_width == 4) {
      with([](const BFloat16* pixels, int64_t, BFloat16* row) { __builtin_memcpy(row, pixels, 8); });
    } else {
      with([](const BFloat16* pixels, int64_t run, BFloat16* row) {
        for (int64_t i = 0; i < run; i += 32) {
          const __mmask32 mask = first_lanes(run - i);
          _mm512_mask_storeu_epi16(row + i, mask, _mm512_maskz_loadu_epi16(mask, pixels + i));
        }
      });
    }
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = num_columns; k < round_up(num_columns, kTileDepth); ++k) target[t * stride + k] = {};
    }
  }
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
