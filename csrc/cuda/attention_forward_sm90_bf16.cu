// Attention forward for sm_90a in bfloat16.
#include "attention_forward_sm90.cuh"

namespace fastvit::cuda {

void attention_forward_sm90_bf16(const AttentionParams& p, void* stream) {
  attention_forward_sm90_dtype<BFloat16>(p, stream);
}

}  // namespace fastvit::cuda
