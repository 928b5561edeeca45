// fastvit_native::attention_* on CUDA: tensors → params → launch on the current stream. The same file serves the
// emulator, as fastvit_emulated::attention_* on CPU tensors.
#include "../cuda/kernels.h"
#include "attention_params.h"
#include "cuda_call.h"

namespace fastvit {
namespace {

void attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                       Tensor& output, Tensor& lse, bool is_causal, double scale) {
  const AttentionParams p = attention_forward_params(query, key, value, bias, output, lse, is_causal, scale);
  const CudaCall call({{query, "query"}, {key, "key"}, {value, "value"}, {bias, "bias"}},
                      {{output, "output"}, {lse, "lse"}});
  call.run(
      p.dtype, [&] { cuda::attention_forward_fp16(p, call.stream()); },
      [&] { cuda::attention_forward_bf16(p, call.stream()); });
}

void attention_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query,
                        const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output,
                        const Tensor& lse, Tensor& grad_query, Tensor& grad_key, Tensor& grad_value, bool is_causal,
                        double scale) {
  const AttentionBackwardParams p = attention_backward_params(grad_output, grad_lse, query, key, value, bias, output,
                                                              lse, grad_query, grad_key, grad_value, is_causal, scale);
  CudaCall call({{query, "query"},
                 {key, "key"},
                 {value, "value"},
                 {bias, "bias"},
                 {output, "output"},
                 {lse, "lse"},
                 {grad_output, "grad_output"},
                 {grad_lse, "grad_lse"}},
                {{grad_query, "grad_query"}, {grad_key, "grad_key"}, {grad_value, "grad_value"}});
  const auto scratch = [&](int64_t floats) { return static_cast<float*>(call.scratch(lse, floats)); };
  call.run(
      p.dtype, [&] { cuda::attention_backward_fp16(p, scratch, call.stream()); },
      [&] { cuda::attention_backward_bf16(p, scratch, call.stream()); });
}

// The form for sm_90a, by name: it runs the call or says why it cannot.
void attention_forward_sm90(const Tensor& query, const Tensor& key, const Tensor& value, Tensor& output, Tensor& lse,
                            double scale) {
  const AttentionParams p = attention_forward_params(query, key, value, std::nullopt, output, lse, false, scale);
  const CudaCall call({{query, "query"}, {key, "key"}, {value, "value"}}, {{output, "output"}, {lse, "lse"}});
  call.run(
      p.dtype, [&] { cuda::attention_forward_sm90_fp16(p, call.stream()); },
      [&] { cuda::attention_forward_sm90_bf16(p, call.stream()); });
}

}  // namespace
}  // namespace fastvit

FASTVIT_CUDA_LIBRARY(m) {
  m.impl("attention_forward", TORCH_BOX(&fastvit::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward));
  m.impl("attention_forward_sm90", TORCH_BOX(&fastvit::attention_forward_sm90));
}
