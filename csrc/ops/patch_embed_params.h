// Tensors of a patch embedding → params, checked; the same on every device.
#pragma once

#include <vector>

#include "../checks.h"

namespace fastvit {

// In pixels from one patch to the next, down and to the right; without one the patches tile the images.
using PatchStride = std::optional<std::vector<int64_t>>;

// Whole patches along `pixels`, as a convolution counts them; none along no pixels.
inline int64_t patches_along(int64_t pixels, int64_t patch, int64_t step) { return (pixels - patch) / step + 1; }

inline PatchEmbedParams patch_embed_params(const Tensor& images, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& tokens,
                                           const PatchStride& stride = {}) {
  STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4, "images, weight: accepted are four dimensions");
  PatchEmbedParams p;
  p.dtype = dtype_of(images, "images");
  p.batch = images.sizes()[0];
  p.in_channels = images.sizes()[1];
  p.embed_dim = weight.sizes()[0];
  p.patch_height = weight.sizes()[2];
  p.patch_width = weight.sizes()[3];
  STD_TORCH_CHECK(p.embed_dim > 0 && p.in_channels > 0 && p.patch_height > 0 && p.patch_width > 0,
                  "weight: accepted are sizes of at least 1");
  p.patch_row_step = p.patch_height;
  p.patch_column_step = p.patch_width;
  if (stride.has_value()) {
    STD_TORCH_CHECK(stride->size() == 2 && (*stride)[0] > 0 && (*stride)[1] > 0,
                    "stride: accepted are two numbers of at least 1");
    STD_TORCH_CHECK(images.sizes()[2] >= p.patch_height && images.sizes()[3] >= p.patch_width,
                    "images: accepted is at least one patch");
    p.patch_row_step = (*stride)[0];
    p.patch_column_step = (*stride)[1];
  } else {
    STD_TORCH_CHECK(images.sizes()[2] % p.patch_height == 0 && images.sizes()[3] % p.patch_width == 0,
                    "images: accepted are multiples of the patch");
  }
  p.rows = patches_along(images.sizes()[2], p.patch_height, p.patch_row_step);
  p.columns = patches_along(images.sizes()[3], p.patch_width, p.patch_column_step);
  check_shape(weight, "weight", {p.embed_dim, p.in_channels, p.patch_height, p.patch_width});
  check_shape(tokens, "tokens", {p.batch, p.rows * p.columns, p.embed_dim});
  check_like(weight, "weight", images, images.scalar_type());
  check_like(tokens, "tokens", images, images.scalar_type());
  check_rows_contiguous(tokens, "tokens");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight: accepted is a contiguous tensor");
  if (bias.has_value()) {
    check_shape(*bias, "bias", {p.embed_dim});
    check_like(*bias, "bias", images, images.scalar_type());
    STD_TORCH_CHECK(bias->is_contiguous(), "bias: accepted is a contiguous tensor");
    p.bias = bias->data_ptr();
  }
  p.images = images.data_ptr();
  p.image_stride = images.stride(0);
  p.channel_stride = images.stride(1);
  p.height_stride = images.stride(2);
  p.width_stride = images.stride(3);
  p.weight = weight.data_ptr();
  p.tokens = tokens.data_ptr();
  p.token_batch_stride = tokens.stride(0);
  p.token_stride = tokens.stride(1);
  return p;
}

}  // namespace fastvit
