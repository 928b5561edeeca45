// Tensor maps, the way in which the copy engine of sm_90 is told about a tensor in global memory.
#pragma once

#include <type_traits>

#include "../params.h"
#include "launch.h"
#include "primitives_sm90.cuh"

#ifndef FASTVIT_EMULATOR
#include <cudaTypedefs.h>
#endif

namespace fastvit::cuda {

// A map needs addresses and strides of whole 16 bytes, the strides positive and under 2^40 bytes.
inline bool has_tensor_map(const View4& view, int64_t batch, int64_t heads, int64_t rows) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16) return false;
  const int64_t sizes[3] = {rows, heads, batch}, strides[3] = {view.row_stride, view.head_stride, view.batch_stride};
  for (int i = 0; i < 3; ++i) {
    // The stride of a dimension of size one is never used.
    if (sizes[i] > 1 && (strides[i] <= 0 || strides[i] % 8 || strides[i] >= int64_t(1) << 39)) return false;
  }
  return true;
}

#ifdef FASTVIT_EMULATOR

inline void bind_context() {}

#else

// A function of the driver needs a context that is current in this thread. The runtime makes it so with the first call
// that works with a device, which in a new thread this may be.
inline void bind_context() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
}

// From the runtime, so that nothing is linked with the driver's library.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &pointer, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#endif
    if (status != cudaDriverEntryPointSuccess || !pointer) {
      throw std::runtime_error("cuTensorMapEncodeTiled: this driver does not have it");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(pointer);
  }();
  return function;
}

#endif

// A view [batch, heads, rows, columns] of T, to be loaded by boxes of box_rows rows (at most 256) of one panel.
template <typename T>
TensorMap tensor_map(const View4& view, int64_t batch, int64_t heads, int64_t rows, int64_t columns, int box_rows) {
  constexpr uint64_t kBytes = 2;
  const int64_t unused = columns;  // any stride that is allowed
  const uint64_t sizes[4] = {uint64_t(columns), uint64_t(rows), uint64_t(heads), uint64_t(batch)};
  const uint64_t strides[3] = {uint64_t(rows > 1 ? view.row_stride : unused) * kBytes,
                               uint64_t(heads > 1 ? view.head_stride : unused) * kBytes,
                               uint64_t(batch > 1 ? view.batch_stride : unused) * kBytes};
  const uint32_t box[4] = {kPanelColumns, uint32_t(box_rows), 1, 1};
#ifdef FASTVIT_EMULATOR
  return emulator::tensor_map(view.data, sizes, strides, box);
#else
  const uint32_t steps[4] = {1, 1, 1, 1};
  constexpr auto kType = std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  TensorMap map;
  const CUresult result = tensor_map_encoder()(&map, kType, 4, view.data, sizes, strides, box, steps,
                                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " + std::to_string(int(result)));
  }
  return map;
#endif
}

}  // namespace fastvit::cuda
