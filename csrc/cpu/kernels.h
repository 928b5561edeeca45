// The door to the CPU kernels: one table of functions per instruction set, chosen once at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../params.h"

namespace fastvit::cpu {

// Keys per task of attention_backward_reduce.
constexpr int64_t kReduceKeys = 64;

// Heads from `first_head` on, each cut into its leaves.
struct AttentionSplit {
  int64_t first_head = 0;
  void* partials = nullptr;  // partial_bytes for each leaf of these heads, aligned to 64 bytes
};

// What a backward call needs: scratch per thread, how many leaves a head has, and the memory that each one's sums take.
struct AttentionBackwardSizes {
  int64_t scratch_bytes = 0;
  int64_t leaves = 1;
  int64_t partial_bytes = 0;
};

// Each kernel splits its work into independent tasks, numbered from 0; the caller spreads ranges of them over threads.
// Consecutive tasks share packed operands, so a range is cheaper than its tasks one by one. The result does not depend
// on how the tasks are spread.
struct KernelTable {
  const char* capability;
  int64_t (*attention_forward_tasks)(const AttentionParams&);
  void (*attention_forward)(const AttentionParams&, int64_t begin, int64_t end);
  int64_t (*attention_forward_scratch)(const AttentionParams&);  // bytes per thread
  // Whole heads; or the leaves of heads and then, when all are done, the slices of keys of their sums.
  // attention_threads.h decides which.
  AttentionBackwardSizes (*attention_backward_sizes)(const AttentionBackwardParams&);
  void (*attention_backward)(const AttentionBackwardParams&, int64_t begin, int64_t end);
  void (*attention_backward_parts)(const AttentionBackwardParams&, const AttentionSplit&, int64_t begin, int64_t end);
  void (*attention_backward_reduce)(const AttentionBackwardParams&, const AttentionSplit&, int64_t begin, int64_t end);
  int64_t (*patch_embed_forward_tasks)(const PatchEmbedParams&);
  void (*patch_embed_forward)(const PatchEmbedParams&, int64_t begin, int64_t end);
  int64_t (*patch_embed_backward_weight_tasks)(const PatchEmbedParams&);
  void (*patch_embed_backward_weight)(const PatchEmbedParams&, int64_t begin, int64_t end);
  int64_t (*patch_embed_backward_images_tasks)(const PatchEmbedParams&);
  void (*patch_embed_backward_images)(const PatchEmbedParams&, int64_t begin, int64_t end);
  double (*fma_steps)(int64_t steps, float* sink);  // a benchmark's yardstick: returns the operations it did
};

// The table of the best instruction set that was built and that this processor has; FASTVIT_CPU_CAPABILITY forces one.
// Throws std::runtime_error when the forced one is unknown, was not built, or is not supported here.
const KernelTable& kernels();

// Names of the instruction sets in this build, best first, and why each cannot run here: empty if it can.
struct Capability {
  std::string name;
  std::string why_not;
};
std::vector<Capability> capabilities();

}  // namespace fastvit::cpu
