// Tensors of an attention call → params, checked; the same on every device.
#pragma once

#include "../checks.h"

namespace fastvit {

inline AttentionBackwardParams attention_params(const Tensor& query, const Tensor& key, const Tensor& value,
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
    check_like(tensor, name, query, query.scalar_type());
    check_rows_contiguous(tensor, name);
  }
  check_like(lse, "lse", query, accumulate_type(query.scalar_type()));
  STD_TORCH_CHECK(lse.is_contiguous(), "lse: accepted is a contiguous tensor");
  STD_TORCH_CHECK(p.seqlen_k > 0 && p.head_dim > 0 && p.head_dim_v > 0, "key, value: accepted are sizes of at least 1");
  if (bias.has_value()) {
    check_like(*bias, "bias", query, bias->scalar_type());
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

inline AttentionBackwardParams attention_forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                                        const std::optional<Tensor>& bias, const Tensor& output,
                                                        const Tensor& lse, bool is_causal, double scale) {
  AttentionBackwardParams p = attention_params(query, key, value, bias, lse, is_causal, scale);
  check_shape(output, "output", {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_like(output, "output", query, query.scalar_type());
  check_rows_contiguous(output, "output");
  p.output = view4(output);
  return p;
}

inline AttentionBackwardParams attention_backward_params(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output, const Tensor& lse,
    const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, bool is_causal, double scale) {
  AttentionBackwardParams p = attention_forward_params(query, key, value, bias, output, lse, is_causal, scale);
  check_shape(grad_output, "grad_output", {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_shape(grad_query, "grad_query", {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
  check_shape(grad_key, "grad_key", {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  check_shape(grad_value, "grad_value", {p.batch, p.num_heads, p.seqlen_k, p.head_dim_v});
  for (const auto& [tensor, name] : {std::pair(grad_output, "grad_output"), std::pair(grad_query, "grad_query"),
                                     std::pair(grad_key, "grad_key"), std::pair(grad_value, "grad_value")}) {
    check_like(tensor, name, query, query.scalar_type());
    check_rows_contiguous(tensor, name);
  }
  if (grad_lse.has_value()) {
    check_shape(*grad_lse, "grad_lse", {p.batch, p.num_heads, p.seqlen_q});
    check_like(*grad_lse, "grad_lse", query, lse.scalar_type());
    STD_TORCH_CHECK(grad_lse->is_contiguous(), "grad_lse: accepted is a contiguous tensor");
    p.grad_lse = grad_lse->data_ptr();
  }
  p.grad_output = view4(grad_output);
  p.grad_query = view4(grad_query);
  p.grad_key = view4(grad_key);
  p.grad_value = view4(grad_value);
  return p;
}

}  // namespace fastvit
