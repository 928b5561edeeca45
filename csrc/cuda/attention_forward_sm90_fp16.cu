// Attention forward for sm_90a in half, and what this form asks of a call.
#include "attention_forward_sm90.cuh"

namespace fastvit::cuda {
namespace {

// Elsewhere than for sm_90a a kernel is compiled to nothing, which takes next to no registers.
bool has_code() {
#ifdef FASTVIT_EMULATOR
  return true;
#else
  constexpr int kRegistersOfNothing = 32;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, attention_forward_sm90<Half, 64, 64, true, 3>), "attributes of a kernel");
  return attributes.numRegs > kRegistersOfNothing;
#endif
}

}  // namespace

std::string attention_forward_sm90_why_not(const AttentionParams& p) {
  const int capability = device_limits().compute_capability;
  if (capability != 90) return "compute capability " + std::to_string(capability) + ", accepted is 90";
  static const bool kHasCode = has_code();  // the same on every device of this capability
  if (!kHasCode) return "this build has no code for sm_90a";
  if (p.head_dim != p.head_dim_v || (p.head_dim != 64 && p.head_dim != 128)) return "accepted are head dims 64 and 128";
  if (p.is_causal || p.bias.type != BiasType::kNone) return "accepted is attention without bias, not causal";
  // Scores of keys that do not exist are −inf before they are scaled, in float.
  if (!(float(p.scale * double(kLog2E)) > 0)) return "accepted are scales > 0 in float32";
  const auto loads = [&](const View4& view, int64_t rows) { return has_tensor_map(view, p.batch, p.num_heads, rows); };
  if (!loads(p.query, p.seqlen_q) || !loads(p.key, p.seqlen_k) || !loads(p.value, p.seqlen_k) ||
      !is_vectorized(p.output, p.head_dim_v)) {
    return "accepted are tensors whose rows begin at multiples of 16 bytes, with no dimension expanded";
  }
  return sizes_why_not(p);
}

void attention_forward_sm90_fp16(const AttentionParams& p, void* stream) {
  attention_forward_sm90_dtype<Half>(p, stream);
}

}  // namespace fastvit::cuda
