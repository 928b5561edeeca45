// Patch embedding backward in bfloat16.
#include "patch_embed_backward.cuh"

namespace fastvit::cuda {

void patch_embed_backward_weight_bf16(const PatchEmbedParams& p, void* scratch, void* stream) {
  patch_embed_backward_weight_dtype<BFloat16>(p, scratch, stream);
}

void patch_embed_backward_images_bf16(const PatchEmbedParams& p, void* stream) {
  patch_embed_backward_images_dtype<BFloat16>(p, stream);
}

}  // namespace fastvit::cuda
