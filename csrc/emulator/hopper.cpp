// The emulator's sm_90: mbarriers and tensor loads.
#include <algorithm>
#include <cstring>

#include "block.h"

namespace fastvit::emulator {
namespace {

void join(Clock& clock, const Clock& other) {
  for (size_t i = 0; i < clock.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

MessageBarrier& find(uint32_t address) {
  for (MessageBarrier& barrier : block.message_barriers) {
    if (barrier.address != address) continue;
    if (!ordered(barrier.init_thread, warp_of(barrier.init_thread), barrier.init_time)) {
      fail("mbarrier" + at(address) + " is used with no barrier between this and its mbarrier_init");
    }
    return barrier;
  }
  fail("mbarrier" + at(address) + " is used before mbarrier_init");
}

size_t index_of(const MessageBarrier& barrier) { return size_t(&barrier - block.message_barriers.data()); }

void wake(const MessageBarrier& barrier) {
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i]->state == State::kAtMessageBarrier && pool[i]->waits_at == barrier.address) {
      pool[i]->state = State::kReady;
    }
  }
}

void end_phase_if_complete(MessageBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  barrier.arriving[kMaxWarps + index_of(barrier)] = ++barrier.phase;
  barrier.ended = barrier.arriving;
  wake(barrier);
}

// A box's rows one after another, each of one panel.
template <typename Function>
void for_each_row(const TensorCopy& copy, Function function) {
  for (int row = 0; row < int(copy.map.box[1]); ++row) {
    const bool inside = copy.first[1] >= 0 && copy.first[1] + row < copy.map.sizes[1] && copy.first[2] >= 0 &&
                        copy.first[2] < copy.map.sizes[2] && copy.first[3] >= 0 && copy.first[3] < copy.map.sizes[3];
    const int64_t offset = int64_t(copy.first[1] + row) * copy.map.strides[0] +
                           int64_t(copy.first[2]) * copy.map.strides[1] + int64_t(copy.first[3]) * copy.map.strides[2];
    for (uint32_t i = 0; i < kPanelRow / kChunkBytes; ++i) {
      const int column = copy.first[0] + int(i) * 8;
      const char* source = copy.map.data + offset + column * 2;
      const bool has = inside && column + 8 <= copy.map.sizes[0];
      function(swizzle(copy.address + row * kPanelRow + i * kChunkBytes), has ? source : nullptr);
    }
  }
}

void land(MessageBarrier& barrier) {
  for_each_row(barrier.copies.front(), [&](uint32_t address, const char* source) {
    unsigned char* target = check_shared(address, kChunkBytes);
    source ? std::memcpy(target, source, kChunkBytes) : std::memset(target, 0, kChunkBytes);
    Chunk16& chunk = chunk_at(address);
    chunk.state = Chunk16::kLanded;
    chunk.barrier = uint8_t(index_of(barrier));
    chunk.phase = barrier.phase;
  });
  barrier.bytes -= int64_t(kPanelRow) * barrier.copies.front().map.box[1];
  barrier.copies.pop_front();
  if (barrier.bytes < 0) fail("more bytes come to the mbarrier" + at(barrier.address) + " than were announced");
}

void arrive(uint32_t address, uint32_t bytes) {
  HopperWarp& warp = this_warp();
  MessageBarrier& barrier = find(address);
  if (barrier.pending == 0) fail("more arrivals at the mbarrier" + at(address) + " than its count, in one phase");
  --barrier.pending;
  barrier.bytes += bytes;
  join(barrier.arriving, warp.clock);
  ++warp.clock[warp_of(block.running->index)];
  end_phase_if_complete(barrier);
  wake(barrier);  // the last arrival may be what copies have waited for
}

}  // namespace

HopperWarp& this_warp() {
  if (block.hopper_warps.empty()) {
    if (int(block.warps.size()) > kMaxWarps) fail("not emulated: mbarriers or wgmma in blocks of over 16 warps");
    block.hopper_warps.resize(block.warps.size());
    block.chunks.assign(block.shared.size() / kChunkBytes + 1, Chunk16());
    for (size_t w = 0; w < block.warps.size(); ++w) block.hopper_warps[w].clock[w] = 1;
  }
  return block.hopper_warps[warp_of(block.running->index)];
}

Chunk16& chunk_at(uint32_t address) {
  check_shared(address, kChunkBytes);
  return block.chunks[(address - kSharedBegin) / kChunkBytes];
}

TensorMap tensor_map(const void* data, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                     const uint32_t (&box)[4]) {
  TensorMap map{static_cast<const char*>(data), {}, {}, {}};
  for (int i = 0; i < 4; ++i) {
    map.sizes[i] = int64_t(sizes[i]), map.box[i] = box[i];
    if (sizes[i] < 1 || box[i] < 1 || box[i] > 256) throw Fault("tensor map: a size under 1 or a box of over 256");
  }
  for (int i = 0; i < 3; ++i) {
    map.strides[i] = int64_t(strides[i]);
    if (strides[i] % 16 || strides[i] >= uint64_t(1) << 40) throw Fault("tensor map: a stride that is not allowed");
  }
  if (reinterpret_cast<uintptr_t>(data) % 16) throw Fault("tensor map: its address is not a multiple of 16");
  if (box[0] * 2 != kPanelRow || box[2] != 1 || box[3] != 1) throw Fault("not emulated: boxes other than of a panel");
  return map;
}

void message_barrier_init(uint32_t address, uint32_t count) {
  this_warp();
  shared_write(address, 8);
  for (const MessageBarrier& barrier : block.message_barriers) {
    if (barrier.address == address) fail("mbarrier_init twice" + at(address));
  }
  if (block.message_barriers.size() == kMaxMessageBarriers) fail("not emulated: over 64 mbarriers");
  MessageBarrier barrier;
  barrier.address = address;
  barrier.count = barrier.pending = count;
  barrier.init_thread = block.running->index;
  barrier.init_time = block.now;
  block.message_barriers.push_back(barrier);
}

void message_barrier_init_fence() {
  for (MessageBarrier& barrier : block.message_barriers) {
    if (barrier.init_thread == block.running->index) barrier.fenced = true;
  }
}

void message_barrier_arrive(uint32_t address) { arrive(address, 0); }
void message_barrier_expect(uint32_t address, uint32_t bytes) { arrive(address, bytes); }

// The latest moment at which a copy may land is when somebody waits for it; so that is when it lands.
void message_barrier_wait(uint32_t address, uint32_t parity) {
  HopperWarp& warp = this_warp();
  MessageBarrier& barrier = find(address);
  while ((barrier.phase & 1) == parity) {
    while (barrier.pending == 0 && barrier.bytes > 0 && !barrier.copies.empty()) land(barrier);
    end_phase_if_complete(barrier);
    if ((barrier.phase & 1) != parity) break;
    block.running->state = State::kAtMessageBarrier;
    block.running->waits_for = "mbarrier_wait";
    block.running->waits_at = address;
    block.running->fiber.leave();
  }
  join(warp.clock, barrier.ended);
}

void tensor_load(uint32_t address, const TensorMap& map, uint32_t barrier_address, const std::array<int, 4>& first) {
  const Clock& clock = this_warp().clock;
  MessageBarrier& barrier = find(barrier_address);
  if (!barrier.fenced) fail("tensor load to an mbarrier without mbarrier_init_fence");
  if (address % (8 * kPanelRow)) fail("tensor load to a panel that does not begin at a multiple of 1024 bytes");
  const TensorCopy copy{address, map, first};
  for_each_row(copy, [&](uint32_t target, const char* source) {
    if (source) check_global(source, kChunkBytes, false);
    Chunk16& chunk = chunk_at(target);
    const uint32_t cell = (target - kSharedBegin) / kCellBytes;
    for (uint32_t i = cell; i < cell + kChunkBytes / kCellBytes; ++i) {
      const Cell& known = block.cells[i];
      if (known.writer != Cell::kNobody || known.reader != Cell::kNobody) {
        fail("not emulated: a tensor load to memory that threads have accessed" + at(target));
      }
    }
    if (chunk.state == Chunk16::kInFlight) fail("two tensor loads on their way to the same memory" + at(target));
    if (chunk.reading) fail("tensor load to memory that a wgmma under way reads" + at(target));
    if (chunk.state == Chunk16::kLanded && clock[kMaxWarps + chunk.barrier] <= chunk.phase) {
      fail("tensor load to memory whose last load this thread does not know to have landed" + at(target));
    }
    for (int w = 0; w < kMaxWarps; ++w) {
      if (chunk.read[w] > clock[w]) {
        fail("race: tensor load to memory that warp " + std::to_string(w) + " read, with no mbarrier between" +
             at(target));
      }
    }
    chunk.state = Chunk16::kInFlight;
    std::fill_n(chunk.read, kMaxWarps, 0);
  });
  ++statistics().tensor_loads;
  barrier.copies.push_back(copy);
  wake(barrier);
}

void check_not_async(uint32_t address, uint32_t bytes) {
  if (block.chunks.empty()) return;
  for (uint32_t i = (address - kSharedBegin) / kChunkBytes; i <= (address - kSharedBegin + bytes - 1) / kChunkBytes;
       ++i) {
    if (block.chunks[i].state == Chunk16::kUnused) continue;
    fail("not emulated: threads that access memory which tensor loads write" + at(address));
  }
}

void join_all_clocks() {
  Clock all{};
  for (const HopperWarp& warp : block.hopper_warps) join(all, warp.clock);
  for (size_t w = 0; w < block.hopper_warps.size(); ++w) {
    block.hopper_warps[w].clock = all;
    ++block.hopper_warps[w].clock[w];
  }
}

void check_nothing_under_way(const Thread& thread) {
  if (block.hopper_warps.empty()) return;
  const HopperWarp& warp = block.hopper_warps[warp_of(thread.index)];
  if (!warp.open_group.empty() || !warp.groups.empty()) fail("a thread has ended with a wgmma under way");
  for (int i = 0; i < block.threads; ++i) {
    if (pool[i].get() != &thread && pool[i]->state != State::kDone) return;
  }
  for (const MessageBarrier& barrier : block.message_barriers) {
    if (!barrier.copies.empty())
      fail("the block has ended with a tensor load under way" + at(barrier.copies[0].address));
  }
}

std::string describe_message_barrier(uint32_t address) {
  for (const MessageBarrier& barrier : block.message_barriers) {
    if (barrier.address != address) continue;
    return at(address) + " in phase " + std::to_string(barrier.phase) + ", which lacks " +
           std::to_string(barrier.pending) + " arrivals and " + std::to_string(barrier.bytes) + " bytes";
  }
  return "";
}

}  // namespace fastvit::emulator
