// Tensors of an attention call → params, checked; the same on every device.
#pragma once

#include <array>
#include <utility>

#include "../checks.h"

namespace fastvit {

// What a call reads of a tensor, once: every accessor of the stable ABI is a call into libtorch, and a small attention
// takes as long as a few dozen of them. Dimensions that a tensor does not have are of size 1.
struct Operand {
  const char* name = "";
  void* data = nullptr;
  int64_t dim = 0;
  std::array<int64_t, 4> sizes{1, 1, 1, 1};
  std::array<int64_t, 4> strides{1, 1, 1, 1};
  ScalarType dtype = ScalarType::Float;
  int32_t device_type = 0;
  int32_t device_index = 0;

  Operand(const Tensor& tensor, const char* name) : Operand(tensor, name, tensor.dim()) {
    STD_TORCH_CHECK(dim <= 4, name, ": accepted are at most four dimensions");
    read(tensor, {0, 1, 2, 3});
  }

  // Query, key or value (0, 1, 2) of a packed projection [B, N, 3, H, D], as [B, H, N, D].
  static Operand unpacked(const Tensor& qkv, int64_t which, const char* name) {
    STD_TORCH_CHECK(qkv.dim() == 5 && qkv.sizes()[2] == 3, "qkv: accepted is [B, N, 3, H, D]");
    Operand operand(qkv, name, 4);
    operand.read(qkv, {0, 3, 1, 4});
    operand.data = static_cast<char*>(operand.data) + which * qkv.stride(2) * int64_t(qkv.element_size());
    return operand;
  }

  // [B, N, H, D] as [B, H, N, D].
  Operand heads_first() const {
    Operand operand = *this;
    std::swap(operand.sizes[1], operand.sizes[2]);
    std::swap(operand.strides[1], operand.strides[2]);
    return operand;
  }

  bool rows_contiguous() const { return sizes[3] <= 1 || strides[3] == 1; }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  View4 view() const { return {data, strides[0], strides[1], strides[2]}; }

 private:
  Operand(const Tensor& tensor, const char* name, int64_t dim)
      : name(name), data(tensor.data_ptr()), dim(dim), dtype(tensor.scalar_type()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  }

  void read(const Tensor& tensor, const std::array<int, 4>& from) {
    const auto all_sizes = tensor.sizes(), all_strides = tensor.strides();
    for (int64_t i = 0; i < dim; ++i) {
      sizes[i] = all_sizes[from[i]];
      strides[i] = all_strides[from[i]];
    }
  }
};

inline void check_device(const Operand& operand, const Operand& query) {
  STD_TORCH_CHECK(operand.device_type == query.device_type && operand.device_index == query.device_index, operand.name,
                  ": it is not on the device of the other arguments");
}

// A tensor of these four sizes, with query's dtype and device, its rows contiguous.
inline void check_rows(const Operand& operand, const Operand& query, const std::array<int64_t, 4>& sizes) {
  STD_TORCH_CHECK(operand.dim == 4 && operand.sizes == sizes, operand.name,
                  ": its shape does not match the other arguments");
  check_device(operand, query);
  STD_TORCH_CHECK(operand.dtype == query.dtype, operand.name, ": its dtype does not match the other arguments");
  STD_TORCH_CHECK(operand.rows_contiguous(), operand.name, ": accepted is a last dimension that is contiguous");
}

// The LSE or its gradient, [B, H, Nq].
inline void check_lse(const Operand& lse, const Operand& query) {
  std::array<int64_t, 4> rows = query.sizes;
  rows[3] = 1;
  STD_TORCH_CHECK(lse.dim == 3 && lse.sizes == rows, lse.name, ": its shape does not match the other arguments");
  check_device(lse, query);
  STD_TORCH_CHECK(lse.dtype == accumulate_type(query.dtype), lse.name,
                  ": its dtype does not match the other arguments");
  STD_TORCH_CHECK(lse.is_contiguous(), lse.name, ": accepted is a contiguous tensor");
}

// A bias that broadcasts to the scores: where it does, its stride is 0.
inline BiasView bias_view(const Operand& bias, const Operand& query, const std::array<int64_t, 4>& scores) {
  check_device(bias, query);
  STD_TORCH_CHECK(bias.dim == 4, "bias: accepted are four dimensions");
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(bias.sizes[i] == scores[i] || bias.sizes[i] == 1,
                    "bias: its shape does not broadcast to the scores'");
    strides[i] = bias.sizes[i] == 1 ? 0 : bias.strides[i];
  }
  return {bias.data, bias_type(bias.dtype), strides[0], strides[1], strides[2], strides[3]};
}

inline AttentionBackwardParams attention_params(const Operand& query, const Operand& key, const Operand& value,
                                                const std::optional<Operand>& bias, const Operand& output,
                                                const Operand& lse, bool is_causal, double scale) {
  AttentionBackwardParams p;
  p.dtype = dtype_of(query.dtype, query.name);
  STD_TORCH_CHECK(query.dim == 4 && key.dim == 4 && value.dim == 4,
                  "query, key, value: accepted are four dimensions [B, H, N, D]");
  p.batch = query.sizes[0];
  p.num_heads = query.sizes[1];
  p.seqlen_q = query.sizes[2];
  p.head_dim = query.sizes[3];
  p.seqlen_k = key.sizes[2];
  p.head_dim_v = value.sizes[3];
  STD_TORCH_CHECK(p.seqlen_k > 0 && p.head_dim > 0 && p.head_dim_v > 0, "key, value: accepted are sizes of at least 1");
  check_rows(query, query, query.sizes);
  check_rows(key, query, {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  check_rows(value, query, {p.batch, p.num_heads, p.seqlen_k, p.head_dim_v});
  check_rows(output, query, {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_lse(lse, query);
  if (bias.has_value()) p.bias = bias_view(*bias, query, {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k});
  p.is_causal = is_causal;
  p.scale = scale;
  p.query = query.view();
  p.key = key.view();
  p.value = value.view();
  p.output = output.view();
  p.lse = lse.data;
  return p;
}

inline std::optional<Operand> operand_of(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor.has_value()) return std::nullopt;
  return Operand(*tensor, name);
}

inline AttentionBackwardParams attention_forward_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                                        const std::optional<Tensor>& bias, const Tensor& output,
                                                        const Tensor& lse, bool is_causal, double scale) {
  return attention_params({query, "query"}, {key, "key"}, {value, "value"}, operand_of(bias, "bias"),
                          {output, "output"}, {lse, "lse"}, is_causal, scale);
}

// Adds what a backward call has beside the forward call's params `p`.
inline AttentionBackwardParams attention_backward_params(AttentionBackwardParams p, const Operand& query,
                                                         const Operand& grad_output,
                                                         const std::optional<Operand>& grad_lse,
                                                         const Operand& grad_query, const Operand& grad_key,
                                                         const Operand& grad_value) {
  check_rows(grad_output, query, {p.batch, p.num_heads, p.seqlen_q, p.head_dim_v});
  check_rows(grad_query, query, {p.batch, p.num_heads, p.seqlen_q, p.head_dim});
  check_rows(grad_key, query, {p.batch, p.num_heads, p.seqlen_k, p.head_dim});
  check_rows(grad_value, query, {p.batch, p.num_heads, p.seqlen_k, p.head_dim_v});
  if (grad_lse.has_value()) {
    check_lse(*grad_lse, query);
    p.grad_lse = grad_lse->data;
  }
  p.grad_output = grad_output.view();
  p.grad_query = grad_query.view();
  p.grad_key = grad_key.view();
  p.grad_value = grad_value.view();
  return p;
}

inline AttentionBackwardParams attention_backward_params(
    const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output, const Tensor& lse,
    const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_value, bool is_causal, double scale) {
  return attention_backward_params(attention_forward_params(query, key, value, bias, output, lse, is_causal, scale),
                                   {query, "query"}, {grad_output, "grad_output"}, operand_of(grad_lse, "grad_lse"),
                                   {grad_query, "grad_query"}, {grad_key, "grad_key"}, {grad_value, "grad_value"});
}

}  // namespace fastvit
