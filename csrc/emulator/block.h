// The block that is being emulated: what emulator.cpp, hopper.cpp and wgmma.cpp share.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace fastvit::emulator {

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
// Shared addresses start here, so that an address computed from 0 is out of bounds.
constexpr uint32_t kSharedBegin = 1024;
constexpr uint32_t kCellBytes = 2;
constexpr uint32_t kChunkBytes = 16;
// A row of a panel.
constexpr int kPanelRow = 128;

// What is known of two bytes of shared memory. A time is the number of barriers that the block has passed.
struct Cell {
  static constexpr int kNobody = -1, kInFlight = -2, kManyOfWarp = -3, kMany = -4;

  int writer = kNobody;  // kNobody: never written; kInFlight: a cp.async is on its way
  int reader = kNobody;
  int reader_warp = kNobody;
  uint32_t write_time = 0;
  uint32_t read_time = 0;
};

struct AsyncCopy {
  uint32_t address;
  uint32_t bytes;
  const void* pointer;
  bool valid;
};

enum class State { kReady, kAtCollective, kAtBarrier, kAtMessageBarrier, kDone };

struct Thread {
  Fiber fiber;
  int index = 0;
  State state = State::kDone;
  const char* waits_for = "";
  uint32_t waits_at = 0;  // an mbarrier's address
  void* operands = nullptr;
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;
};

struct Warp {
  int arrived = 0;
  int arrived_of_group = 0;  // threads of the warpgroup that begins with this warp
  int waiting = 0;           // at an instruction of the warp or warpgroup, the one below
  const char* what = "";
  int ended = 0;
  uint32_t synchronized = 0;  // the time of its last warp_barrier
};

// What follows is for sm_90. Order between warps is kept in vector clocks: one entry a warp, which counts what it has
// published by arriving at mbarriers, and one a mbarrier, which counts its phases. A warp knows what it has waited for.
constexpr int kMaxWarps = 16;
constexpr int kMaxMessageBarriers = 64;
using Clock = std::array<uint32_t, kMaxWarps + kMaxMessageBarriers>;

struct TensorCopy {
  uint32_t address;
  TensorMap map;
  std::array<int, 4> first;
};

struct MessageBarrier {
  uint32_t address = 0;
  uint32_t count = 0;
  uint32_t pending = 0;  // arrivals that this phase still waits for
  int64_t bytes = 0;     // announced and not there yet
  uint32_t phase = 0;    // phases that have ended
  bool fenced = false;
  int init_thread = 0;
  uint32_t init_time = 0;
  Clock arriving{}, ended{};
  std::deque<TensorCopy> copies;
};

// What is known of 16 bytes of shared memory that the copy engine writes and wgmma reads.
struct Chunk16 {
  enum State : uint8_t { kUnused, kInFlight, kLanded };

  State state = kUnused;
  uint8_t barrier = 0;            // the mbarrier on which it landed,
  uint32_t phase = 0;             // in this phase
  uint32_t reading = 0;           // a bit for each warp whose products still read it
  uint32_t read[kMaxWarps] = {};  // when each warp's last read was done, by its own clock
};

// A product of a warpgroup, as seen by one of its warps.
struct WarpProduct {
  std::array<float*, kWarp> accumulator;
  std::array<std::array<uint32_t, 4>, kWarp> left;  // if in registers
  WarpgroupProduct what;
};

struct HopperWarp {
  Clock clock{};
  bool fenced = false;
  std::vector<WarpProduct> open_group;
  std::deque<std::vector<WarpProduct>> groups;
  // The accumulators that are under way, by the first lane's address; meanwhile the registers hold NaN.
  std::map<float*, std::vector<std::array<float, kWarp>>> accumulators;
};

struct Block {
  int64_t index = 0;
  int64_t grid = 0;
  int threads = 0;
  int arrived = 0;
  uint32_t now = 1;
  uint32_t synchronized = 1;  // the time of the last barrier of the whole block
  Thread* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  const std::vector<Range>* memory = nullptr;  // what the kernel may touch
  std::exception_ptr fault;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Cell> cells;
  // Empty until the kernel makes its first mbarrier.
  std::vector<MessageBarrier> message_barriers;
  std::vector<Chunk16> chunks;
  std::vector<HopperWarp> hopper_warps;
};

extern Block block;
extern std::vector<std::unique_ptr<Thread>> pool;

[[noreturn]] void fail(const std::string& what);
std::string at(uint32_t address);
inline int warp_of(int thread) { return thread / kWarp; }
// Whether something that thread (or all of warp, or anybody) did at a time is ordered before what this thread does now.
bool ordered(int who, int warp, uint32_t time);
unsigned char* check_shared(uint32_t address, uint32_t bytes);
HopperWarp& this_warp();
Chunk16& chunk_at(uint32_t address);
// The 128-byte swizzle works on addresses.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }
// The parts of emulator.cpp's steps that are about sm_90.
void check_not_async(uint32_t address, uint32_t bytes);
void join_all_clocks();
void check_nothing_under_way(const Thread& thread);
std::string describe_message_barrier(uint32_t address);

}  // namespace fastvit::emulator
