// Kernels of a few lines, all but the first with a fault. Prints what the emulator says of each, in the order of
// tests/test_emulator_detector.py.
#include <cstdio>
#include <functional>
#include <vector>

#include "cuda/primitives.cuh"
#include "emulator/emulator.h"

namespace fastvit::cuda {
namespace {

// One object, so that their distance is known.
struct alignas(16) Memory {
  uint32_t given[8];
  uint32_t between[8];
  uint32_t written[8];
} memory;
uint32_t* const given = memory.given;
uint32_t* const written = memory.written;

// One block of two warps with 64 bytes of shared memory.
std::string said(const std::function<void()>& kernel) {
  const emulator::GlobalMemory guard({{"given", given, 32, false}, {"written", written, 32, true}});
  try {
    emulator::run({nullptr, 1, 64, 64}, kernel);
  } catch (const emulator::Fault& fault) {
    return fault.what();
  }
  return "nothing";
}

bool is_thread(int index) { return thread_index() == index; }

const std::vector<std::function<void()>> kKernels = {
    // Sound: through shared memory, with a barrier.
    [] {
      if (is_thread(0)) store_shared<uint32_t>(shared_memory() + 60, load_global<uint32_t>(given + 7));
      barrier();
      if (is_thread(63)) store_global<uint32_t>(written + 7, load_shared<uint32_t>(shared_memory() + 60));
    },
    // Half of it is written.
    [] {
      if (!is_thread(5)) return;
      store_shared<uint16_t>(shared_memory() + 8, uint16_t(0));
      load_shared<uint32_t>(shared_memory() + 8);
    },
    [] {
      if (is_thread(5)) store_shared<uint32_t>(shared_memory() + 2, 0);
    },
    [] {
      if (is_thread(5)) load_global<uint64_t>(given + 1);
    },
    [] {
      if (is_thread(5)) store_shared<uint32_t>(shared_memory() + 64, 0);
    },
    [] {
      if (is_thread(5)) load_shared<uint16_t>(shared_memory() - 2);
    },
    [] {
      if (is_thread(5)) load_global<uint32_t>(given + 8);
    },
    [] {
      if (is_thread(5)) store_global<uint32_t>(written - 1, 0);
    },
    [] {
      if (is_thread(5)) store_global<uint32_t>(given + 1, 0);
    },
    // One warp only; then a lane only, of a warp's instruction.
    [] {
      if (thread_index() < 32) barrier();
    },
    [] {
      if (!is_thread(5)) shuffle_xor(1.0f, 1);
    },
    [] {
      if (thread_index() % 2) {
        shuffle_xor(1.0f, 1);
      } else {
        warp_barrier();
      }
    },
    [] {
      if (is_thread(40)) store_shared<uint32_t>(shared_memory() + 4, 0);
      if (is_thread(5)) load_shared<uint32_t>(shared_memory() + 4);
    },
    [] { store_shared<uint32_t>(shared_memory() + 4 * (thread_index() % 16), 0); },
    [] {
      if (!is_thread(5)) return;
      cp_async<16>(shared_memory() + 16, given, true);
      cp_async_commit();
      load_shared<uint32_t>(shared_memory() + 16);
    },
    [] {
      if (!is_thread(5)) return;
      cp_async<16>(shared_memory() + 16, given, true);
      store_shared<uint32_t>(shared_memory() + 16, 0);
    },
    // Nothing is read.
    [] {
      if (is_thread(5)) cp_async<16>(shared_memory() + 16, given + 1, false);
    },
};

}  // namespace
}  // namespace fastvit::cuda

int main() {
  for (const auto& kernel : fastvit::cuda::kKernels) std::printf("%s\n", fastvit::cuda::said(kernel).c_str());
}
