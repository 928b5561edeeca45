// The words of cuda/primitives_sm90.cuh, for the host.
#pragma once

#include "primitives.h"

#define FASTVIT_HAS_SM90A

namespace fastvit::cuda {

using TensorMap = emulator::TensorMap;

inline void mbarrier_init(uint32_t barrier, uint32_t count) { emulator::message_barrier_init(barrier, count); }
inline void mbarrier_init_fence() { emulator::message_barrier_init_fence(); }
inline void mbarrier_arrive(uint32_t barrier) { emulator::message_barrier_arrive(barrier); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulator::message_barrier_expect(barrier, bytes);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulator::message_barrier_wait(barrier, parity); }
inline void prefetch_tensor_map(const TensorMap&) {}
inline void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier, int column, int row, int head,
                        int batch) {
  emulator::tensor_load(address, map, barrier, {column, row, head, batch});
}

template <int kRegisters>
void increase_registers() {}
template <int kRegisters>
void decrease_registers() {}

inline int uniform(int value) { return value; }
inline int opaque(int value) { return value; }
inline void pin(uint32_t&) {}
template <int kCount>
void pin(float (&)[kCount]) {}

inline uint32_t shuffle_word_xor(uint32_t word, int mask) {
  return std::bit_cast<uint32_t>(shuffle_xor(std::bit_cast<float>(word), mask));
}

inline void product_fence() { emulator::product_fence(); }
inline void product_commit() { emulator::product_commit(); }
template <int kGroups>
void product_wait() {
  emulator::product_wait(kGroups);
}

template <typename T, int kColumns>
void multiply_shared(float* c, uint64_t left, uint64_t right, bool accumulate) {
  emulator::product_start({c, kColumns, left, nullptr, right, false, accumulate, to_float<T>});
}

template <typename T, int kColumns>
void multiply_registers(float* c, const uint32_t (&left)[4], uint64_t right, bool accumulate) {
  emulator::product_start({c, kColumns, 0, left, right, true, accumulate, to_float<T>});
}

}  // namespace fastvit::cuda
