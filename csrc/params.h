// What a kernel is told: pointers, sizes and strides in elements. No torch type passes this line.
#pragma once

#include <cstdint>

namespace fastvit {

enum class DType { kFloat16, kBFloat16, kFloat32, kFloat64 };

// How the bias of an attention call is stored; kBool means True = take part, the others are added to the scores.
enum class BiasType { kNone, kBool, kFloat16, kBFloat16, kFloat32, kFloat64 };

// A [batch, head, row, column] view whose last dimension is contiguous.
struct View4 {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// The additive or boolean bias, expanded to [B, H, Nq, Nk] by strides (0 where it broadcasts).
struct BiasView {
  const void* data = nullptr;
  BiasType type = BiasType::kNone;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t key_stride = 0;
};

struct AttentionParams {
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t head_dim = 0;
  int64_t head_dim_v = 0;
  DType dtype = DType::kFloat32;
  bool is_causal = false;
  double scale = 1.0;
  View4 query;
  View4 key;
  View4 value;
  BiasView bias;
  View4 output;
  void* lse = nullptr;  // [B, H, Nq] contiguous, float (double for kFloat64)
};

struct AttentionBackwardParams : AttentionParams {
  View4 grad_output;
  const void* grad_lse = nullptr;  // nullptr, or [B, H, Nq] contiguous like lse
  View4 grad_query;
  View4 grad_key;
  View4 grad_value;
};

// images [B, C, H, W] by any strides, and in them rows × columns patches of patch_height × patch_width pixels, one
// every patch_row_step × patch_column_step: the patch's own size tiles the image, less overlaps, more leaves gaps.
struct PatchEmbedParams {
  int64_t batch = 0;
  int64_t in_channels = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t patch_height = 0;
  int64_t patch_width = 0;
  int64_t patch_row_step = 0;
  int64_t patch_column_step = 0;
  int64_t embed_dim = 0;
  DType dtype = DType::kFloat32;
  void* images = nullptr;
  int64_t image_stride = 0;
  int64_t channel_stride = 0;
  int64_t height_stride = 0;
  int64_t width_stride = 0;
  void* weight = nullptr;  // [D, C·Ph·Pw] contiguous
  void* bias = nullptr;    // nullptr or [D]
  void* tokens = nullptr;  // [B, N, D], last dimension contiguous
  int64_t token_batch_stride = 0;
  int64_t token_stride = 0;
};

}  // namespace fastvit
