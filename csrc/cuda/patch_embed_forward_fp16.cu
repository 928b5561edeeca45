// Patch embedding forward in half.
#include "patch_embed_forward.cuh"

namespace fastvit::cuda {

void patch_embed_forward_fp16(const PatchEmbedParams& p, void* stream) { patch_embed_forward_dtype<Half>(p, stream); }

}  // namespace fastvit::cuda
