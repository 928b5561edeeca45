// Tensor checks and conversions to the kernels' params, through torch's stable ABI, written once.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "params.h"

namespace fastvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions have checked everything with messages for people; these checks only keep a direct call of the
// native op from reading memory that is not there.
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == int64_t(shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) same = same && tensor.sizes()[dim++] == size;
  STD_TORCH_CHECK(same, name, ": its shape does not match the other arguments");
}

inline void check_cpu(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": accepted is a CPU tensor");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& first, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), name,
                  ": it is not on the device of the other arguments");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": its dtype does not match the other arguments");
}

inline void check_rows_contiguous(const Tensor& tensor, const char* name) {
  int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.sizes()[last] <= 1 || tensor.stride(last) == 1, name,
                  ": accepted is a last dimension that is contiguous");
}

inline DType dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, ": accepted are float16, bfloat16, float32 and float64");
  }
  return DType::kFloat32;
}

inline DType dtype_of(const Tensor& tensor, const char* name) { return dtype_of(tensor.scalar_type(), name); }

inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline BiasType bias_type(ScalarType dtype) {
  if (dtype == ScalarType::Bool) return BiasType::kBool;
  switch (dtype_of(dtype, "bias")) {
    case DType::kFloat16:
      return BiasType::kFloat16;
    case DType::kBFloat16:
      return BiasType::kBFloat16;
    case DType::kFloat32:
      return BiasType::kFloat32;
    case DType::kFloat64:
      return BiasType::kFloat64;
  }
  return BiasType::kNone;
}

}  // namespace fastvit
