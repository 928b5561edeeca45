// fastvit_native::patch_embed_* on the CPU: tensors → params → tasks over torch's threads.
#include "../cpu/kernels.h"
#include "patch_embed_params.h"

namespace fastvit {
namespace {

using Tasks = int64_t (*)(const PatchEmbedParams&);
using Kernel = void (*)(const PatchEmbedParams&, int64_t, int64_t);

void run(const Tensor& images, const PatchEmbedParams& p, Tasks tasks, Kernel kernel) {
  check_cpu(images, "images");
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
  run(images, patch_embed_params(images, grad_weight, grad_bias, grad_output, stride),
      kernels.patch_embed_backward_weight_tasks, kernels.patch_embed_backward_weight);
}

void patch_embed_backward_images(const Tensor& grad_output, const Tensor& weight, Tensor& grad_images) {
  const cpu::KernelTable& kernels = cpu::kernels();
  run(grad_images, patch_embed_params(grad_images, weight, std::nullopt, grad_output),
      kernels.patch_embed_backward_images_tasks, kernels.patch_embed_backward_images);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("patch_embed_forward", TORCH_BOX(&fastvit::patch_embed_forward));
  m.impl("patch_embed_backward_weight", TORCH_BOX(&fastvit::patch_embed_backward_weight));
  m.impl("patch_embed_backward_images", TORCH_BOX(&fastvit::patch_embed_backward_images));
}
