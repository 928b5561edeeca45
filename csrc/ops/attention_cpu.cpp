// Attention on the CPU: tensors → params → tasks over torch's threads. fastvit_native::attention_* write into outputs
// that the caller allocates, as on every device; the overloads `cpu` of the public ops are the whole call in one,
// because at a tiny shape each step of Python between schema and kernel takes as long as the kernel.
#include <algorithm>
#include <limits>
#include <tuple>

#include "../cpu/attention_threads.h"
#include "attention_params.h"
#include "outputs_cpu.h"

namespace fastvit {
namespace {

constexpr auto parallel_for = [](int64_t tasks, const auto& f) { torch::stable::parallel_for(0, tasks, 1, f); };

void attention_forward(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                       Tensor& output, Tensor& lse, bool is_causal, double scale) {
  check_cpu(query, "query");
  const AttentionParams p = attention_forward_params(query, key, value, bias, output, lse, is_causal, scale);
  cpu::attention_forward_over(cpu::kernels(), p, torch::stable::get_num_threads(), parallel_for);
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

using Outputs = std::tuple<Tensor, Tensor>;

// Rows contiguous. Writes [B, N, H, D] in memory; is_packed returns it in this order of dimensions too.
Outputs attend(const Operand& query, const Operand& key, const Operand& value, const std::optional<Tensor>& bias,
               bool is_causal, double scale, bool is_packed) {
  const auto [batch, heads, rows, _] = query.sizes;
  // Strides as torch.empty has them, which counts an empty dimension as one.
  const int64_t steps = std::max<int64_t>(rows, 1), columns = std::max<int64_t>(heads, 1), width = value.sizes[3];
  const int64_t token = columns * width, image = steps * token;
  Outputs outputs{is_packed ? empty_cpu({batch, rows, heads, width}, {image, token, width, 1}, query.dtype)
                            : empty_cpu({batch, heads, rows, width}, {image, width, token, 1}, query.dtype),
                  empty_cpu({batch, heads, rows}, {columns * steps, steps, 1}, accumulate_type(query.dtype))};
  auto& [output, lse] = outputs;
  if (batch * heads * rows == 0) return outputs;
  if (key.sizes[2] == 0) {
    torch::stable::zero_(output);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
    return outputs;
  }
  const Operand written(output, "output");
  const AttentionParams p =
      attention_params(query, key, value, operand_of(bias, "bias"), is_packed ? written.heads_first() : written,
                       {lse, "lse"}, is_causal, scale);
  cpu::attention_forward_over(cpu::kernels(), p, torch::stable::get_num_threads(), parallel_for);
  return outputs;
}

bool has_contiguous_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.sizes()[last] <= 1 || tensor.stride(last) == 1;
}

// The tensor, or a copy of it whose last dimension is contiguous.
Tensor with_contiguous_rows(const Tensor& tensor) {
  return has_contiguous_rows(tensor) ? tensor : torch::stable::contiguous(tensor);
}

Outputs attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
                  bool is_causal, double scale) {
  const Operand operands[] = {{query, "query"}, {key, "key"}, {value, "value"}};
  const auto& [q, k, v] = operands;
  if (!(q.rows_contiguous() && k.rows_contiguous() && v.rows_contiguous())) {
    const Tensor copies[] = {with_contiguous_rows(query), with_contiguous_rows(key), with_contiguous_rows(value)};
    return attend({copies[0], "query"}, {copies[1], "key"}, {copies[2], "value"}, bias, is_causal, scale, false);
  }
  return attend(q, k, v, bias, is_causal, scale, false);
}

Outputs attention_qkvpacked(const Tensor& qkv, const std::optional<Tensor>& bias, bool is_causal, double scale) {
  const auto attend_to = [&](const Operand& query, const Tensor& given) {
    return attend(query, Operand::unpacked(given, 1, "key"), Operand::unpacked(given, 2, "value"), bias, is_causal,
                  scale, true);
  };
  const Operand query = Operand::unpacked(qkv, 0, "query");
  if (query.rows_contiguous()) return attend_to(query, qkv);
  const Tensor copy = torch::stable::contiguous(qkv);
  return attend_to(Operand::unpacked(copy, 0, "query"), copy);
}

// What both forms of backward read and write: rows contiguous, heads before tokens, at least one query and one key.
struct BackwardOperands {
  Operand query, key, value, output, grad_output, grad_query, grad_key, grad_value;
};

void differentiate(const BackwardOperands& operands, const std::optional<Tensor>& grad_lse,
                   const std::optional<Tensor>& bias, const Tensor& lse, bool is_causal, double scale) {
  const auto& [query, key, value, output, grad_output, grad_query, grad_key, grad_value] = operands;
  const Tensor row_lse = torch::stable::contiguous(lse);
  std::optional<Tensor> row_grad_lse;
  if (grad_lse.has_value()) row_grad_lse = torch::stable::contiguous(*grad_lse);
  const AttentionBackwardParams p = attention_backward_params(
      attention_params(query, key, value, operand_of(bias, "bias"), output, {row_lse, "lse"}, is_causal, scale), query,
      grad_output, operand_of(row_grad_lse, "grad_lse"), grad_query, grad_key, grad_value);
  cpu::attention_backward_over(cpu::kernels(), p, torch::stable::get_num_threads(), parallel_for);
}

// In the tensor's own layout, unless kernels would not take that: of a transposed or an overlapping tensor.
Tensor empty_grad(const Tensor& tensor) {
  const Tensor grad = torch::stable::empty_like(tensor);
  if (has_contiguous_rows(grad)) return grad;
  const auto sizes = tensor.sizes();
  const int64_t heads = sizes[1], rows = sizes[2], columns = sizes[3], head = rows * columns;
  return empty_cpu({sizes[0], heads, rows, columns}, {heads * head, head, columns, 1}, tensor.scalar_type());
}

using Grads = std::tuple<Tensor, Tensor, Tensor>;

Grads attention_grads(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& query,
                      const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, const Tensor& output,
                      const Tensor& lse, bool is_causal, double scale) {
  const Tensor q = with_contiguous_rows(query), k = with_contiguous_rows(key), v = with_contiguous_rows(value),
               rows = with_contiguous_rows(output), grad_rows = with_contiguous_rows(grad_output);
  Grads grads{empty_grad(query), empty_grad(key), empty_grad(value)};
  const auto& [grad_query, grad_key, grad_value] = grads;
  differentiate({{q, "query"},
                 {k, "key"},
                 {v, "value"},
                 {rows, "output"},
                 {grad_rows, "grad_output"},
                 {grad_query, "grad_query"},
                 {grad_key, "grad_key"},
                 {grad_value, "grad_value"}},
                grad_lse, bias, lse, is_causal, scale);
  return grads;
}

// Of qkv [B, N, 3, H, D].
Tensor attention_qkvpacked_backward(const Tensor& grad_output, const std::optional<Tensor>& grad_lse, const Tensor& qkv,
                                    const std::optional<Tensor>& bias, const Tensor& output, const Tensor& lse,
                                    bool is_causal, double scale) {
  const Tensor packed = with_contiguous_rows(qkv), rows = with_contiguous_rows(output),
               grad_rows = with_contiguous_rows(grad_output);
  const Operand query = Operand::unpacked(packed, 0, "query");
  const auto& [batch, heads, tokens, dim] = query.sizes;
  const int64_t third = heads * dim;
  const Tensor grad =
      empty_cpu({batch, tokens, 3, heads, dim}, {tokens * 3 * third, 3 * third, third, dim, 1}, query.dtype);
  differentiate({query, Operand::unpacked(packed, 1, "key"), Operand::unpacked(packed, 2, "value"),
                 Operand(rows, "output").heads_first(), Operand(grad_rows, "grad_output").heads_first(),
                 Operand::unpacked(grad, 0, "grad_query"), Operand::unpacked(grad, 1, "grad_key"),
                 Operand::unpacked(grad, 2, "grad_value")},
                grad_lse, bias, lse, is_causal, scale);
  return grad;
}

}  // namespace

}  // namespace fastvit

STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastvit::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastvit::attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastvit, CPU, m) {
  m.impl("attention.cpu", TORCH_BOX(&fastvit::attention));
  m.impl("attention_qkvpacked.cpu", TORCH_BOX(&fastvit::attention_qkvpacked));
  m.impl("attention_backward.cpu", TORCH_BOX(&fastvit::attention_grads));
  m.impl("attention_qkvpacked_backward.cpu", TORCH_BOX(&fastvit::attention_qkvpacked_backward));
}
