// fastvit_native::patch_embed_* on CUDA: tensors → params → launch on the current stream. The same file serves the
// emulator, as fastvit_emulated::patch_embed_* on CPU tensors.
#include "../cuda/kernels.h"
#include "cuda_call.h"
#include "patch_embed_params.h"

namespace fastvit {
namespace {

void patch_embed_forward(const Tensor& images, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& output,
                         const PatchStride& stride) {
  const PatchEmbedParams p = patch_embed_params(images, weight, bias, output, stride);
  const CudaCall call({{images, "images"}, {weight, "weight"}, {bias, "bias"}}, {{output, "output"}});
  call.run(
      p.dtype, [&] { cuda::patch_embed_forward_fp16(p, call.stream()); },
      [&] { cuda::patch_embed_forward_bf16(p, call.stream()); });
}

// Float partial sums, as many as the device wants.
Tensor weight_scratch(const Tensor& grad_output, const PatchEmbedParams& p) {
  const CudaCall call({{grad_output, "grad_output"}}, {});
  int64_t floats = 0;
  const auto count = [&] { floats = cuda::patch_embed_backward_weight_scratch(p); };
  call.run(p.dtype, count, count);
  return torch::stable::new_empty(grad_output, {floats}, ScalarType::Float);
}

void patch_embed_backward_weight(const Tensor& grad_output, const Tensor& images, Tensor& grad_weight,
                                 const std::optional<Tensor>& grad_bias, const PatchStride& stride) {
  const PatchEmbedParams p = patch_embed_params(images, grad_weight, grad_bias, grad_output, stride);
  const Tensor scratch = weight_scratch(grad_output, p);
  const CudaCall call({{grad_output, "grad_output"}, {images, "images"}},
                      {{grad_weight, "grad_weight"}, {grad_bias, "grad_bias"}, {scratch, "scratch"}});
  call.run(
      p.dtype, [&] { cuda::patch_embed_backward_weight_fp16(p, scratch.data_ptr(), call.stream()); },
      [&] { cuda::patch_embed_backward_weight_bf16(p, scratch.data_ptr(), call.stream()); });
}

void patch_embed_backward_images(const Tensor& grad_output, const Tensor& weight, Tensor& grad_images) {
  const PatchEmbedParams p = patch_embed_params(grad_images, weight, std::nullopt, grad_output);
  const CudaCall call({{grad_output, "grad_output"}, {weight, "weight"}}, {{grad_images, "grad_images"}});
  call.run(
      p.dtype, [&] { cuda::patch_embed_backward_images_fp16(p, call.stream()); },
      [&] { cuda::patch_embed_backward_images_bf16(p, call.stream()); });
}

}  // namespace
}  // namespace fastvit

FASTVIT_CUDA_LIBRARY(m) {
  m.impl("patch_embed_forward", TORCH_BOX(&fastvit::patch_embed_forward));
  m.impl("patch_embed_backward_weight", TORCH_BOX(&fastvit::patch_embed_backward_weight));
  m.impl("patch_embed_backward_images", TORCH_BOX(&fastvit::patch_embed_backward_images));
}
