// Every native op's schema, once. The public ops (fastvit::attention, …) are defined in Python, so that they exist
// without a compiler; these are what the `cpu` backend calls. Outputs are allocated by the caller and written in place.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastvit_native, m) {
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor(a!) output, Tensor(b!) lse,"
      " bool is_causal, float scale) -> ()");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias,"
      " Tensor lse, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, bool is_causal, float scale)"
      " -> ()");
  m.def("patch_embed_forward(Tensor images, Tensor weight, Tensor? bias, Tensor(a!) output) -> ()");
  m.def(
      "patch_embed_backward_weight(Tensor grad_output, Tensor images, Tensor(a!) grad_weight, Tensor(b!)? grad_bias)"
      " -> ()");
  m.def("patch_embed_backward_images(Tensor grad_output, Tensor weight, Tensor(a!) grad_images) -> ()");
}
