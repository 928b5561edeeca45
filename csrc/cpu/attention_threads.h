// How the tasks of an attention call are dealt to threads. It sees neither torch nor an instruction set: whoever calls
// gives the threads, as parallel_for(tasks, f), which calls f(begin, end) on ranges that make up [0, tasks).
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "kernels.h"
#include "scratch.h"

namespace fastvit::cpu {

// The sums of heads in leaves that are kept at once, unless the threads would run out of leaves.
constexpr int64_t kPartialBytes = int64_t(256) << 20;

// Tasks of one thread, which takes half of those that are left at a time, as do the others once they have no more of
// their own: the call takes as long as the thread that ends last, and cores differ in speed, by kind or by company.
struct alignas(64) TaskShare {
  std::atomic<int64_t> next;
  int64_t end;

  // Takes [begin, until) away, to the end of a run of `unit` tasks unless the share ends before; false if it is empty.
  bool take(int64_t unit, int64_t& begin, int64_t& until) {
    begin = next.load(std::memory_order_relaxed);
    do {
      if (begin >= end) return false;
      const int64_t half = begin + (end - begin + 1) / 2;
      until = std::min((half + unit - 1) / unit * unit, end);
    } while (!next.compare_exchange_weak(begin, until, std::memory_order_relaxed));
    return true;
  }
};

// Calls f(begin, end) on ranges that make up [0, tasks), on as many threads as parallel_for has of the `threads`.
template <class ParallelFor, class F>
void share_out(int64_t tasks, int64_t unit, int64_t threads, const ParallelFor& parallel_for, const F& f) {
  const int64_t count = std::min(threads, tasks);
  if (count <= 1) return parallel_for(tasks, f);
  const std::unique_ptr<TaskShare[]> shares(new TaskShare[count]);
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next = tasks * i / count;
    shares[i].end = tasks * (i + 1) / count;
  }
  parallel_for(count, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      int64_t begin, end;
      for (int64_t i = 0; i < count; ++i) {
        while (shares[(own + i) % count].take(unit, begin, end)) f(begin, end);
      }
    }
  });
}

// The forward pass has a task per head and query block, each independent of how the others are dealt.
template <class ParallelFor>
void attention_forward_over(const KernelTable& kernels, const AttentionParams& p, int64_t threads,
                            const ParallelFor& parallel_for) {
  const int64_t tasks = kernels.attention_forward_tasks(p), heads = p.batch * p.num_heads;
  share_out(tasks, heads > 0 ? tasks / heads : 1, threads, parallel_for,
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
    share_out(whole, 1, threads, parallel_for,
              [&](int64_t begin, int64_t end) { kernels.attention_backward(p, begin, end); });
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
