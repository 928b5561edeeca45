// How the tasks of an attention call are dealt to threads. It sees neither torch nor an instruction set: whoever calls
// gives the threads, as parallel_for(tasks, f), which calls f(begin, end) on ranges that make up [0, tasks).
#pragma once

#include <algorithm>

#include "kernels.h"
#include "scratch.h"

namespace fastvit::cpu {

// The sums of heads in leaves that are kept at once, unless the threads would run out of leaves.
constexpr int64_t kPartialBytes = int64_t(256) << 20;

// The forward pass has a task per head and query block, each independent of how the others are dealt.
template <class ParallelFor>
void attention_forward_over(const KernelTable& kernels, const AttentionParams& p, const ParallelFor& parallel_for) {
  parallel_for(kernels.attention_forward_tasks(p),
               [&](int64_t begin, int64_t end) { kernels.attention_forward(p, begin, end); });
}

// The heads that deal out evenly run whole, the remainder (all heads, if they are fewer than the threads) in leaves, so
// many heads at a time as their sums, the only memory that threads share, may take.
template <class ParallelFor>
void attention_backward_over(const KernelTable& kernels, const AttentionBackwardParams& p, int64_t threads,
                             const ParallelFor& parallel_for) {
  const AttentionBackwardSizes sizes = kernels.attention_backward_sizes(p);
  const int64_t heads = p.batch * p.num_heads, remainder = threads > 1 && sizes.leaves > 1 ? heads % threads : 0;
  const int64_t whole = heads - remainder;
  if (whole > 0) {
    parallel_for(whole, [&](int64_t begin, int64_t end) { kernels.attention_backward(p, begin, end); });
  }
  if (remainder == 0) return;
  const int64_t head_bytes = sizes.leaves * sizes.partial_bytes, busy = (threads + sizes.leaves - 1) / sizes.leaves;
  const int64_t at_once = std::min(remainder, std::max(busy, kPartialBytes / head_bytes));
  const int64_t slices = (p.seqlen_k + kReduceKeys - 1) / kReduceKeys;
  void* const partials = call_scratch(at_once * head_bytes);
  for (int64_t first = whole; first < heads; first += at_once) {
    const AttentionSplit split{first, partials};
    const int64_t count = std::min(at_once, heads - first);
    parallel_for(count * sizes.leaves,
                 [&](int64_t begin, int64_t end) { kernels.attention_backward_parts(p, split, begin, end); });
    parallel_for(count * slices,
                 [&](int64_t begin, int64_t end) { kernels.attention_backward_reduce(p, split, begin, end); });
  }
}

}  // namespace fastvit::cpu
