// The words that sm_90a adds to primitives.cuh: mbarriers, tensor loads (TMA), wgmma, setmaxnreg. The emulator's twin
// is emulator/primitives_sm90.h. Names and layouts follow the PTX ISA 9.0: 9.7.13.15 (mbarrier), 9.7.9.27
// (cp.async.bulk), 9.7.15 (wgmma).
//
// A matrix operand in shared memory is made of panels of 64 elements (128 bytes) a row, rows one after another, with
// the 128-byte swizzle: the 16-byte chunk c of row r lies at chunk c ^ (r % 8). Panels begin at multiples of 1024
// bytes.
#pragma once

#include "primitives.cuh"

namespace fastvit::cuda {

constexpr int kWarpgroupThreads = 128;
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPanelAlignment = 1024;
// One product of a warpgroup is 64 × N × 16.
constexpr int kWarpgroupRows = 64;
constexpr int kProductDepth = 16;

}  // namespace fastvit::cuda

#ifdef FASTVIT_EMULATOR
#include "../emulator/primitives_sm90.h"
#else

#include <cuda.h>

// Code for sm_90a has these words; for any other architecture a kernel made of them is compiled to nothing.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTVIT_HAS_SM90A
#endif

namespace fastvit::cuda {

using TensorMap = CUtensorMap;

// A phase of the barrier ends when `count` arrivals and all the bytes that they announced have come.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After mbarrier_init, in its thread and before a barrier of the block: the copy engine sees the barriers too.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait until the phase with this parity has ended. The phase before the first counts as ended, with parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Start to copy the map's box at these coordinates, innermost first, to a panel; zeros where it lies outside of the
// tensor. All the box's bytes are counted on the barrier.
__device__ __forceinline__ void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier, int column,
                                            int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(address),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// For a whole warpgroup, before anything else that it does.
template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The value of the first lane, which the compiler then knows to be the same in all of them.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(~0u, value, 0); }

__device__ __forceinline__ uint32_t shuffle_word_xor(uint32_t word, int mask) {
  return __shfl_xor_sync(~0u, word, mask);
}

// The same value, of which the compiler does not know that it is.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Nothing that the compiler does with these registers passes this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

__device__ __forceinline__ void pin(uint32_t& word) { asm volatile("" : "+r"(word)::"memory"); }

// Before the first product, and before any that uses registers which something else has touched.
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most kGroups of the latest groups are under way; only then are the others' registers to be touched.
template <int kGroups>
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The names of an accumulator's registers in the text of a product, and the registers: by tens, then in full.
#define FASTVIT_NAMES(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define FASTVIT_NAMES_10 FASTVIT_NAMES()
#define FASTVIT_NAMES_30 FASTVIT_NAMES_10 FASTVIT_NAMES(1) FASTVIT_NAMES(2)
#define FASTVIT_NAMES_40 FASTVIT_NAMES_30 FASTVIT_NAMES(3)
#define FASTVIT_NAMES_50 FASTVIT_NAMES_40 FASTVIT_NAMES(4)
#define FASTVIT_NAMES_60 FASTVIT_NAMES_50 FASTVIT_NAMES(5)
#define FASTVIT_NAMES_16 FASTVIT_NAMES_10 "%10, %11, %12, %13, %14, %15"
#define FASTVIT_NAMES_32 FASTVIT_NAMES_30 "%30, %31"
#define FASTVIT_NAMES_48 FASTVIT_NAMES_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FASTVIT_NAMES_52 FASTVIT_NAMES_50 "%50, %51"
#define FASTVIT_NAMES_56 FASTVIT_NAMES_50 "%50, %51, %52, %53, %54, %55"
#define FASTVIT_NAMES_64 FASTVIT_NAMES_60 "%60, %61, %62, %63"
#define FASTVIT_NAMES_68 FASTVIT_NAMES_60 "%60, %61, %62, %63, %64, %65, %66, %67"

#define FASTVIT_4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define FASTVIT_16(i) FASTVIT_4(i), FASTVIT_4(i + 4), FASTVIT_4(i + 8), FASTVIT_4(i + 12)
#define FASTVIT_32(i) FASTVIT_16(i), FASTVIT_16(i + 16)
#define FASTVIT_48(i) FASTVIT_32(i), FASTVIT_16(i + 32)
#define FASTVIT_52(i) FASTVIT_48(i), FASTVIT_4(i + 48)
#define FASTVIT_56(i) FASTVIT_52(i), FASTVIT_4(i + 52)
#define FASTVIT_64(i) FASTVIT_48(i), FASTVIT_16(i + 48)
#define FASTVIT_68(i) FASTVIT_64(i), FASTVIT_4(i + 64)
#define FASTVIT_40(i) FASTVIT_32(i), FASTVIT_4(i + 32), FASTVIT_4(i + 36)
#define FASTVIT_NAMES_40_ FASTVIT_NAMES_30 "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39"

#define FASTVIT_PRODUCT(type, n, names, add) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #add  \
  ", 0;\n"                                   \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, "

// c [64, n] (+)= left · rightᵀ, both K-major in shared memory; a, b, add are the numbers of their operands in the text.
#define FASTVIT_SHARED_PRODUCT(n, names, registers, a, b, add)                                              \
  template <>                                                                                               \
  struct Product<n> {                                                                                       \
    template <typename T>                                                                                   \
    static __device__ __forceinline__ void issue(float* c, uint64_t left, uint64_t right, int accumulate) { \
      if constexpr (std::is_same_v<T, Half>) {                                                              \
        asm volatile(FASTVIT_PRODUCT("f16", n, names, add) "%" #a ", %" #b ", p, 1, 1, 0, 0;\n}"            \
                     : registers                                                                            \
                     : "l"(left), "l"(right), "r"(accumulate)                                               \
                     : "memory");                                                                           \
      } else {                                                                                              \
        asm volatile(FASTVIT_PRODUCT("bf16", n, names, add) "%" #a ", %" #b ", p, 1, 1, 0, 0;\n}"           \
                     : registers                                                                            \
                     : "l"(left), "l"(right), "r"(accumulate)                                               \
                     : "memory");                                                                           \
      }                                                                                                     \
    }                                                                                                       \
  };

// c [64, n] (+)= left · right: left [64, 16] in registers, as the accumulators of two products of 8 columns lie; right
// transposed in shared memory. a is the text of left's operands.
#define FASTVIT_REGISTER_PRODUCT(n, names, registers, a, b, add)                                           \
  template <>                                                                                              \
  struct RegisterProduct<n> {                                                                              \
    template <typename T>                                                                                  \
    static __device__ __forceinline__ void issue(float* c, const uint32_t (&left)[4], uint64_t right,      \
                                                 int accumulate) {                                         \
      if constexpr (std::is_same_v<T, Half>) {                                                             \
        asm volatile(FASTVIT_PRODUCT("f16", n, names, add) a ", %" #b ", p, 1, 1, 1;\n}"                   \
                     : registers                                                                           \
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate) \
                     : "memory");                                                                          \
      } else {                                                                                             \
        asm volatile(FASTVIT_PRODUCT("bf16", n, names, add) a ", %" #b ", p, 1, 1, 1;\n}"                  \
                     : registers                                                                           \
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right), "r"(accumulate) \
                     : "memory");                                                                          \
      }                                                                                                    \
    }                                                                                                      \
  };

template <int kColumns>
struct Product;
template <int kColumns>
struct RegisterProduct;

FASTVIT_SHARED_PRODUCT(32, FASTVIT_NAMES_16, FASTVIT_16(0), 16, 17, 18)
FASTVIT_SHARED_PRODUCT(64, FASTVIT_NAMES_32, FASTVIT_32(0), 32, 33, 34)
FASTVIT_SHARED_PRODUCT(80, FASTVIT_NAMES_40_, FASTVIT_40(0), 40, 41, 42)
FASTVIT_SHARED_PRODUCT(96, FASTVIT_NAMES_48, FASTVIT_48(0), 48, 49, 50)
FASTVIT_SHARED_PRODUCT(104, FASTVIT_NAMES_52, FASTVIT_52(0), 52, 53, 54)
FASTVIT_SHARED_PRODUCT(112, FASTVIT_NAMES_56, FASTVIT_56(0), 56, 57, 58)
FASTVIT_SHARED_PRODUCT(128, FASTVIT_NAMES_64, FASTVIT_64(0), 64, 65, 66)
FASTVIT_SHARED_PRODUCT(136, FASTVIT_NAMES_68, FASTVIT_68(0), 68, 69, 70)
FASTVIT_REGISTER_PRODUCT(64, FASTVIT_NAMES_32, FASTVIT_32(0), "{%32, %33, %34, %35}", 36, 37)
FASTVIT_REGISTER_PRODUCT(128, FASTVIT_NAMES_64, FASTVIT_64(0), "{%64, %65, %66, %67}", 68, 69)

template <typename T, int kColumns>
__device__ __forceinline__ void multiply_shared(float* c, uint64_t left, uint64_t right, bool accumulate) {
  Product<kColumns>::template issue<T>(c, left, right, accumulate);
}

template <typename T, int kColumns>
__device__ __forceinline__ void multiply_registers(float* c, const uint32_t (&left)[4], uint64_t right,
                                                   bool accumulate) {
  RegisterProduct<kColumns>::template issue<T>(c, left, right, accumulate);
}

}  // namespace fastvit::cuda

#endif

namespace fastvit::cuda {

// A matrix descriptor (PTX ISA 9.7.15.5.1.4): bits 16–29 the leading and 32–45 the stride byte
// offset, both / 16, and 1 at bit 62 for the 128-byte swizzle. Here the stride is that of eight rows. The leading
// offset counts only for a transposed operand wider than a panel: it is the way to the next one.
__device__ __forceinline__ constexpr uint64_t descriptor(uint32_t address, uint32_t next_panel_bytes = 16) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(next_panel_bytes >> 4) << 16 |
         uint64_t(8 * kPanelRowBytes >> 4) << 32 | uint64_t(1) << 62;
}

}  // namespace fastvit::cuda
