// Attention backward in bfloat16.
#include "attention_backward.cuh"

namespace fastvit::cuda {

void attention_backward_bf16(const AttentionBackwardParams& p, const Scratch& scratch, void* stream) {
  attention_backward_dtype<BFloat16>(p, scratch, stream);
}

}  // namespace fastvit::cuda
