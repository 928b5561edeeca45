// Attention forward for sm_90a: O = softmax(scale·QKᵀ) V and LSE, head dim 64 or 128, no bias, not causal.
//
// A block is a producer, one thread that starts tensor loads, and kConsumers warpgroups of 64 queries each. It goes
// through items (a head and a part of its query tiles) without end, so that the next head's keys are on their way while
// the consumers work on this one:
//
//   K, V    rings of `stages` tiles of kKeys keys, read by all consumers; each tile has a full and an empty mbarrier.
//           Where a head's tiles all fit in the ring they are loaded once for all of the item's query tiles; else an
//           item has one query tile a consumer, and its keys pass through the ring.
//   Q       kQuerySlots tiles of each consumer's own. The item's query tiles go around the consumers, on from where the
//           item before ended, so that an odd number of them leaves nobody idle.
//
// S = QKᵀ comes from shared memory; P goes from the accumulators' registers to those of the left operand of PV. With
// one tile of keys the softmax is exact in one pass, else it is the online softmax (Dao 2023, FlashAttention-2,
// algorithm 1); the split in producer and consumers is that of FlashAttention-3 (Shah et al. 2024, algorithm 1).
#pragma once

#include <algorithm>

#include "attention_pipeline_sm90.cuh"
#include "kernels.h"
#include "tensor_map.h"

namespace fastvit::cuda {

// A lane's part of 64 queries: rows lane / 4 and lane / 4 + 8 of the sixteen of its warp.
template <int kDim>
struct RowsSm90 {
  float output[kDim / 2];
  float maximum[2];  // of the raw scores so far
  float sum[2];      // this lane's share of the row's sum of exponentials
};

// The scores of kKeys keys, in two halves of which each has its own registers: the maximum of one is searched while the
// other is multiplied, and one's products with V run while the other's exponentials are computed.
template <int kKeys>
struct ScoresSm90 {
  static constexpr int kSteps = int(ceil_div(kKeys, kProductDepth));
  float score[kKeys / 2];
  uint32_t left[kSteps][4];  // their exponentials, as the left operand of the product with V

  // Start S [64, kKeys] = Q Kᵀ.
  template <typename T, int kDim, typename Form>
  __device__ __forceinline__ void start(uint32_t query, uint32_t key) {
#pragma unroll
    for (int k = 0; k < kDim; k += kProductDepth) {
      const int panel = k / kPanelColumns, offset = k % kPanelColumns * kElementBytes;
      multiply_shared<T, kKeys>(score, descriptor(query + panel * Form::kQueryPanelBytes + offset),
                                descriptor(key + panel * Form::kPanelBytes + offset), k > 0);
    }
    product_commit();
  }

  // Those of keys that do not exist to −inf: mostly they are among the last sixteen.
  __device__ __forceinline__ void forbid(int keys) {
    if (keys >= kKeys) return;
    if (keys > kKeys - 16) return forbid_from<kKeys / 2 - 8>(keys);
    forbid_from<0>(keys);
  }

  template <int kFirst>
  __device__ __forceinline__ void forbid_from(int keys) {
    const int limit = keys - 2 * (lane_index() % 4);
#pragma unroll
    for (int i = kFirst; i < kKeys / 2; ++i) {
      if (8 * (i / 4) + i % 2 >= limit) score[i] = -infinity();
    }
  }

  __device__ __forceinline__ void search(float (&maximum)[2]) const {
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], score[i]);
  }

  template <typename T>
  __device__ __forceinline__ void exponentiate(float factor, const float (&origin)[2], float (&sum)[2]) {
    if constexpr (kKeys % kProductDepth) left[kSteps - 1][2] = left[kSteps - 1][3] = 0;
#pragma unroll
    for (int i = 0; i < kKeys / 2; i += 2) {
      const int half = i / 2 % 2;
      const float low = exp2_approx(score[i] * factor - origin[half]);
      const float high = exp2_approx(score[i + 1] * factor - origin[half]);
      sum[half] += low + high;
      left[i / 8][i / 2 % 4] = pack<T>(low, high);
    }
    pin_left();
  }

  // Start O [64, kDim] += P V; O = P V if not accumulate.
  template <typename T, int kDim, typename Form>
  __device__ __forceinline__ void start_values(float (&output)[kDim / 2], uint32_t value, bool accumulate) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      multiply_registers<T, kDim>(output, left[step],
                                  descriptor(value + step * kProductDepth * kPanelRowBytes, Form::kPanelBytes),
                                  accumulate || step > 0);
    }
    product_commit();
  }

  __device__ __forceinline__ void pin_left() {
#pragma unroll
    for (int i = 0; i < 4 * kSteps; ++i) pin(left[i / 4][i % 4]);
  }
};

// One block of `keys` keys for a query tile. wait_for_values comes before the first read of V, scores_done after the
// last one of Q and K.
template <typename T, int kDim, typename Form, typename ScoresDone, typename WaitForValues>
__device__ __forceinline__ void attend_sm90(RowsSm90<kDim>& rows, uint32_t query, uint32_t key, uint32_t value,
                                            int keys, float factor, bool first_block, ScoresDone scores_done,
                                            WaitForValues wait_for_values) {
  constexpr int kFirst = Form::kFirstKeys, kSecond = Form::kSecondKeys;
  ScoresSm90<kFirst> first;
  ScoresSm90<kSecond> second;
  pin(first.score);
  pin(second.score);
  product_fence();
  first.template start<T, kDim, Form>(query, key);
  second.template start<T, kDim, Form>(query, key + kFirst * kPanelRowBytes);
  float maximum[2] = {rows.maximum[0], rows.maximum[1]};
  product_wait<1>();
  pin(first.score);
  first.forbid(keys);
  first.search(maximum);
  product_wait<0>();
  pin(second.score);
  scores_done();
  second.forbid(keys - kFirst);
  second.search(maximum);
  float origin[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = row_maximum(maximum[half]);
    // A row with nothing to attend to has no maximum; its exponentials are those of −inf.
    origin[half] = maximum[half] == -infinity() ? 0.0f : multiply_rounded(maximum[half], factor);
    if (!first_block) {
      // Exactly 1 where the maximum has not moved: an error of this factor would grow with every block.
      const float rescale = exp2_approx(multiply_rounded(rows.maximum[half], factor) - origin[half]);
      rows.sum[half] *= rescale;
#pragma unroll
      for (int i = 2 * half; i < kDim / 2; i += 4) rows.output[i] *= rescale, rows.output[i + 1] *= rescale;
    }
    rows.maximum[half] = maximum[half];
  }
  first.template exponentiate<T>(factor, origin, rows.sum);
  if constexpr (!Form::kOverlaps) second.template exponentiate<T>(factor, origin, rows.sum);
  wait_for_values();
  pin(rows.output);
  product_fence();
  first.template start_values<T, kDim, Form>(rows.output, value, !first_block);
  if constexpr (Form::kOverlaps) {
    second.template exponentiate<T>(factor, origin, rows.sum);
    product_fence();
  }
  second.template start_values<T, kDim, Form>(rows.output, value + kFirst * kPanelRowBytes, true);
  product_wait<0>();
  pin(rows.output);
  first.pin_left();
  second.pin_left();
}

// Normalise and write a query tile's rows of O and of the LSE. The four lanes of a row exchange what they hold of four
// times eight columns, so that each has eight columns to write at once.
template <typename T, int kDim>
__device__ __forceinline__ void finish_sm90(const RowsSm90<kDim>& rows, const ForwardArgumentsSm90& p, int item,
                                            int tile) {
  const ItemSm90 at(p, opaque(item));  // decoded again, so that it need not be kept
  const int lane = lane_index(), quad = lane % 4;
  const int warp_row = tile * kWarpgroupRows + thread_index() % kWarpgroupThreads / kWarpThreads * 16;
  char* output = static_cast<char*>(p.output.data) +
                 (at.batch * p.output.batch_stride + at.head * p.output.head_stride) * kElementBytes;
  float* lse = p.lse + (int64_t(at.batch) * p.num_heads + at.head) * p.seqlen_q;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(rows.sum[half]);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int row = warp_row + 8 * half + lane / 4;
    const bool inside = row < p.seqlen_q;
    if (quad == 0 && inside) {
      const float natural = rows.maximum[half] * p.scale_log2 * kLn2 + natural_log(sum);
      store_global<float>(lse + row, sum == 0.0f ? -infinity() : natural);
    }
    char* output_row = output + row * p.output.row_stride * kElementBytes;
#pragma unroll
    for (int first = 0; first < kDim / 8; first += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = rows.output + 4 * (first + i) + 2 * half;
        word[i] = pack<T>(pair[0] * inverse, pair[1] * inverse);
      }
      // Two rounds transpose the 4 × 4 words of the quad.
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          const bool upper = quad & bit;
          const uint32_t other = shuffle_word_xor(upper ? word[i] : word[i + bit], bit);
          (upper ? word[i] : word[i + bit]) = other;
        }
      }
      if (inside) {
        store_global<Chunk>(output_row + (first + quad) * int(sizeof(Chunk)), {{word[0], word[1], word[2], word[3]}});
      }
    }
  }
}

template <typename T, int kDim, int kKeys, bool kOnePass, int kConsumers>
__device__ __forceinline__ void consume(
    const ForwardArgumentsSm90& p, const LayoutSm90<FormSm90<kDim, kKeys, kOnePass, kConsumers>, kConsumers>& layout,
    int consumer) {
  using Form = FormSm90<kDim, kKeys, kOnePass, kConsumers>;
  RingPlace<Form::kMostStages> ring;
  RingPlace<Form::kQuerySlots> slot;
  int ahead = consumer;  // the next tile that is mine, seen from the first of the next item
  // One arrival a warp: each says that its own reads are done. No lane may still wait for the phase that this one lets
  // go: it would see the parity of the next.
  auto release = [](uint32_t empty) {
    warp_barrier();
    if (lane_index() == 0) mbarrier_arrive(empty);
  };
#pragma unroll 1
  for (int item = block_index(); item < p.items; item += grid_blocks()) {
    const ItemSm90 at(p, item);
    int tile = at.first_tile + ahead;
    auto place = ring;
    if (tile >= at.last_tile) {
      // None is: let the keys pass.
#pragma unroll 1
      for (int block = 0; block < p.key_blocks; ++block, place.advance(p.stages)) {
        mbarrier_wait(layout.key_full(place.index()), place.parity());
        release(layout.key_empty(place.index()));
        mbarrier_wait(layout.value_full(place.index()), place.parity());
        release(layout.value_empty(place.index()));
      }
    }
#pragma unroll 1
    for (; tile < at.last_tile; tile += kConsumers) {
      const bool last_use = tile + kConsumers >= at.last_tile;
      const int query_slot = consumer * Form::kQuerySlots + slot.index();
      RowsSm90<kDim> rows;
      rows.maximum[0] = rows.maximum[1] = -infinity();
      rows.sum[0] = rows.sum[1] = 0.0f;
      mbarrier_wait(layout.query_full(query_slot), slot.parity());
      place = ring;
      const int blocks = kOnePass ? 1 : p.key_blocks;
#pragma unroll 1
      for (int block = 0; block < blocks; ++block, place.advance(p.stages)) {
        mbarrier_wait(layout.key_full(place.index()), place.parity());
        attend_sm90<T, kDim, Form>(
            rows, layout.query + query_slot * Form::kQueryBytes, layout.key + place.index() * Form::kTileBytes,
            layout.value + place.index() * Form::kTileBytes, p.seqlen_k - block * kKeys, p.scale_log2,
            kOnePass || block == 0,
            [&] {
              if (last_use) release(layout.key_empty(place.index()));
              if (block == blocks - 1) release(layout.query_empty(query_slot));
            },
            [&] { mbarrier_wait(layout.value_full(place.index()), place.parity()); });
        if (last_use) release(layout.value_empty(place.index()));
      }
      slot.advance(Form::kQuerySlots);
      finish_sm90<T, kDim>(rows, p, item, tile);
    }
    ahead = tile - at.last_tile;
    for (int block = 0; block < p.key_blocks; ++block) ring.advance(p.stages);
  }
}

template <typename T, int kDim, int kKeys, bool kOnePass, int kConsumers>
__global__ void __launch_bounds__(FormSm90<kDim, kKeys, kOnePass, kConsumers>::kThreads, 1)
    attention_forward_sm90([[maybe_unused]] const __grid_constant__ ForwardArgumentsSm90 p) {
#ifdef FASTVIT_HAS_SM90A
  using Form = FormSm90<kDim, kKeys, kOnePass, kConsumers>;
  const LayoutSm90<Form, kConsumers> layout(p.stages);
  if (thread_index() == 0) {
    prefetch_tensor_map(p.query);
    prefetch_tensor_map(p.key);
    prefetch_tensor_map(p.value);
    constexpr int kWarps = kWarpgroupThreads / kWarpThreads;
    for (int stage = 0; stage < p.stages; ++stage) {
      mbarrier_init(layout.key_full(stage), 1);
      mbarrier_init(layout.key_empty(stage), kConsumers * kWarps);
      mbarrier_init(layout.value_full(stage), 1);
      mbarrier_init(layout.value_empty(stage), kConsumers * kWarps);
    }
    for (int slot = 0; slot < kConsumers * Form::kQuerySlots; ++slot) {
      mbarrier_init(layout.query_full(slot), 1);
      mbarrier_init(layout.query_empty(slot), kWarps);
    }
    mbarrier_init_fence();
  }
  barrier();
  const int warpgroup = uniform(thread_index() / kWarpgroupThreads);
  if (warpgroup == 0) {
    decrease_registers<Form::kProducerRegisters>();
    if (thread_index() == 0) produce<Form, kConsumers>(p, layout);
  } else {
    increase_registers<Form::kConsumerRegisters>();
    consume<T, kDim, kKeys, kOnePass, kConsumers>(p, layout, warpgroup - 1);
  }
#endif
}

// The number of parts of a head that ends first: each wave of items costs its query tiles and the way of its keys,
// which is taken for one tile more.
inline int parts_of_head(int64_t heads, int tiles, int most_tiles, int multiprocessors) {
  int best = int(ceil_div(tiles, most_tiles));
  auto cost = [&](int parts) { return ceil_div(heads * parts, multiprocessors) * (ceil_div(tiles, parts) + 1); };
  for (int parts = best + 1; parts <= tiles; ++parts) {
    if (cost(parts) < cost(best)) best = parts;
  }
  return best;
}

template <typename T, int kDim, int kKeys, bool kOnePass, int kConsumers>
void launch_sm90(const AttentionParams& params, const DeviceLimits& device, void* stream) {
  using Form = FormSm90<kDim, kKeys, kOnePass, kConsumers>;
  const auto kernel = attention_forward_sm90<T, kDim, kKeys, kOnePass, kConsumers>;
  ForwardArgumentsSm90 p;
  bind_context();
  p.query = tensor_map<T>(params.query, params.batch, params.num_heads, params.seqlen_q, kDim, kWarpgroupRows);
  p.key = tensor_map<T>(params.key, params.batch, params.num_heads, params.seqlen_k, kDim, Form::kBoxRows);
  p.value = tensor_map<T>(params.value, params.batch, params.num_heads, params.seqlen_k, kDim, Form::kBoxRows);
  p.output = params.output;
  p.lse = static_cast<float*>(params.lse);
  p.scale_log2 = float(params.scale * double(kLog2E));
  p.num_heads = int(params.num_heads);
  p.seqlen_q = int(params.seqlen_q);
  p.seqlen_k = int(params.seqlen_k);
  p.query_tiles = int(ceil_div(p.seqlen_q, kWarpgroupRows));
  p.key_blocks = int(ceil_div(p.seqlen_k, kKeys));
  p.stages = std::min(Form::stages(device.shared_bytes_per_block), Form::kMostStages);
  if (p.stages < 1) throw std::runtime_error("attention for sm_90a: too little shared memory");
  const int64_t heads = params.batch * params.num_heads;
  const int most_tiles = p.key_blocks <= p.stages ? p.query_tiles : kConsumers;
  p.parts = parts_of_head(heads, p.query_tiles, most_tiles, device.multiprocessors);
  p.tiles_per_item = int(ceil_div(p.query_tiles, p.parts));
  p.parts = int(ceil_div(p.query_tiles, p.tiles_per_item));
  p.items = int(heads * p.parts);
  const int64_t blocks = std::min<int64_t>(p.items, device.multiprocessors);
  launch(kernel, {blocks, Form::kThreads, Form::kFixedBytes + p.stages * Form::kStageBytes}, stream, p);
}

// The online form whose blocks leave the fewest keys empty, the first of equals.
template <typename T, int kDim, int kKeys, int... kOthers>
void launch_online_sm90(const AttentionParams& p, const DeviceLimits& device, void* stream) {
  if constexpr (sizeof...(kOthers) > 0) {
    if (round_up(p.seqlen_k, kKeys) > std::min({round_up(p.seqlen_k, kOthers)...})) {
      return launch_online_sm90<T, kDim, kOthers...>(p, device, stream);
    }
  }
  // Three consumers hide more of the softmax than two; 160 registers a thread are enough for O [64, 64] and S [64,
  // 128].
  constexpr int kConsumers = kDim == 64 && kKeys <= 128 ? 3 : 2;
  launch_sm90<T, kDim, kKeys, false, kConsumers>(p, device, stream);
}

// Whole rows of scores in registers are the rule: 64 keys hold windows of 7 × 7 and 8 × 8 and 49 patches with a prefix,
// 200 hold 14 × 14 patches (N = 196, 197), 264 hold 16 × 16 (256, 257, 261) at head dim 64; at 128 they would spill.
// Beyond, at head dim 64: 577 is 3 × 208 (92 % of it in use), 785 is 4 × 208 (94 %), 1025 is 5 × 208 (99 %), and 128
// is for what lies badly to 208, such as 442 (4 × 128, 86 %). At 128 two stages of 176 keys still fit in shared memory;
// 257 is 2 × 144 (89 %), 577 is 5 × 128 (90 %), 1025 is 6 × 176 (97 %).
template <typename T, int kDim>
void attention_forward_sm90_head_dim(const AttentionParams& p, void* stream) {
  const DeviceLimits device = device_limits();
  constexpr int kShortConsumers = kDim == 64 ? 3 : 2;
  if (p.seqlen_k <= 64) return launch_sm90<T, kDim, 64, true, kShortConsumers>(p, device, stream);
  if (p.seqlen_k <= 200) return launch_sm90<T, kDim, 200, true, kShortConsumers>(p, device, stream);
  if constexpr (kDim == 64) {
    if (p.seqlen_k <= 264) return launch_sm90<T, kDim, 264, true, 2>(p, device, stream);
    launch_online_sm90<T, kDim, 208, 128>(p, device, stream);
  } else {
    launch_online_sm90<T, kDim, 176, 144, 128>(p, device, stream);
  }
}

template <typename T>
void attention_forward_sm90_dtype(const AttentionParams& p, void* stream) {
  const std::string reason = attention_forward_sm90_why_not(p);
  if (!reason.empty()) throw std::invalid_argument("the attention kernel for sm_90a: " + reason);
  if (p.head_dim == 64) return attention_forward_sm90_head_dim<T, 64>(p, stream);
  attention_forward_sm90_head_dim<T, 128>(p, stream);
}

}  // namespace fastvit::cuda
