// Attention backward in half.
#include "attention_backward.cuh"

namespace fastvit::cuda {

void attention_backward_fp16(const AttentionBackwardParams& p, const Scratch& scratch, void* stream) {
  attention_backward_dtype<Half>(p, scratch, stream);
}

}  // namespace fastvit::cuda
