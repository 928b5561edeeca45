// Every native op's schema, once. The public ops (fastvit::attention, …) are defined in Python, so that they exist
// without a compiler; fastvit_native's are what the `cpu` and `cuda` backends call. Outputs are allocated by the caller
// and written in place. The emulator's library has the same ops, on CPU tensors, under a name of its own.
#include <torch/csrc/stable/library.h>

#ifdef FASTVIT_EMULATOR
STABLE_TORCH_LIBRARY(fastvit_emulated, m) {
#else
STABLE_TORCH_LIBRARY(fastvit_native, m) {
#endif
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor(a!) output, Tensor(b!) lse,"
      " bool is_causal, float scale) -> ()");
  // One form of the CUDA kernels by name, for measuring it; attention_forward chooses by itself.
  m.def(
      "attention_forward_sm90(Tensor query, Tensor key, Tensor value, Tensor(a!) output, Tensor(b!) lse, float scale)"
      " -> ()");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias,"
      " Tensor output, Tensor lse, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, bool is_causal, "
      "float scale)"
      " -> ()");
  // Without a stride the patches tile the images.
  m.def(
      "patch_embed_forward(Tensor images, Tensor weight, Tensor? bias, Tensor(a!) output, int[2]? stride=None) -> ()");
  m.def(
      "patch_embed_backward_weight(Tensor grad_output, Tensor images, Tensor(a!) grad_weight, Tensor(b!)? grad_bias,"
      " int[2]? stride=None) -> ()");
  m.def("patch_embed_backward_images(Tensor grad_output, Tensor weight, Tensor(a!) grad_images) -> ()");
}

#ifndef FASTVIT_EMULATOR
// The public ops on CPU tensors without a choice of backends: Python calls them where there is nothing to choose, to
// differentiate or to record. Overloads, so that a profile names them as the ops that they are.
STABLE_TORCH_LIBRARY_FRAGMENT(fastvit, m) {
  m.def(
      "attention.cpu(Tensor query, Tensor key, Tensor value, Tensor? bias, bool is_causal, float scale)"
      " -> (Tensor output, Tensor lse)");
  m.def(
      "attention_qkvpacked.cpu(Tensor qkv, Tensor? bias, bool is_causal, float scale)"
      " -> (Tensor output, Tensor lse)");
  m.def(
      "attention_backward.cpu(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value,"
      " Tensor? bias, Tensor output, Tensor lse, bool is_causal, float scale)"
      " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");
  m.def(
      "attention_qkvpacked_backward.cpu(Tensor grad_output, Tensor? grad_lse, Tensor qkv, Tensor? bias, Tensor output,"
      " Tensor lse, bool is_causal, float scale) -> Tensor grad_qkv");
  m.def("patch_embed.cpu(Tensor images, Tensor weight, Tensor? bias) -> Tensor");
}
#endif
