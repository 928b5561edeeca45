#include "outputs_cpu.h"

#include <atomic>
#include <limits>

namespace fastvit {
namespace {

std::atomic<bool> poison{false};

}  // namespace

Tensor empty_cpu(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype) {
  AtenTensorHandle handle;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides.begin(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  if (poison.load(std::memory_order_relaxed)) {
    torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
  }
  return tensor;
}

void poison_outputs(bool wanted) { poison.store(wanted, std::memory_order_relaxed); }

}  // namespace fastvit
