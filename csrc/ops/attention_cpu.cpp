// fastvit_native::attention_* on the CPU: tensors → params → tasks over torch's threads.
#include "../cpu/attention_threads.h"
#include "attention_params.h"

namespace fastvit {
namespace {

constexpr auto parallel_for = [](int64_t tasks, const auto& f) { torch::stable::parallel_for(0, tasks, 1, f); };

void attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                       Tensor& output, Tensor& lse, bool is_causal, double scale) {
  check_cpu(query, "query");
  const AttentionParams p = attention_forward_params(query, key, value, bias, output, lse, is_causal, scale);
  cpu::attention_forward_over(cpu::kernels(), p, parallel_for);
}

void attention_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query,
                        const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output,
                        const Tensor& lse, Tensor& grad_query, Tensor& grad_key, Tensor& grad_value, bool is_causal,
                        double scale) {
  check_cpu(query, "query");
  const AttentionBackwardParams p = attention_backward_params(grad_output, grad_lse, query, key, value, bias, output,
                                                              lse, grad_query, grad_key, grad_value, is_causal, scale);
  cpu::attention_backward_over(cpu::kernels(), p, torch::stable::get_num_threads(), parallel_for);
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastvit::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward));
}
