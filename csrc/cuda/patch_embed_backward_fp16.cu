// Patch embedding backward in half.
#include "patch_embed_backward.cuh"

namespace fastvit::cuda {

// The same for both dtypes; it lives here because it needs the CUDA runtime.
int64_t patch_embed_backward_weight_scratch(const PatchEmbedParams& p) { return weight_scratch(p); }

void patch_embed_backward_weight_fp16(const PatchEmbedParams& p, void* scratch, void* stream) {
  patch_embed_backward_weight_dtype<Half>(p, scratch, stream);
}

void patch_embed_backward_images_fp16(const PatchEmbedParams& p, void* stream) {
  patch_embed_backward_images_dtype<Half>(p, stream);
}

}  // namespace fastvit::cuda
