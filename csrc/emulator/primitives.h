// The words of cuda/primitives.cuh, for the host.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace fastvit::cuda {

using std::max;
using std::min;

constexpr int kLanes = 32;

inline int thread_index() { return emulator::thread_index(); }
inline int lane_index() { return emulator::thread_index() % kLanes; }
inline int block_threads() { return emulator::block_threads(); }
inline int block_index() { return int(emulator::block_index()); }
inline int grid_blocks() { return int(emulator::grid_blocks()); }
inline void barrier() { emulator::barrier(); }
inline void warp_barrier() { emulator::warp_barrier(); }
inline uint32_t shared_memory() { return emulator::shared_begin(); }

template <typename V>
V load_shared(uint32_t address) {
  V value;
  std::memcpy(&value, emulator::shared_read(address, sizeof(V)), sizeof(V));
  return value;
}

template <typename V>
void store_shared(uint32_t address, V value) {
  std::memcpy(emulator::shared_write(address, sizeof(V)), &value, sizeof(V));
}

template <typename V>
V load_global(const void* pointer) {
  emulator::check_global(pointer, sizeof(V), false);
  V value;
  std::memcpy(&value, pointer, sizeof(V));
  return value;
}

template <typename V>
void store_global(void* pointer, V value) {
  emulator::check_global(pointer, sizeof(V), true);
  std::memcpy(pointer, &value, sizeof(V));
}

template <int kBytes>
void cp_async(uint32_t address, const void* pointer, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::async_copy(address, pointer, kBytes, valid);
}

inline void cp_async_commit() { emulator::async_commit(); }

template <int kGroups>
void cp_async_wait() {
  emulator::async_wait(kGroups);
}

// The bits of a T as a float. A table, because the conversion from half precision is slow without its instruction.
inline float half_to_float(uint16_t bits) {
  static const auto* table = [] {
    auto* values = new float[1 << 16];
    for (uint32_t i = 0; i < 1 << 16; ++i) values[i] = float(std::bit_cast<_Float16>(uint16_t(i)));
    return values;
  }();
  return table[bits];
}

template <typename T>
float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, Half>) return half_to_float(bits);
  return std::bit_cast<float>(uint32_t(bits) << 16);
}

template <typename T>
uint16_t round_to(float x) {
  if constexpr (std::is_same_v<T, Half>) return std::bit_cast<uint16_t>(_Float16(x));
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7FFF;
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to the nearest, ties to even
}

template <typename T>
uint32_t pack(float low, float high) {
  return uint32_t(round_to<T>(low)) | uint32_t(round_to<T>(high)) << 16;
}

// Flushes results below the normal numbers, as ex2.approx.ftz does.
inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline float natural_log(float x) { return std::log(x); }

inline float multiply_rounded(float a, float b) {
  const volatile float product = a * b;
  return product;
}

struct ShuffleOperands {
  float value;
  int mask;
  float result;
};

inline float shuffle_xor(float value, int mask) {
  ShuffleOperands operands{value, mask, 0.0f};
  emulator::collective("shuffle_xor", &operands, [](void* const* all) {
    for (int lane = 0; lane < kLanes; ++lane) {
      auto* mine = static_cast<ShuffleOperands*>(all[lane]);
      mine->result = static_cast<ShuffleOperands*>(all[lane ^ mine->mask])->value;
    }
  });
  return operands.result;
}

struct LoadOperands {
  uint32_t address;
  uint32_t* fragment;
};

template <int kCount, bool kTranspose>
void resolve_ldmatrix(void* const* all) {
  emulator::Statistics& statistics = emulator::statistics();
  for (int i = 0; i < kCount; ++i) {
    uint16_t matrix[8][8];
    uint32_t banks = 0;
    for (int row = 0; row < 8; ++row) {
      const uint32_t address = static_cast<LoadOperands*>(all[8 * i + row])->address;
      std::memcpy(matrix[row], emulator::shared_read(address, 16, true), 16);
      banks |= 1u << (address / 16 % 8);
    }
    ++statistics.matrix_loads;
    statistics.bank_conflicts += banks != 0xFF;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      const uint32_t low = kTranspose ? matrix[t][g] : matrix[g][t];
      const uint32_t high = kTranspose ? matrix[t + 1][g] : matrix[g][t + 1];
      static_cast<LoadOperands*>(all[lane])->fragment[i] = low | high << 16;
    }
  }
}

template <int kCount, bool kTranspose>
void ldmatrix(uint32_t (&fragment)[kCount], uint32_t address) {
  LoadOperands operands{address, fragment};
  emulator::collective("ldmatrix", &operands, resolve_ldmatrix<kCount, kTranspose>);
}

struct ProductOperands {
  float* c;
  uint32_t a[4];
  uint32_t b[2];
};

// A tensor core adds exact products to the accumulator with a few bits more than float has, and truncates: Fasi,
// Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021.
inline float truncate(double x) {
  const float nearest = float(x);
  return std::isfinite(nearest) && std::abs(double(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// kDepth: 16, or 8 with the first halves of the fragments.
template <typename T, int kDepth>
void resolve_mma(void* const* all) {
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto* operands = static_cast<const ProductOperands*>(all[lane]);
    const int g = lane / 4, t = 2 * (lane % 4);
    for (int i = 0; i < kDepth / 4; ++i) {
      a[g + 8 * (i % 2)][t + 8 * (i / 2)] = to_float<T>(uint16_t(operands->a[i]));
      a[g + 8 * (i % 2)][t + 8 * (i / 2) + 1] = to_float<T>(uint16_t(operands->a[i] >> 16));
    }
    for (int i = 0; i < kDepth / 8; ++i) {
      b[t + 8 * i][g] = to_float<T>(uint16_t(operands->b[i]));
      b[t + 8 * i + 1][g] = to_float<T>(uint16_t(operands->b[i] >> 16));
    }
  }
  ++emulator::statistics().matrix_products;
  for (int row = 0; row < 16; ++row) {
    double c[8];
    for (int n = 0; n < 8; ++n) {
      c[n] = static_cast<const ProductOperands*>(all[row % 8 * 4 + n / 2])->c[row / 8 * 2 + n % 2];
    }
    for (int k = 0; k < kDepth; ++k) {
      for (int n = 0; n < 8; ++n) c[n] += a[row][k] * b[k][n];
    }
    for (int n = 0; n < 8; ++n) {
      static_cast<ProductOperands*>(all[row % 8 * 4 + n / 2])->c[row / 8 * 2 + n % 2] = truncate(c[n]);
    }
  }
}

template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOperands operands{c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::collective("mma_m16n8k16", &operands, resolve_mma<T, 16>);
}

template <typename T>
void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  ProductOperands operands{c, {a0, a1, 0, 0}, {b, 0}};
  emulator::collective("mma_m16n8k8", &operands, resolve_mma<T, 8>);
}

}  // namespace fastvit::cuda
