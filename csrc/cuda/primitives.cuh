// The few machine instructions that the kernels are made of (sm_80 and up), each behind a function. The emulator has
// the same functions for the host (emulator/primitives.h): a kernel uses these words alone, so one source runs on both.
//
// Shared memory is addressed in bytes by 32-bit shared-space addresses, never by C++ pointers. All 32 lanes of a warp
// call ldmatrix, mma and shuffle_xor together; barrier is for all threads of the block.
#pragma once

#include <cstdint>

namespace fastvit::cuda {

// The two element types: storage alone, arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// 16 bytes: the widest access.
struct alignas(16) Chunk {
  uint32_t word[4];
};

}  // namespace fastvit::cuda

#ifdef FASTVIT_EMULATOR
#include "../emulator/primitives.h"
#else

#include <cuda_runtime.h>

#include <type_traits>

namespace fastvit::cuda {

__device__ __forceinline__ int thread_index() { return int(threadIdx.x); }

// The lane in the warp. Volatile, so that what is derived from it, mostly addresses, is computed where it is used
// instead of being kept in registers, across loops, that the accumulators need.
__device__ __forceinline__ int lane_index() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

__device__ __forceinline__ int block_threads() { return int(blockDim.x); }
__device__ __forceinline__ int block_index() { return int(blockIdx.x); }
__device__ __forceinline__ int grid_blocks() { return int(gridDim.x); }

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// The first byte of the block's dynamic shared memory.
__device__ __forceinline__ uint32_t shared_memory() {
  extern __shared__ __align__(128) unsigned char storage[];
  return uint32_t(__cvta_generic_to_shared(storage));
}

// V is uint16_t, uint32_t, float or Chunk, and the address a multiple of its size.
template <typename V>
__device__ __forceinline__ V load_shared(uint32_t address) {
  V value;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (std::is_same_v<V, float>) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  } else {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  }
  return value;
}

template <typename V>
__device__ __forceinline__ void store_shared(uint32_t address, V value) {
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]),
                 "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
  } else if constexpr (std::is_same_v<V, float>) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
  } else if constexpr (sizeof(V) == 4) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
  } else {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
  }
}

// V is any type of 1, 2, 4, 8 or 16 bytes.
template <typename V>
__device__ __forceinline__ V load_global(const void* pointer) {
  return *static_cast<const V*>(pointer);
}

template <>
__device__ __forceinline__ Chunk load_global<Chunk>(const void* pointer) {
  const uint4 value = *static_cast<const uint4*>(pointer);
  return {{value.x, value.y, value.z, value.w}};
}

template <typename V>
__device__ __forceinline__ void store_global(void* pointer, V value) {
  *static_cast<V*>(pointer) = value;
}

template <>
__device__ __forceinline__ void store_global<Chunk>(void* pointer, Chunk value) {
  *static_cast<uint4*>(pointer) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

// Start to copy kBytes (4, 8 or 16) from global to shared memory; zeros if not valid, and then nothing is read.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t address, const void* pointer, bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(pointer), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(pointer), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most kGroups of this thread's latest groups are under way. Other threads see the rest after a barrier.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Load kCount (1, 2, 4) matrices of 8 × 8 16-bit elements. Lane 8i + r names row r of matrix i (16 bytes); fragment[i]
// of lane l holds elements (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of matrix i, or of its transpose.
template <int kCount, bool kTranspose>
__device__ __forceinline__ void ldmatrix(uint32_t (&fragment)[kCount], uint32_t address) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kCount == 4 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(fragment[0]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(fragment[0])
                 : "r"(address)
                 : "memory");
  }
}

// c [16, 8] += a [16, 16] b [16, 8], accumulated in float. With g = lane / 4 and t = lane % 4, a lane holds
//   a: elements (g, 2t…), (g + 8, 2t…), (g, 2t + 8…), (g + 8, 2t + 8…), two to a word;
//   b: elements (2t…, g), (2t + 8…, g), two rows to a word;  c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// c [16, 8] += a [16, 8] b [8, 8]: the first halves of the fragments above.
template <typename T>
__device__ __forceinline__ void mma_m16n8k8(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  if constexpr (std::is_same_v<T, Half>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
}

// The value of the lane whose number differs in the bits of mask.
__device__ __forceinline__ float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }

__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float natural_log(float x) { return logf(x); }

// A product that is rounded, and never fused with the sum that it goes into.
__device__ __forceinline__ float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
}

template <typename T>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, Half>) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
  } else {
    return __uint_as_float(uint32_t(bits) << 16);
  }
}

}  // namespace fastvit::cuda

#endif

namespace fastvit::cuda {

__device__ __forceinline__ constexpr float infinity() { return __builtin_huge_valf(); }

template <typename T>
__device__ __forceinline__ float low_half(uint32_t word) {
  return to_float<T>(uint16_t(word));
}

template <typename T>
__device__ __forceinline__ float high_half(uint32_t word) {
  return to_float<T>(uint16_t(word >> 16));
}

}  // namespace fastvit::cuda
