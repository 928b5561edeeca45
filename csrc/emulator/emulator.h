// Runs csrc/cuda on a CPU, for tests only: threads of a block are fibers, one block after another.
//
// It knows what a kernel may do wrong without crashing, and ends the launch with a Fault that says where:
//   shared memory read before it is written, or while a cp.async is still on its way to it; two threads that touch the
//   same shared memory with nothing between them that orders them; access out of bounds or misaligned, shared or
//   global; a barrier, or an instruction of a whole warp, that not all threads reach.
// Of sm_90, the words of cuda/primitives_sm90.cuh alone: mbarriers, loads of boxes of 64 16-bit columns with the
// 128-byte swizzle (they land when somebody waits for them), wgmma with float accumulators (computed when somebody
// waits for it).
//   Found there: wgmma on memory that was never loaded, is being loaded, or whose mbarrier the warp has not waited for;
//   a load over what a wgmma still reads, or has read with no mbarrier between; accumulators used before the wait;
//   missing fences; too many arrivals or bytes; phases that never end.
// What it does not model: time, caches, the order of global writes, atomics; clusters, multicast, tensor stores, other
// swizzles; threads that access memory which tensor loads write (refused); the registers of setmaxnreg; named barriers
// and votes of a warp, which no kernel uses: primitives.cuh has no word for them.
// Between warps, what one lane of a warp has waited for counts as seen by its other lanes.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastvit::emulator {

struct Launch {
  const void* kernel;
  int64_t blocks;
  int threads;
  int shared_bytes;
};

struct Settings {
  // Few multiprocessors, so that persistent blocks get more than one piece of work.
  int multiprocessors = 3;
  int shared_bytes = 227 * 1024;
  int compute_capability = 90;
  // 0 runs the warps in order; any other number shuffles them at each step.
  uint64_t seed = 0;
  // Launches are only noted, and nothing is computed.
  bool only_notes = false;
  // How many blocks of a launch share a multiprocessor, where shared memory alone does not say.
  std::function<int(const Launch&)> occupancy;
};

Settings& settings();

// What kernels did since the last reset, for tests to look at.
struct Statistics {
  std::vector<Launch> launches;
  uint64_t blocks = 0;
  uint64_t matrix_products = 0;  // mma of a warp
  uint64_t matrix_loads = 0;     // 8 × 8 matrices by ldmatrix
  uint64_t bank_conflicts = 0;   // of those, the ones whose rows meet in a bank
  uint64_t async_copies = 0;     // cp.async of a thread
  uint64_t tensor_loads = 0;     // boxes
  uint64_t warpgroup_products = 0;
  int largest_shared_bytes = 0;
};

Statistics& statistics();

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Global memory that kernels may touch while this object lives, on this thread.
struct Range {
  const char* name;
  const void* data;
  int64_t bytes;
  bool writable;
};

class GlobalMemory {
 public:
  explicit GlobalMemory(std::vector<Range> ranges);
  ~GlobalMemory();
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

 private:
  std::vector<Range> previous_;
};

void run(const Launch& launch, const std::function<void()>& kernel);

// What the primitives are made of; called by a thread of a running block.
int thread_index();
int block_threads();
int64_t block_index();
int64_t grid_blocks();
void barrier();
void warp_barrier();
uint32_t shared_begin();
// Check an access and return where the bytes are.
const void* shared_read(uint32_t address, uint32_t bytes, bool whole_warp = false);
void* shared_write(uint32_t address, uint32_t bytes);
void check_global(const void* pointer, uint32_t bytes, bool write);
void async_copy(uint32_t address, const void* pointer, uint32_t bytes, bool valid);
void async_commit();
void async_wait(int groups);
// All lanes of the warp meet here; the last one calls resolve with the operands of every lane.
using Resolve = void (*)(void* const* operands);
void collective(const char* what, void* operands, Resolve resolve, int threads = 32);

// A tensor [sizes] of 16-bit elements, innermost first, and the box that one load takes of it; strides in bytes.
struct TensorMap {
  const char* data;
  int64_t sizes[4];
  int64_t strides[3];
  uint32_t box[4];
};

TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]);

// accumulator [64, columns] (+)= left [64, 16] · right [16, columns], as one thread of the warpgroup gives it.
struct WarpgroupProduct {
  float* accumulator;
  int columns;
  uint64_t left_descriptor;
  const uint32_t* left;  // four registers, or nullptr: by descriptor
  uint64_t right_descriptor;
  bool transposed;
  bool accumulate;
  float (*to_float)(uint16_t);
};

// Where element (row, k) of the operand that a descriptor describes lies.
uint32_t operand_address(uint64_t descriptor, bool transposed, int row, int k);

void message_barrier_init(uint32_t address, uint32_t count);
void message_barrier_init_fence();
void message_barrier_arrive(uint32_t address);
void message_barrier_expect(uint32_t address, uint32_t bytes);
void message_barrier_wait(uint32_t address, uint32_t parity);
void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier, const std::array<int, 4>& first);
void product_fence();
void product_start(const WarpgroupProduct& product);
void product_commit();
void product_wait(int groups);

}  // namespace fastvit::emulator
