// Tensors for cpu_sanitizers.cpp: any dtype and strides, in a heap block that ends with the last element.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/params.h"

namespace fastvit {

inline std::mt19937 generator(7);

inline size_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Inputs are multiples of 1/64 below 2, which every dtype holds exactly.
inline double random_value() { return (int(generator() % 255) - 127) / 64.0; }

inline void encode(double value, DType dtype, void* target) {
  const float narrow = float(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  uint16_t half = uint16_t(bits >> 16);
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(target, &value, 8);
      return;
    case DType::kFloat32:
      std::memcpy(target, &narrow, 4);
      return;
    case DType::kFloat16:
      half = value == 0 ? 0 : uint16_t((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
      [[fallthrough]];
    case DType::kBFloat16:
      std::memcpy(target, &half, 2);
  }
}

inline double decode(const void* source, DType dtype) {
  double wide;
  float narrow;
  uint16_t half;
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(&wide, source, 8);
      return wide;
    case DType::kFloat32:
      std::memcpy(&narrow, source, 4);
      return narrow;
    case DType::kBFloat16: {
      std::memcpy(&half, source, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(&narrow, &bits, 4);
      return narrow;
    }
    case DType::kFloat16:
      break;
  }
  std::memcpy(&half, source, 2);
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double sign = half & 0x8000 ? -1 : 1;
  if (exponent == 31) return mantissa ? std::nan("") : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// A tensor of up to four dimensions in a heap block that ends with its last element.
struct Tensor {
  DType dtype;
  int64_t sizes[4], strides[4];
  char* data = nullptr;

  Tensor(DType dtype, std::vector<int64_t> shape, std::vector<int64_t> steps = {}, bool short_of_a_row = false)
      : dtype(dtype) {
    int64_t contiguous = 1, extent = 1;
    for (int i = 3; i >= 0; --i) {
      sizes[i] = shape[i];
      strides[i] = steps.empty() ? contiguous : steps[i];
      contiguous *= shape[i];
      extent += (sizes[i] - 1) * strides[i];
    }
    if (short_of_a_row) extent -= sizes[3] * strides[3];
    const size_t bytes = size_t(extent) * size_of(dtype);
    data = static_cast<char*>(std::malloc(bytes));
    std::memset(data, 0xff, bytes);  // NaN in every dtype
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { std::free(data); }

  char* at(int64_t a, int64_t b, int64_t c, int64_t d) const {
    return data + (a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3]) * int64_t(size_of(dtype));
  }
  double get(int64_t a, int64_t b, int64_t c, int64_t d) const { return decode(at(a, b, c, d), dtype); }
  template <class F>
  void each(const F& f) const {
    for (int64_t a = 0; a < sizes[0]; ++a)
      for (int64_t b = 0; b < sizes[1]; ++b)
        for (int64_t c = 0; c < sizes[2]; ++c)
          for (int64_t d = 0; d < sizes[3]; ++d) f(a, b, c, d);
  }
  void fill() {
    each([&](auto... index) { encode(random_value(), dtype, at(index...)); });
  }
  View4 view() const { return {data, strides[0], strides[1], strides[2]}; }
};

}  // namespace fastvit
