// Patch embedding forward in bfloat16.
#include "patch_embed_forward.cuh"

namespace fastvit::cuda {

void patch_embed_forward_bf16(const PatchEmbedParams& p, void* stream) {
  patch_embed_forward_dtype<BFloat16>(p, stream);
}

}  // namespace fastvit::cuda
