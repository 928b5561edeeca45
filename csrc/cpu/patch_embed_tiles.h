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
    float *results, *bias;
    auto allocate = [&](Arena& arena) {
      patches = arena.take<BFloat16>(tokens.size * stride);
      weight = arena.take<BFloat16>(packed_size(rows.size, depth()));
      results = arena.take<float>(tokens.size * columns);
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
      tile_product({patches, stride, weight, results, kTilePanel, tokens.size * kTilePanel}, count, num_rows, depth(),
                   false, [&](int64_t column) {
                     const float* panel = results + column * tokens.size;
                     for (int64_t t = 0; t < count; ++t) {
                       store_biased(panel + t * kTilePanel, bias + column, num_rows - column, targets[t] + column);
                     }
                   });
    }
  }

 private:
  int64_t depth() const { return round_up(size_, kTileDepth); }

  // Gathers columns [column, column + num_columns) of the patches, one token per row, zero up to whole steps of k.
  void gather_patches(int64_t first, int64_t count, int64_t column, int64_t num_columns, BFloat16* target,
                      int64_t stride) const {
    const auto with = [&](const auto& copy) {
      for_each_run(first, count, column, num_columns,
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
