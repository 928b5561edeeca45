#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>
#include <utility>

#include "block.h"

namespace fastvit::emulator {

// One launch at a time; thread-local state would be looked up at every access of a kernel.
Block block;
std::vector<std::unique_ptr<Thread>> pool;

void fail(const std::string& what) {
  const Thread* thread = block.running;
  std::string where = thread ? "thread " + std::to_string(thread->index) + " of block " : "block ";
  throw Fault(what + " (" + where + std::to_string(block.index) + " of " + std::to_string(block.grid) + ", " +
              std::to_string(block.threads) + " threads)");
}

bool ordered(int who, int warp, uint32_t time) {
  const int self = block.running->index;
  if (who == self || time < block.synchronized) return true;
  return who != Cell::kMany && warp == warp_of(self) && time < block.warps[warp_of(self)].synchronized;
}

std::string at(uint32_t address) { return " at byte " + std::to_string(int64_t(address) - kSharedBegin); }

unsigned char* check_shared(uint32_t address, uint32_t bytes) {
  if (address < kSharedBegin || uint64_t(address) + bytes > kSharedBegin + block.shared.size()) {
    fail("shared memory out of bounds: " + std::to_string(bytes) + " bytes" + at(address) + " of " +
         std::to_string(block.shared.size()));
  }
  if (address % bytes) fail("misaligned shared memory access: " + std::to_string(bytes) + " bytes" + at(address));
  return block.shared.data() + (address - kSharedBegin);
}

namespace {

std::mutex launching;
thread_local std::vector<Range> global_memory;

template <typename Function>
void for_each_cell(uint32_t address, uint32_t bytes, Function function) {
  const uint32_t first = (address - kSharedBegin) / kCellBytes;
  const uint32_t last = (address - kSharedBegin + bytes - 1) / kCellBytes;
  for (uint32_t i = first; i <= last; ++i) function(block.cells[i]);
}

void check_write(Cell& cell, uint32_t address) {
  if (cell.writer == Cell::kInFlight) fail("shared memory written while a cp.async is on its way to it" + at(address));
  if (cell.writer >= 0 && !ordered(cell.writer, warp_of(cell.writer), cell.write_time)) {
    fail("race: shared memory" + at(address) + " is written, and thread " + std::to_string(cell.writer) +
         " wrote it with no barrier between");
  }
  if (cell.reader != Cell::kNobody && !ordered(cell.reader, cell.reader_warp, cell.read_time)) {
    fail("race: shared memory" + at(address) + " is written, and " +
         (cell.reader >= 0 ? "thread " + std::to_string(cell.reader) : "another thread") +
         " read it with no barrier between");
  }
}

void arrive(const AsyncCopy& copy) {
  unsigned char* target = block.shared.data() + (copy.address - kSharedBegin);
  if (copy.valid) {
    std::memcpy(target, copy.pointer, copy.bytes);
  } else {
    std::memset(target, 0, copy.bytes);
  }
  for_each_cell(copy.address, copy.bytes, [](Cell& cell) {
    cell.writer = block.running->index;
    cell.write_time = block.now;
    cell.reader = Cell::kNobody;
  });
}

void release(State from) {
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i]->state == from) pool[i]->state = State::kReady;
  }
}

void thread_main(void* argument) {
  auto* thread = static_cast<Thread*>(argument);
  try {
    (*block.kernel)();
    Warp& warp = block.warps[warp_of(thread->index)];
    ++warp.ended;
    if (warp.arrived) fail("a thread has ended while others of its warp wait for it");
    if (block.arrived) fail("a barrier that not all threads reach: this thread has ended, others wait");
    check_nothing_under_way(*thread);
  } catch (...) {
    block.fault = std::current_exception();
  }
  thread->state = State::kDone;
  thread->fiber.leave(true);
}

void describe_deadlock() {
  std::string waiting;
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i]->state == State::kDone) continue;
    waiting = pool[i]->waits_for;
    if (pool[i]->state == State::kAtMessageBarrier) waiting += describe_message_barrier(pool[i]->waits_at);
    block.running = pool[i].get();
    break;
  }
  int done = 0, at_barrier = 0;
  for (int i = 0; i < block.threads; ++i) {
    done += pool[i]->state == State::kDone;
    at_barrier += pool[i]->state == State::kAtBarrier;
  }
  fail("a barrier that not all threads reach: " + std::to_string(at_barrier) + " threads wait at a barrier, " +
       std::to_string(done) + " have ended, and this one waits for its warp or block at " + waiting);
}

// Runs one warp until each of its threads waits for another warp or has ended; says whether any thread ran.
bool run_warp(int warp) {
  bool ran = false;
  for (bool again = true; again;) {
    again = false;
    for (int i = warp * kWarp; i < std::min((warp + 1) * kWarp, block.threads); ++i) {
      if (pool[i]->state != State::kReady) continue;
      block.running = pool[i].get();
      pool[i]->fiber.enter();
      block.running = nullptr;
      if (block.fault) std::rethrow_exception(std::exchange(block.fault, nullptr));
      again = ran = true;
    }
  }
  return ran;
}

uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

void run_block(uint64_t& random) {
  const int warps = int(block.warps.size());
  std::vector<int> order(warps);
  std::iota(order.begin(), order.end(), 0);
  for (bool progress = true; progress;) {
    progress = false;
    if (settings().seed) {
      for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[next_random(random) % (i + 1)]);
    }
    for (int warp : order) progress = run_warp(warp) || progress;
  }
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i]->state != State::kDone) describe_deadlock();
  }
}

void prepare_block(int64_t index, int threads, int shared_bytes) {
  block.index = index;
  block.arrived = 0;
  block.now = block.synchronized = 1;
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp());
  block.shared.assign(shared_bytes, 0xFF);  // NaN in every type
  block.cells.assign(shared_bytes / kCellBytes + 1, Cell());
  block.message_barriers.clear();
  block.chunks.clear();
  block.hopper_warps.clear();
  for (int i = 0; i < threads; ++i) {
    Thread& thread = *pool[i];
    thread.index = i;
    thread.state = State::kReady;
    thread.open_group.clear();
    thread.groups.clear();
    thread.fiber.prepare(thread_main, &thread);
  }
}

}  // namespace

Settings& settings() {
  static Settings value;
  return value;
}

Statistics& statistics() {
  static Statistics value;
  return value;
}

GlobalMemory::GlobalMemory(std::vector<Range> ranges) : previous_(std::exchange(global_memory, std::move(ranges))) {}

GlobalMemory::~GlobalMemory() { global_memory = std::move(previous_); }

void run(const Launch& launch, const std::function<void()>& kernel) {
  const auto [_, blocks, threads, shared_bytes] = launch;
  if (blocks < 1 || blocks > INT32_MAX) throw Fault("a launch of " + std::to_string(blocks) + " blocks");
  if (threads < kWarp || threads > 1024 || threads % kWarp) {
    throw Fault("a launch of " + std::to_string(threads) + " threads; accepted are whole warps, to 1024 threads");
  }
  if (shared_bytes > settings().shared_bytes) {
    throw Fault("a launch with " + std::to_string(shared_bytes) + " bytes of shared memory; the device has " +
                std::to_string(settings().shared_bytes));
  }
  const std::lock_guard lock(launching);
  statistics().launches.push_back(launch);
  if (settings().only_notes) return;
  while (int(pool.size()) < threads) pool.push_back(std::make_unique<Thread>());
  statistics().blocks += uint64_t(blocks);
  statistics().largest_shared_bytes = std::max(statistics().largest_shared_bytes, shared_bytes);
  block.grid = blocks;
  block.threads = threads;
  block.kernel = &kernel;
  block.memory = &global_memory;
  uint64_t random = settings().seed;
  struct Reset {
    ~Reset() { block.running = nullptr; }
  } reset;
  for (int64_t index = 0; index < blocks; ++index) {
    prepare_block(index, threads, shared_bytes);
    run_block(random);
  }
}

int thread_index() { return block.running->index; }
int block_threads() { return block.threads; }
int64_t block_index() { return block.index; }
int64_t grid_blocks() { return block.grid; }
uint32_t shared_begin() { return kSharedBegin; }

void barrier() {
  Thread* self = block.running;
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i]->state == State::kDone) fail("a barrier that not all threads reach: some have ended");
  }
  if (++block.arrived == block.threads) {
    block.arrived = 0;
    block.synchronized = ++block.now;
    join_all_clocks();
    release(State::kAtBarrier);
    return;
  }
  self->state = State::kAtBarrier;
  self->waits_for = "barrier";
  self->fiber.leave();
}

void warp_barrier() {
  collective("warp_barrier", nullptr,
             [](void* const*) { block.warps[warp_of(block.running->index)].synchronized = ++block.now; });
}

const void* shared_read(uint32_t address, uint32_t bytes, bool whole_warp) {
  const unsigned char* source = check_shared(address, bytes);
  check_not_async(address, bytes);
  const int self = block.running->index;
  for_each_cell(address, bytes, [&](Cell& cell) {
    if (cell.writer == Cell::kNobody) fail("shared memory read before it is written" + at(address));
    if (cell.writer == Cell::kInFlight) fail("shared memory read while a cp.async is on its way to it" + at(address));
    if (!ordered(cell.writer, warp_of(cell.writer), cell.write_time)) {
      fail("race: shared memory" + at(address) + " is read, and thread " + std::to_string(cell.writer) +
           " wrote it with no barrier between");
    }
    if (cell.reader == Cell::kNobody || ordered(cell.reader, cell.reader_warp, cell.read_time)) {
      cell.reader = whole_warp ? Cell::kManyOfWarp : self;
      cell.reader_warp = warp_of(self);
    } else {
      cell.reader = cell.reader_warp == warp_of(self) && cell.reader != Cell::kMany ? Cell::kManyOfWarp : Cell::kMany;
    }
    cell.read_time = block.now;
  });
  return source;
}

void* shared_write(uint32_t address, uint32_t bytes) {
  unsigned char* target = check_shared(address, bytes);
  check_not_async(address, bytes);
  for_each_cell(address, bytes, [&](Cell& cell) {
    check_write(cell, address);
    cell.writer = block.running->index;
    cell.write_time = block.now;
    cell.reader = Cell::kNobody;
  });
  return target;
}

void check_global(const void* pointer, uint32_t bytes, bool write) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % bytes) fail("misaligned global memory access of " + std::to_string(bytes) + " bytes");
  const Range* read_only = nullptr;
  for (const Range& range : *block.memory) {
    const auto begin = reinterpret_cast<uintptr_t>(range.data);
    if (address < begin || address + bytes > begin + uintptr_t(range.bytes)) continue;
    if (!write || range.writable) return;
    read_only = &range;
  }
  if (read_only) fail(std::string("global memory written that is an input: ") + read_only->name);
  std::string nearest;
  for (const Range& range : *block.memory) {
    const auto begin = reinterpret_cast<uintptr_t>(range.data);
    nearest += std::string(nearest.empty() ? "" : ", ") + range.name + " " + std::to_string(int64_t(address - begin)) +
               " of " + std::to_string(range.bytes);
  }
  fail(std::string("global memory out of bounds: ") + (write ? "write" : "read") + " of " + std::to_string(bytes) +
       " bytes, at byte: " + nearest);
}

void async_copy(uint32_t address, const void* pointer, uint32_t bytes, bool valid) {
  check_shared(address, bytes);
  if (valid) check_global(pointer, bytes, false);
  // PTX asks that of a source of which nothing is read, too.
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) {
    fail("misaligned source of an asynchronous copy of " + std::to_string(bytes) + " bytes");
  }
  ++statistics().async_copies;
  for_each_cell(address, bytes, [&](Cell& cell) {
    check_write(cell, address);
    cell.writer = Cell::kInFlight;
  });
  block.running->open_group.push_back({address, bytes, pointer, valid});
}

void async_commit() {
  Thread* self = block.running;
  self->groups.push_back(std::exchange(self->open_group, {}));
}

// The latest moment at which a copy may arrive is when somebody has waited for it; so that is when it arrives.
void async_wait(int groups) {
  Thread* self = block.running;
  while (int(self->groups.size()) > groups) {
    for (const AsyncCopy& copy : self->groups.front()) arrive(copy);
    self->groups.pop_front();
  }
}

void collective(const char* what, void* operands, Resolve resolve, int threads) {
  Thread* self = block.running;
  const int first = self->index / threads * threads;
  Warp& warp = block.warps[warp_of(first)];
  int& arrived = threads == kWarp ? warp.arrived : warp.arrived_of_group;
  self->operands = operands;
  self->waits_for = what;
  if (first + threads > block.threads) fail(std::string(what) + ": not a whole warpgroup");
  for (int i = warp_of(first); i < warp_of(first + threads); ++i) {
    if (block.warps[i].ended) fail(std::string(what) + ": a thread of the warp has ended");
  }
  Warp& own = block.warps[warp_of(self->index)];
  if (own.waiting++ == 0) own.what = what;
  if (own.what != what && std::strcmp(own.what, what) != 0) {
    fail(std::string(what) + ": another thread of the warp waits at " + own.what);
  }
  if (++arrived < threads) {
    self->state = State::kAtCollective;
    self->fiber.leave();
    return;
  }
  arrived = 0;
  for (int i = warp_of(first); i < warp_of(first + threads); ++i) block.warps[i].waiting = 0;
  std::array<void*, kWarpgroup> all;
  for (int i = first; i < first + threads; ++i) all[i - first] = pool[i]->operands;
  resolve(all.data());
  for (int i = first; i < first + threads; ++i) {
    if (pool[i]->state == State::kAtCollective) pool[i]->state = State::kReady;
  }
}

}  // namespace fastvit::emulator
