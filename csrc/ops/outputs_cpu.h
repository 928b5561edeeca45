// What an op that is the whole public call in C++ returns.
#pragma once

#include <initializer_list>

#include "../checks.h"

namespace fastvit {

// A CPU tensor whose memory holds anything. By the stable ABI's own function, a tenth of a call of torch.empty.
Tensor empty_cpu(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype);

// Have empty_cpu fill what it returns with NaN: for tests, as torch does not fill such memory.
void poison_outputs(bool wanted);

}  // namespace fastvit
