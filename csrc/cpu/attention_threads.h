// How the tasks of an attention call are dealt to threads. It sees neither torch nor an instruction set: whoever calls
// gives the threads, as parallel_for(tasks, f), which calls f(begin, end) on ranges that make up [0, tasks).
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace fastvit::cpu {

// The forward pass has a task per head and query block, each independent of how the others are dealt.
template <class ParallelFor>
void attention_forward_over(const KernelTable& kernels, const AttentionParams& p, const ParallelFor& parallel_for) {
  parallel_for(kernels.attention_forward_tasks(p),
               [&](int64_t begin, int64_t end) { kernels.attention_forward(p, begin, end); });
}

// The heads that deal out evenly run whole, the remainder (all heads, if they are fewer than the threads) in leaves.
// The sums of these, at most eight per thread, are the only memory that threads share.
template <class ParallelFor>
void attention_backward_over(const KernelTable& kernels, const AttentionBackwardParams& p, int64_t threads,
                             const ParallelFor& parallel_for) {
  const AttentionBackwardSizes sizes = kernels.attention_backward_sizes(p);
  const int64_t heads = p.batch * p.num_heads, remainder = threads > 1 && sizes.leaves > 1 ? heads % threads : 0;
  AttentionSplit split{heads - remainder};
  if (split.first_head > 0) {
    parallel_for(split.first_head, [&](int64_t begin, int64_t end) { kernels.attention_backward(p, begin, end); });
  }
  if (remainder == 0) return;
  split.partials = call_scratch(remainder * sizes.leaves * sizes.partial_bytes);
  parallel_for(remainder * sizes.leaves,
               [&](int64_t begin, int64_t end) { kernels.attention_backward_parts(p, split, begin, end); });
  const int64_t slices = (p.seqlen_k + kReduceKeys - 1) / kReduceKeys;
  parallel_for(remainder * slices,
               [&](int64_t begin, int64_t end) { kernels.attention_backward_reduce(p, split, begin, end); });
}

}  // namespace fastvit::cpu
