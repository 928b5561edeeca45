// fastvit_native::patch_embed_* on the CPU: tensors → params → tasks over torch's threads.
#include "../checks.h"
#include "../cpu/kernels.h"

namespace fastvit {
namespace {

PatchEmbedParams patch_embed_params(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias,
                                    const Tensor& tokens) {
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
  STD_TORCH_CHECK(images.sizes()[2] % p.patch_height == 0 && images.sizes()[3] % p.patch_width == 0,
                  "images: accepted are multiples of the patch");
  p.rows = images.sizes()[2] / p.patch_height;
  p.columns = images.sizes()[3] / p.patch_width;
  check_shape(weight, "weight", {p.embed_dim, p.in_channels, p.patch_height, p.patch_width});
  check_shape(tokens, "tokens", {p.batch, p.rows * p.columns, p.embed_dim});
  check_cpu(images, "images", images.scalar_type());
  check_cpu(weight, "weight", images.scalar_type());
  check_cpu(tokens, "tokens", images.scalar_type());
  check_rows_contiguous(tokens, "tokens");
  STD_TORCH_CHECK(weight.is_contiguous(), "weight: accepted is a contiguous tensor");
  if (bias.has_value()) {
    check_shape(*bias, "bias", {p.embed_dim});
    check_cpu(*bias, "bias", images.scalar_type());
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

using Tasks = int64_t (*)(const PatchEmbedParams&);
using Kernel = void (*)(const PatchEmbedParams&, int64_t, int64_t);

void run(const PatchEmbedParams& p, Tasks tasks, Kernel kernel) {
  torch::stable::parallel_for(0, tasks(p), 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void patch_embed_forward(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias,
                         Tensor& output) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(patch_embed_params(images, weight, bias, output), kernels.patch_embed_forward_tasks, kernels.patch_embed_forward);
}

void patch_embed_backward_weight(const Tensor& grad_output, const Tensor& images, Tensor& grad_weight,
                                 const std::optional<Tensor>& grad_bias) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(patch_embed_params(images, grad_weight, grad_bias, grad_output), kernels.patch_embed_backward_weight_tasks,
      kernels.patch_embed_backward_weight);
}

void patch_embed_backward_images(const Tensor& grad_output, const Tensor& weight, Tensor& grad_images) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(patch_embed_params(grad_images, weight, std::nullopt, grad_output), kernels.patch_embed_backward_images_tasks,
      kernels.patch_embed_backward_images);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("patch_embed_forward", TORCH_BOX(&fastvit::patch_embed_forward));
  m.impl("patch_embed_backward_weight", TORCH_BOX(&fastvit::patch_embed_backward_weight));
  m.impl("patch_embed_backward_images", TORCH_BOX(&fastvit::patch_embed_backward_images));
}
