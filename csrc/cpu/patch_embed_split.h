// Patch embedding of float and half in AMX tiles, every element split into bfloat16 parts (split.h); the products are
// those of patch_embed.h.
#pragma once

#include "patch_embed.h"
#include "split.h"

#if defined(__AMX_BF16__)

namespace fastvit::cpu::FASTVIT_CAPABILITY {

template <class In>
class PatchEmbedSplit : public PatchEmbed<In> {
  using Base = PatchEmbed<In>;
  static constexpr int P = kParts<In>;
  using Operand = SplitMatrix<P>;
  // The weight's part of a task, and the tokens' beside it, in a second-level cache of 2 MiB.
  static constexpr int64_t kWeightBytes = 1536 * 1024, kTokenBytes = 192 * 1024;
  // The deepest operands to hold, of tokens and of the weight, and the parts of deeper ones.
  static constexpr int64_t kTokenDepth = 768, kWeightDepth = 1024, kPartDepth = 384;
  // Of the gradient of the weight: tokens per step, and tasks that share the packed gradient of the tokens.
  static constexpr int64_t kStepTokens = 128, kRun = 4;

 public:
  using Base::Base, Base::num_tokens, Base::gradient_columns, Base::gradient_rows;

  Split forward_tokens() const { return token_parts(p_.embed_dim, size_); }
  Split forward_rows() const { return weight_parts(p_.embed_dim, size_); }
  Split token_steps() const { return token_parts(size_, p_.embed_dim); }
  Split columns() const { return weight_parts(size_, p_.embed_dim); }

  void forward(int64_t begin, int64_t end) {
    const Split tokens = forward_tokens(), rows = forward_rows();
    multiply_tokens(
        tokens, rows, size_, begin, end,
        [&](int64_t first, int64_t count, int64_t k, int64_t depth, const Operand& target, Range& range) {
          for_each_block(first, count, kTileSide, k, depth,
                         [&](int64_t t, int64_t here, int64_t column, int64_t columns, const auto& at) {
                           split_lanes<P>(here, columns, at, target.tile(t, column), range);
                         });
        },
        [&](int64_t row, int64_t count, int64_t k, int64_t depth, const Operand& target, Range& range) {
          split_b_transposed(weight_ + row * size_ + k, size_, count, depth, 1.0f, target, range);
        },
        [&](int64_t first, int64_t count, int64_t row, int64_t lanes, const float* panel) {
          write_tokens(first, count, row, lanes, panel);
        },
        [&](int64_t task) { Base::forward(tokens, rows, task, task + 1); });
  }

  void backward_images(int64_t begin, int64_t end) {
    const Split tokens = token_steps(), cols = columns();
    multiply_tokens(
        tokens, cols, p_.embed_dim, begin, end,
        [&](int64_t first, int64_t count, int64_t k, int64_t depth, const Operand& target, Range& range) {
          for (int64_t t = 0; t < count; t += kTileSide) {
            const int64_t here = min64(kTileSide, count - t);
            const In* sources[kTileSide];
            for (int64_t i = 0; i < here; ++i) sources[i] = this->token(first + t + i) + k;
            const auto at = [&](int64_t i, int64_t d) { return sources[i] + d; };
            split_lanes<P>(here, depth, at, target.tile(t, 0), range);
          }
        },
        [&](int64_t column, int64_t count, int64_t k, int64_t depth, const Operand& target, Range& range) {
          for (int64_t d = 0; d < depth; d += kTileDepth) {
            const In* corner = weight_ + (k + d) * size_ + column;
            const auto at = [&](int64_t i, int64_t lane) { return corner + i * size_ + lane; };
            split_depth<P>(min64(kTileDepth, depth - d), count, at, target.tile(0, d), target.steps * Operand::kStep,
                           range);
          }
        },
        [&](int64_t first, int64_t count, int64_t column, int64_t lanes, const float* panel) {
          this->scatter(panel, kTilePanel, first, count, column, lanes);
        },
        [&](int64_t task) { Base::backward_images(tokens, cols, task, task + 1); });
  }

  // Row parts come first, other than in the base class: the gradient of the tokens, whose packing is a transpose, is
  // packed once for a run of tasks.
  void backward_weight(int64_t begin, int64_t end) {
    const Split cols = gradient_columns(), rows = gradient_rows();
    for (int64_t task = begin; task < end;) {
      const int64_t row_part = task / cols.count, part = task % cols.count;
      const int64_t parts = min64(min64(end - task, cols.count - part), kRun);
      const unsigned fit = run_weight(rows, cols, row_part, part, parts);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t plain = (part + i) * rows.count + row_part;
        if ((fit >> i & 1) == 0) Base::backward_weight(plain, plain + 1);
      }
      task += parts;
    }
  }

 private:
  using Base::p_, Base::size_, Base::weight_, Base::bias_;

  static int64_t lanes_within(int64_t bytes, int64_t depth) {
    return max64(bytes / (ceil_div(depth, kTileDepth) * Operand::kStep * 2 / kTileSide) / kTilePanel, 1) * kTilePanel;
  }
  // Either one task holds many tokens, and packs little of the weight; or it packs as much of the weight as its cache
  // holds, and takes few tokens. A range of tasks prepares the held operand once, and the other one again for each part
  // of the held one: the form that packs less is taken, and packing the weight, in forward a transpose, counts half as
  // much again.
  bool hold_tokens(int64_t total, int64_t depth) const {
    const int64_t parts = ceil_div(total, lanes_within(kWeightBytes, depth));
    return 3 * total * (ceil_div(num_tokens(), kTokenRows) - 1) <= 2 * num_tokens() * (parts - 1);
  }
  // Whether a task holds neither, because what it would hold is too deep: both are packed in parts of k.
  bool hold_none(int64_t total, int64_t depth) const {
    return depth > (hold_tokens(total, depth) ? kTokenDepth : kWeightDepth);
  }
  Split depth_parts(int64_t total, int64_t depth) const {
    return {depth, hold_none(total, depth) ? kPartDepth : depth, kTileDepth};
  }
  Split token_parts(int64_t total, int64_t depth) const {
    const bool many = hold_none(total, depth) || hold_tokens(total, depth);
    return {num_tokens(), many ? kTokenRows : min64(lanes_within(kTokenBytes, depth), kTokenRows), kTilePanel};
  }
  Split weight_parts(int64_t total, int64_t depth) const {
    if (hold_none(total, depth)) return {total, num_tokens() <= kTokenRows ? 128 : 256, kTilePanel};
    const int64_t many = lanes_within(kWeightBytes, depth);
    return {total, hold_tokens(total, depth) ? min64(many, 2 * kTilePanel) : many, kTilePanel};
  }

  // Products of what tokens have with a weight; pack_tokens(first, count, k, depth, operand, range) packs a part of the
  // one, pack_weight the same of the other, and write(first, count, column, lanes, panel) takes 32 columns of results.
  // Where an operand does not fit the tiles, plain(task) does the whole task.
  template <class PackTokens, class PackWeight, class Write, class Plain>
  void multiply_tokens(const Split& tokens, const Split& cols, int64_t depth, int64_t begin, int64_t end,
                       const PackTokens& pack_tokens, const PackWeight& pack_weight, const Write& write,
                       const Plain& plain) {
    const Split depths = depth_parts(cols.total, depth);
    Operand left, right;
    float* results;
    const auto allocate = [&](Arena& arena) {
      left = Operand::take(arena, tokens.size, depths.size);
      right = Operand::take(arena, cols.size, depths.size);
      results = arena.take<float>(tokens.size * cols.size);
      take_gathered(arena);
    };
    this->reserve(allocate);
    const TileSession session;
    const bool outer_tokens = hold_tokens(cols.total, depth);
    int64_t held_tokens = -1, held_weight = -1;
    Range token_range, weight_range;
    for (int64_t task = begin; task < end; ++task) {
      // The parts of what is held come first, so that each is packed once.
      const int64_t col_part = outer_tokens ? task % cols.count : task / tokens.count;
      const int64_t part = outer_tokens ? task / cols.count : task % tokens.count;
      const int64_t first = tokens.begin(part), count = tokens.length(part);
      const int64_t column = cols.begin(col_part), num_columns = cols.length(col_part);
      const bool whole = depths.count == 1, same_tokens = whole && part == held_tokens;
      const bool same_weight = whole && col_part == held_weight;
      if (!same_tokens) token_range = {};
      if (!same_weight) weight_range = {};
      for (int64_t i = 0; i < depths.count; ++i) {
        const int64_t k = depths.begin(i), here = depths.length(i);
        if (!same_weight) pack_weight(column, num_columns, k, here, right, weight_range);
        if (!same_tokens) pack_tokens(first, count, k, here, left, token_range);
        for (int64_t lane = 0; lane < num_columns; lane += kTilePanel) {
          split_panel(left, right.from(lane, 0), count, min64(kTilePanel, num_columns - lane),
                      ceil_div(here, kTileDepth), i > 0, results + lane * tokens.size);
        }
      }
      held_weight = col_part;
      held_tokens = part;
      if (!token_range.fits() || !weight_range.fits()) {
        plain(col_part * tokens.count + part);
        // Its scratch was ours.
        this->reserve(allocate);
        held_tokens = held_weight = -1;
        continue;
      }
      for (int64_t lane = 0; lane < num_columns; lane += kTilePanel) {
        write(first, count, column + lane, min64(kTilePanel, num_columns - lane), results + lane * tokens.size);
      }
    }
  }

  // The gradient of the weight for one part of its rows and up to kRun of its columns. Returns a bit for each of the
  // latter: whether it fits the tiles; only then it is written.
  unsigned run_weight(const Split& rows, const Split& cols, int64_t row_part, int64_t first_part, int64_t parts) {
    const Split steps{num_tokens(), kStepTokens, kTileDepth};
    const int64_t row = rows.begin(row_part), num_rows = rows.length(row_part);
    Operand grads, patches;
    float* sums;
    double* grad_bias;
    const auto allocate = [&](Arena& arena) {
      grads = Operand::take(arena, rows.size, steps.size);
      patches = Operand::take(arena, cols.size, steps.size);
      take_gathered(arena);
      sums = arena.take<float>(round_up(rows.size, kTileSide) * cols.size * parts);
      grad_bias = arena.take<double>(rows.size);
    };
    this->reserve(allocate);
    const int64_t panel_size = round_up(rows.size, kTileSide) * kTilePanel;
    for (int64_t d = 0; d < num_rows; ++d) grad_bias[d] = 0;
    const TileSession session;
    Range grad_range, patch_range[kRun];
    for (int64_t step = 0; step < steps.count; ++step) {
      const int64_t first = steps.begin(step), count = steps.length(step);
      split_gradient(first, count, row, num_rows, grads, grad_range);
      if (first_part == 0) add_gradient(first, count, row, num_rows, grad_bias);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t column = cols.begin(first_part + i), num_columns = cols.length(first_part + i);
        for_each_block(first, count, kTileDepth, column, num_columns,
                       [&](int64_t t, int64_t here, int64_t k, int64_t columns, const auto& at) {
                         split_depth<P>(here, columns, at, patches.tile(k, t), patches.steps * Operand::kStep,
                                        patch_range[i]);
                       });
        for (int64_t lane = 0; lane < num_columns; lane += kTilePanel) {
          split_panel(grads, patches.from(lane, 0), num_rows, min64(kTilePanel, num_columns - lane),
                      ceil_div(count, kTileDepth), step > 0, sums + (i * cols.size + lane) / kTilePanel * panel_size);
        }
      }
    }
    unsigned fit = 0;
    for (int64_t i = 0; i < parts && grad_range.fits(); ++i) {
      if (!patch_range[i].fits()) continue;
      fit |= 1u << i;
      write_gradient(row, num_rows, cols.begin(first_part + i), cols.length(first_part + i),
                     sums + i * cols.size / kTilePanel * panel_size, panel_size);
    }
    if ((fit & 1) != 0 && first_part == 0 && bias_ != nullptr) {
      for (int64_t d = 0; d < num_rows; ++d) bias_[row + d] = narrow<In>(float(grad_bias[d]));
    }
    return fit;
  }

  // Packs the transpose of rows of tokens' gradients, an operand A: lanes are their columns.
  void split_gradient(int64_t first, int64_t count, int64_t row, int64_t num_rows, const Operand& target,
                      Range& range) const {
    for (int64_t t = 0; t < count; t += kTileDepth) {
      const In* sources[kTileDepth];
      for (int64_t i = 0; i < kTileDepth; ++i) sources[i] = t + i < count ? this->token(first + t + i) + row : nullptr;
      for (int64_t lane = 0; lane < num_rows; lane += kTileSide) {
        alignas(64) float lows[16][16];
        Vec<float> block[16];
        load_transposed_rows(sources, lane, num_rows - lane, block);
        for (int i = 0; i < 16; ++i) store(lows[i], block[i]);
        load_transposed_rows(sources + kTileSide, lane, num_rows - lane, block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          split_loaded<P>(load(lows[i]), block[i], target.tile(lane, t) + i * kTileDepth, range);
        }
      }
    }
  }

  [[gnu::always_inline]] static void load_transposed_rows(const In* const* rows, int64_t column, int64_t columns,
                                                          Vec<float> (&block)[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      block[i] = rows[i] != nullptr ? load_first(rows[i] + column, columns) : Vec<float>{};
    }
    transpose_step<float, 1>(block);
  }

  void add_gradient(int64_t first, int64_t count, int64_t row, int64_t num_rows, double* totals) const {
    for (int64_t t = 0; t < count; ++t) {
      const In* source = this->token(first + t) + row;
      for (int64_t d = 0; d < num_rows; ++d) totals[d] += double(widen(source[d]));
    }
  }

  // Whether the runs of a patch are whole vectors, which are split where they lie.
  bool in_place() const { return p_.width_stride == 1 && p_.patch_width % kTileSide == 0; }

  void take_gathered(Arena& arena) {
    if (in_place()) {
      offsets_ = arena.take<int64_t>(size_ / kTileSide);
    } else {
      gathered_ = arena.take<In>(kTileDepth * kGathered);
    }
  }

  // Calls pack(t, count, k, columns, at) for blocks of at most `group` tokens and some columns of their patches:
  // at(i, j) points to elements from column k + j on, up to the next multiple of 16, of token t + i.
  template <class Pack>
  void for_each_block(int64_t first, int64_t count, int64_t group, int64_t column, int64_t num_columns,
                      const Pack& pack) const {
    if (in_place()) {
      const In* corners[kTokenRows];
      this->for_each_token(first, count, [&](int64_t t, In* corner, In*) { corners[t] = corner; });
      this->for_each_run(column, num_columns, [&](int64_t pixel, int64_t offset, int64_t run) {
        for (int64_t i = 0; i < run; i += kTileSide) offsets_[(offset + i) / kTileSide] = pixel + i;
      });
      for (int64_t t = 0; t < count; t += group) {
        pack(t, min64(group, count - t), 0, num_columns,
             [&](int64_t i, int64_t k) { return corners[t + i] + offsets_[k / kTileSide]; });
      }
      return;
    }
    for (int64_t t = 0; t < count; t += group) {
      const int64_t here = min64(group, count - t);
      for (int64_t k = 0; k < num_columns; k += kGathered) {
        const int64_t columns = min64(kGathered, num_columns - k);
        gather_part(first + t, here, column + k, columns);
        pack(t, here, k, columns, [&](int64_t i, int64_t j) { return gathered_ + i * kGathered + j; });
      }
    }
  }

  void write_tokens(int64_t first, int64_t count, int64_t row, int64_t lanes, const float* panel) const {
    Vec<float> bias[2] = {};
    for (int v = 0; v < 2 && bias_ != nullptr; ++v) {
      bias[v] = load_first(bias_ + row + v * kTileSide, lanes - v * kTileSide);
    }
    this->for_each_token(first, count, [&](int64_t t, In*, In* token) {
      for (int v = 0; v < 2; ++v) {
        store_first(load(panel + t * kTilePanel + v * kTileSide) + bias[v], lanes - v * kTileSide,
                    token + row + v * kTileSide);
      }
    });
  }

  void write_gradient(int64_t row, int64_t num_rows, int64_t column, int64_t num_columns, const float* sums,
                      int64_t panel_size) const {
    for (int64_t d = 0; d < num_rows; ++d) {
      for (int64_t k = 0; k < num_columns; k += kTileSide) {
        const float* source = sums + k / kTilePanel * panel_size + d * kTilePanel + k % kTilePanel;
        store_first(load(source), num_columns - k, weight_ + (row + d) * size_ + column + k);
      }
    }
  }

  // Gathers columns of patches into `gathered_`, one token per row, in whole vectors where runs are longer than half
  // of one.
  void gather_part(int64_t first, int64_t count, int64_t column, int64_t num_columns) const {
    if (p_.width_stride != 1 || p_.patch_width <= kTileSide / 2) {
      return this->gather(first, count, column, num_columns, gathered_, kGathered);
    }
    this->for_each_token_run(first, count, column, num_columns,
                             [&](const In* pixels, int64_t t, int64_t offset, int64_t run) {
                               In* row = gathered_ + t * kGathered + offset;
                               for (int64_t i = 0; i < run; i += kTileSide) {
                                 copy_first(pixels + i, min64(run - i, kTileSide), row + i);
                               }
                             });
  }

  static void copy_first(const In* source, int64_t count, In* target) {
    const __mmask16 mask = __mmask16(first_lanes(count));
    if constexpr (__is_same(In, float)) {
      _mm512_mask_storeu_ps(target, mask, _mm512_maskz_loadu_ps(mask, source));
    } else {
      _mm256_mask_storeu_epi16(target, mask, _mm256_maskz_loadu_epi16(mask, source));
    }
  }

  static constexpr int64_t kGathered = 192;  // columns
  In* gathered_ = nullptr;
  int64_t* offsets_ = nullptr;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY

#endif
