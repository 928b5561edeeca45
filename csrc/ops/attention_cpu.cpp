// fastvit_native::attention_* on the CPU: tensors → params → tasks over torch's threads.
#include "../checks.h"
#include "../cpu/kernels.h"

namespace fastvit {
namespace {

AttentionBackwardParams attention_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const std::optional<Tensor>& bias, const Tensor& lse, bool is_causal,
                                         double scale) {
  AttentionBackwardParams p;
  p.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "query, key, value: accepted are four dimensions [B, H, N, D]");
  p.batch = query.sizes()[0];
  p.num_heads = query.sizes()[1];
  p.seqlen_q = query.sizes()[2];
  p.head_dim = query.sizes()[3];
  p.seqlen_k = key.sizes()[2];
  p.head_dim_v = value.sizes()[3];
  check_shape(key, "key", {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  check_shape(value, "value", {p.batch, p.num_heads, p.seqlen_k, p.head_dim_v});
  check_shape(lse, "lse", {p.batch, p.num_heads, p.seqlen_q});
  for (const auto& [tensor, name] : {std::pair(query, "query"), std::pair(key, "key"), std::pair(value, "value")}) {
    check_cpu(tensor, name, query.scalar_type());
    check_rows_contiguous(tensor, name);
  }
  check_cpu(lse, "lse", accumulate_type(query.scalar_type()));
  STD_TORCH_CHECK(lse.is_contiguous(), "lse: accepted is a contiguous tensor");
  STD_TORCH_CHECK(p.seqlen_k > 0 && p.head_dim > 0 && p.head_dim_v > 0, "key, value: accepted are sizes of at least 1");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu(), "bias: accepted is a CPU tensor");
    check_shape(*bias, "bias", {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k});
  }
  p.is_causal = is_causal;
  p.scale = scale;
  p.query = view4(query);
  p.key = view4(key);
  p.value = view4(value);
  p.bias = bias_view(bias);
  p.lse = lse.data_ptr();
  return p;
}

void attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                       Tensor& output, Tensor& lse, bool is_causal, double scale) {
  AttentionBackwardParams p = attention_params(query, key, value, bias, lse, is_causal, scale);
  check_shape(output, "output", {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_cpu(output, "output", query.scalar_type());
  check_rows_contiguous(output, "output");
  p.output = view4(output);
  const cpu::KernelTable& kernels = cpu::kernels();
  torch::stable::parallel_for(0, kernels.attention_forward_tasks(p), 1,
                              [&](int64_t begin, int64_t end) { kernels.attention_forward(p, begin, end); });
}

void attention_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query,
                        const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, const Tensor& lse,
                        Tensor& grad_query, Tensor& grad_key, Tensor& grad_value, bool is_causal, double scale) {
  AttentionBackwardParams p = attention_params(query, key, value, bias, lse, is_causal, scale);
  check_shape(grad_output, "grad_output", {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_shape(grad_query, "grad_query", {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
  check_shape(grad_key, "grad_key", {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  check_shape(grad_value, "grad_value", {p.batch, p.num_heads, p.seqlen_k, p.head_dim_v});
  for (const auto& [tensor, name] : {std::pair(grad_output, "grad_output"), std::pair(grad_query, "grad_query"),
                                     std::pair(grad_key, "grad_key"), std::pair(grad_value, "grad_value")}) {
    check_cpu(tensor, name, query.scalar_type());
    check_rows_contiguous(tensor, name);
  }
  if (grad_lse.has_value()) {
    check_shape(*grad_lse, "grad_lse", {p.batch, p.num_heads, p.seqlen_q});
    check_cpu(*grad_lse, "grad_lse", lse.scalar_type());
    STD_TORCH_CHECK(grad_lse->is_contiguous(), "grad_lse: accepted is a contiguous tensor");
    p.grad_lse = grad_lse->data_ptr();
  }
  p.grad_output = view4(grad_output);
  p.grad_query = view4(grad_query);
  p.grad_key = view4(grad_key);
  p.grad_value = view4(grad_value);
  const cpu::KernelTable& kernels = cpu::kernels();
  torch::stable::parallel_for(0, kernels.attention_backward_tasks(p), 1,
                              [&](int64_t begin, int64_t end) { kernels.attention_backward(p, begin, end); });
}

}  // namespace
}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastvit::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward));
}
