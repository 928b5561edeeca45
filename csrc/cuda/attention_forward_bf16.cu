// Attention forward in bfloat16.
#include "attention_forward.cuh"

namespace fastvit::cuda {

void attention_forward_bf16(const AttentionParams& p, void* stream) { attention_forward_dtype<BFloat16>(p, stream); }

}  // namespace fastvit::cuda
