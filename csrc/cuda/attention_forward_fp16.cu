// Attention forward in half.
#include "attention_forward.cuh"

namespace fastvit::cuda {

void attention_forward_fp16(const AttentionParams& p, void* stream) { attention_forward_dtype<Half>(p, stream); }

}  // namespace fastvit::cuda
