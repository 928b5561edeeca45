// The pipeline of attention forward for sm_90a: what a block is compiled for, where things lie in its shared memory,
// and its producer. attention_forward_sm90.cuh has the words to it.
#pragma once

#include "attention_common.cuh"
#include "primitives_sm90.cuh"

namespace fastvit::cuda {

struct ForwardArgumentsSm90 {
  TensorMap query, key, value;
  View4 output;
  float* lse = nullptr;
  float scale_log2 = 0.0f;  // scale · log2 e
  int num_heads = 0;
  int seqlen_q = 0;
  int seqlen_k = 0;
  int query_tiles = 0;  // of a head
  int tiles_per_item = 0;
  int parts = 0;  // items of a head
  int items = 0;
  int key_blocks = 0;
  int stages = 0;
};

// What a block may have on compute capability 9.0.
constexpr int kSharedBytesSm90 = 227 * 1024;

// What a kernel is compiled for, and what follows from it.
template <int kDim, int kKeys, bool kOnePass, int kConsumers>
struct FormSm90 {
  static_assert(kDim % kPanelColumns == 0 && kKeys % 8 == 0);
  // Rows of V beyond the keys must be zeros, which only those beyond the tensor are.
  static_assert(kOnePass || kKeys % kProductDepth == 0);
  static constexpr int kPanels = kDim / kPanelColumns;
  static constexpr int kRows = round_up(kKeys, kProductDepth);
  static constexpr int kBoxes = kRows > 256 ? 2 : 1;
  static constexpr int kBoxRows = kRows / kBoxes;
  static_assert(kBoxRows % 8 == 0);
  static constexpr uint32_t kPanelBytes = kRows * kPanelRowBytes;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kQueryPanelBytes = kWarpgroupRows * kPanelRowBytes;
  static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
  // The second one hides the way of the next queries where there is room for it.
  static constexpr int kQuerySlots = kDim == 64 ? 2 : 1;

  static constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 512);

  static constexpr int kFirstKeys = kKeys / 2 / kProductDepth * kProductDepth;
  static constexpr int kSecondKeys = kKeys - kFirstKeys;

  // Where registers suffice, the exponentials of the second half of a block are computed beside the products of the
  // first.
  static constexpr bool kOverlaps = kKeys / 2 + kDim / 2 + kKeys / 4 <= kConsumerRegisters - 32;

  // As many tiles of K and of V as there is room for, but no more than keep enough bytes on their way.
  static constexpr int kQueriesBytes = kConsumers * kQuerySlots * int(kQueryBytes);
  static constexpr int kMostBarriers = 4 * 8 + 2 * kConsumers * kQuerySlots;
  static constexpr int kFixedBytes = kPanelAlignment + kQueriesBytes + 8 * kMostBarriers;
  static constexpr int kStageBytes = 2 * int(kTileBytes);
  static constexpr int stages(int shared_bytes) {
    const int fit = (shared_bytes - kFixedBytes) / kStageBytes;
    return fit < 8 ? fit : 8;
  }
  static constexpr int kMostStages = stages(kSharedBytesSm90);
};

// A place in a ring of at most kMost, and the parity of the phase in which its barrier ends for the use to come: in one
// register.
template <int kMost>
struct RingPlace {
  uint32_t state = 0;

  __device__ __forceinline__ int index() const { return kMost == 1 ? 0 : int(state >> 1); }
  __device__ __forceinline__ uint32_t parity() const { return state & 1; }
  __device__ __forceinline__ void advance(int size) { state = index() + 1 == size ? parity() ^ 1 : state + 2; }
};

// Where things lie in shared memory.
template <typename Form, int kConsumers>
struct LayoutSm90 {
  uint32_t key, value, query, barriers;

  __device__ __forceinline__ explicit LayoutSm90(int stages) {
    key = (shared_memory() + kPanelAlignment - 1) / kPanelAlignment * kPanelAlignment;
    value = key + stages * Form::kTileBytes;
    query = value + stages * Form::kTileBytes;
    barriers = query + kConsumers * Form::kQuerySlots * Form::kQueryBytes;
  }

  __device__ __forceinline__ uint32_t key_full(int stage) const { return barriers + 8 * stage; }
  __device__ __forceinline__ uint32_t key_empty(int stage) const { return key_full(Form::kMostStages + stage); }
  __device__ __forceinline__ uint32_t value_full(int stage) const { return key_full(2 * Form::kMostStages + stage); }
  __device__ __forceinline__ uint32_t value_empty(int stage) const { return key_full(3 * Form::kMostStages + stage); }
  __device__ __forceinline__ uint32_t query_full(int slot) const { return key_full(4 * Form::kMostStages + slot); }
  __device__ __forceinline__ uint32_t query_empty(int slot) const {
    return query_full(kConsumers * Form::kQuerySlots + slot);
  }
};

struct ItemSm90 {
  int batch, head, first_tile, last_tile;

  __device__ __forceinline__ ItemSm90(const ForwardArgumentsSm90& p, int item) {
    const int index = item / p.parts;
    batch = index / p.num_heads, head = index % p.num_heads;
    first_tile = item % p.parts * p.tiles_per_item;
    last_tile = min(first_tile + p.tiles_per_item, p.query_tiles);
  }
};

// The work of the one producing thread. Its order of loads is the one in which the consumers come to need them.
template <typename Form, int kConsumers>
__device__ __forceinline__ void produce(const ForwardArgumentsSm90& p, const LayoutSm90<Form, kConsumers>& layout) {
  RingPlace<Form::kMostStages> ring;
  RingPlace<Form::kQuerySlots> slot[kConsumers];
  int turn = 0;
  auto load_query = [&](const ItemSm90& at, int tile) {
#pragma unroll
    for (int c = 0; c < kConsumers; ++c) {
      if (c != turn) continue;
      const int index = c * Form::kQuerySlots + slot[c].index();
      mbarrier_wait(layout.query_empty(index), slot[c].parity() ^ 1);
      mbarrier_arrive_expect(layout.query_full(index), Form::kQueryBytes);
#pragma unroll
      for (int panel = 0; panel < Form::kPanels; ++panel) {
        tensor_load(layout.query + index * Form::kQueryBytes + panel * Form::kQueryPanelBytes, p.query,
                    layout.query_full(index), panel * kPanelColumns, tile * kWarpgroupRows, at.head, at.batch);
      }
      slot[c].advance(Form::kQuerySlots);
    }
    turn = turn + 1 == kConsumers ? 0 : turn + 1;
  };
  auto load_keys = [&](const ItemSm90& at, int block, const TensorMap& map, uint32_t tile, uint32_t full,
                       uint32_t empty) {
    mbarrier_wait(empty, ring.parity() ^ 1);
    mbarrier_arrive_expect(full, Form::kTileBytes);
#pragma unroll
    for (int i = 0; i < Form::kPanels * Form::kBoxes; ++i) {
      const int panel = i / Form::kBoxes, row = i % Form::kBoxes * Form::kBoxRows;
      tensor_load(tile + ring.index() * Form::kTileBytes + panel * Form::kPanelBytes + row * kPanelRowBytes, map, full,
                  panel * kPanelColumns, block * Form::kRows + row, at.head, at.batch);
    }
  };
#pragma unroll 1
  for (int item = block_index(); item < p.items; item += grid_blocks()) {
    const ItemSm90 at(p, item);
    int tile = at.first_tile;
#pragma unroll 1
    for (int block = 0; block < p.key_blocks; ++block) {
      load_keys(at, block, p.key, layout.key, layout.key_full(ring.index()), layout.key_empty(ring.index()));
      for (; block == 0 && tile < min(at.first_tile + kConsumers, at.last_tile); ++tile) load_query(at, tile);
      load_keys(at, block, p.value, layout.value, layout.value_full(ring.index()), layout.value_empty(ring.index()));
      ring.advance(p.stages);
    }
    for (; tile < at.last_tile; ++tile) load_query(at, tile);
  }
}

}  // namespace fastvit::cuda
