// The patch embedding on the CPU: tensors → params → tasks over torch's threads. fastvit_native::patch_embed_* write
// into outputs that the caller allocates, as on every device; fastvit::patch_embed.cpu is the whole public op in one
// call.
#include <algorithm>

#include "../cpu/kernels.h"
#include "outputs_cpu.h"
#include "patch_embed_params.h"

namespace fastvit {
namespace {

using Tasks = int64_t (*)(const PatchEmbedParams&);
using Kernel = void (*)(const PatchEmbedParams&, int64_t, int64_t);

void run(const Tensor& images, const PatchEmbedParams& p, Tasks tasks, Kernel kernel) {
  check_cpu(images, "images");
  if (p.batch * p.rows * p.columns == 0) return;
  torch::stable::parallel_for(0, tasks(p), 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void patch_embed_forward(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& output,
                         const PatchStride& stride) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(images, patch_embed_params(images, weight, bias, output, stride), kernels.patch_embed_forward_tasks,
      kernels.patch_embed_forward);
}

void patch_embed_backward_weight(const Tensor& grad_output, const Tensor& images, Tensor& grad_weight,
                                 const std::optional<Tensor>& grad_bias, const PatchStride& stride) {
  const cpu::KernelTable& kernels = cpu::kernels();
  const PatchEmbedParams p = patch_embed_params(images, grad_weight, grad_bias, grad_output, stride);
  if (p.batch * p.rows * p.columns == 0) {
    torch::stable::zero_(grad_weight);
    if (grad_bias.has_value()) torch::stable::fill_(*grad_bias, 0);
  }
  run(images, p, kernels.patch_embed_backward_weight_tasks, kernels.patch_embed_backward_weight);
}

void patch_embed_backward_images(const Tensor& grad_output, const Tensor& weight, Tensor& grad_images) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(grad_images, patch_embed_params(grad_images, weight, std::nullopt, grad_output),
      kernels.patch_embed_backward_images_tasks, kernels.patch_embed_backward_images);
}

// Images, weight and bias contiguous, the patches tile the images.
Tensor patch_embed(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(images.dim() == 4 && weight.dim() == 4, "images, weight: accepted are four dimensions");
  const auto size = images.sizes(), patch = weight.sizes();
  STD_TORCH_CHECK(patch[2] > 0 && patch[3] > 0, "weight: accepted are sizes of at least 1");
  const int64_t rows = patches_along(size[2], patch[2], patch[2]), columns = patches_along(size[3], patch[3], patch[3]);
  const int64_t tokens = rows * columns, width = patch[0];
  // Strides as torch.empty has them, which counts an empty dimension as one.
  Tensor output =
      empty_cpu({size[0], tokens, width}, {std::max<int64_t>(tokens, 1) * width, width, 1}, images.scalar_type());
  if (size[0] * tokens > 0) patch_embed_forward(images, weight, bias, output, std::nullopt);
  return output;
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("patch_embed_forward", TORCH_BOX(&fastvit::patch_embed_forward));
  m.impl("patch_embed_backward_weight", TORCH_BOX(&fastvit::patch_embed_backward_weight));
  m.impl("patch_embed_backward_images", TORCH_BOX(&fastvit::patch_embed_backward_images));
}

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) { m.impl("patch_embed.cpu", TORCH_BOX(&fastvit::patch_embed)); }
