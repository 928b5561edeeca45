// What surrounds the launch of a CUDA kernel: the device, the current stream, the dtype, errors. In the emulator: the
// memory that the kernel may touch.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <exception>
#include <functional>
#include <optional>
#include <vector>

#include "../checks.h"

#ifdef FASTVIT_EMULATOR
#include "../emulator/emulator.h"
#define FASTVIT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastvit_emulated, CPU, m)
#else
#define FASTVIT_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(fastvit_native, CUDA, m)
#endif

namespace fastvit {

struct Argument {
  std::optional<Tensor> tensor;
  const char* name;
};

class CudaCall {
 public:
  // The first input decides the device.
  CudaCall(const std::vector<Argument>& inputs, const std::vector<Argument>& outputs)
#ifdef FASTVIT_EMULATOR
      : ranges_(ranges(inputs, outputs)), memory_(ranges_) {
    check_cpu(*inputs.front().tensor, inputs.front().name);
  }

  void* stream() const { return nullptr; }
#else
      : guard_(inputs.front().tensor->get_device_index()) {
    (void)outputs;
    STD_TORCH_CHECK(inputs.front().tensor->is_cuda(), inputs.front().name, ": accepted is a CUDA tensor");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(inputs.front().tensor->get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }
#endif

  // Memory for `count` elements of like's type and device, until this object ends. Called once at most.
  void* scratch(const Tensor& like, int64_t count) {
    scratch_ = torch::stable::new_empty(like, {count});
#ifdef FASTVIT_EMULATOR
    add(ranges_, {scratch_, "scratch"}, true);
    memory_with_scratch_.emplace(ranges_);
#endif
    return scratch_->data_ptr();
  }

  // Runs one of the two, by dtype, with its errors as torch's.
  void run(DType dtype, const std::function<void()>& half, const std::function<void()>& bfloat16) const {
    STD_TORCH_CHECK(dtype == DType::kFloat16 || dtype == DType::kBFloat16,
                    "dtype: the CUDA kernels take float16 and bfloat16");
    try {
      (dtype == DType::kFloat16 ? half : bfloat16)();
    } catch (const std::exception& error) {
      STD_TORCH_CHECK(false, error.what());
    }
  }

 private:
#ifdef FASTVIT_EMULATOR
  // From a tensor's first to its last element.
  static void add(std::vector<emulator::Range>& ranges, const Argument& argument, bool writable) {
    if (!argument.tensor.has_value() || argument.tensor->numel() == 0) return;
    int64_t last = 0;
    for (int64_t dim = 0; dim < argument.tensor->dim(); ++dim) {
      last += (argument.tensor->sizes()[dim] - 1) * argument.tensor->stride(dim);
    }
    const int64_t bytes = (last + 1) * int64_t(argument.tensor->element_size());
    ranges.push_back({argument.name, argument.tensor->data_ptr(), bytes, writable});
  }

  static std::vector<emulator::Range> ranges(const std::vector<Argument>& inputs,
                                             const std::vector<Argument>& outputs) {
    std::vector<emulator::Range> all;
    for (const Argument& argument : inputs) add(all, argument, false);
    for (const Argument& argument : outputs) add(all, argument, true);
    return all;
  }

  std::vector<emulator::Range> ranges_;
  emulator::GlobalMemory memory_;
  std::optional<emulator::GlobalMemory> memory_with_scratch_;
#else
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
  std::optional<Tensor> scratch_;
};

}  // namespace fastvit
