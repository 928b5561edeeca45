// Launching a kernel, and what the launchers ask of a device: on CUDA, or in the emulator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef FASTVIT_EMULATOR
#include "../emulator/emulator.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastvit::cuda {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes_per_block;           // what one block may ask for
  int shared_bytes_per_multiprocessor;  // what the blocks of one multiprocessor share
  int compute_capability;               // 10 · major + minor
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
};

// The runtime's own part of each block's shared memory (CUDA programming guide, compute capability 8.0 and up).
constexpr int kReservedSharedBytes = 1024;

#ifdef FASTVIT_EMULATOR

inline DeviceLimits device_limits() {
  const emulator::Settings& settings = emulator::settings();
  return {settings.multiprocessors, settings.shared_bytes, settings.shared_bytes + kReservedSharedBytes,
          settings.compute_capability};
}

// How many blocks of a kernel share a multiprocessor, at least 1: persistent blocks beyond them would wait until a
// whole one has ended. The emulator knows no registers, unless it was told what they leave room for.
template <typename Params>
int64_t resident_blocks(void (*kernel)(Params), const DeviceLimits& device, int threads, int64_t shared_bytes) {
  const int shared = device.shared_bytes_per_multiprocessor / (int(shared_bytes) + kReservedSharedBytes);
  const auto& occupancy = emulator::settings().occupancy;
  return std::max(
      1, occupancy ? occupancy({reinterpret_cast<const void*>(kernel), 0, threads, int(shared_bytes)}) : shared);
}

template <typename Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, void*, const Params& params) {
  emulator::run({reinterpret_cast<const void*>(kernel), shape.blocks, shape.threads, shape.shared_bytes},
                [&] { kernel(params); });
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline DeviceLimits device_limits() {
  int device = 0;
  DeviceLimits limits{};
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  check(cudaDeviceGetAttribute(&limits.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory per block");
  check(cudaDeviceGetAttribute(&limits.shared_bytes_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                               device),
        "shared memory per multiprocessor");
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "compute capability");
  limits.compute_capability = 10 * major + minor;
  return limits;
}

// Lets a kernel ask for as much shared memory as a block may have. Never for less: the limit is the kernel's, not the
// launch's, and another thread may be about to launch it with more.
template <typename Params>
void allow_shared_bytes(void (*kernel)(Params), int64_t shared_bytes) {
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shared_bytes <= kWithoutOptIn) return;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory per block");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory of a kernel");
}

// How many blocks of a kernel share a multiprocessor, at least 1: persistent blocks beyond them would wait until a
// whole one has ended.
template <typename Params>
int64_t resident_blocks(void (*kernel)(Params), const DeviceLimits&, int threads, int64_t shared_bytes) {
  int blocks = 0;
  allow_shared_bytes(kernel, shared_bytes);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared_bytes)),
        "blocks per multiprocessor");
  return std::max(1, blocks);
}

template <typename Params>
void launch(void (*kernel)(Params), const LaunchShape& shape, void* stream, const Params& params) {
  allow_shared_bytes(kernel, shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, params), "kernel launch");
}

#endif

}  // namespace fastvit::cuda
