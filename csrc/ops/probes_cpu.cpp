// What fastvit._C tells of the CPU kernels beside their results: the machine's FMA rate, and the scratch they use.
#include "probes_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/scratch.h"

namespace fastvit {

double fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const cpu::KernelTable& kernels = cpu::kernels();
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> rates(threads);
  std::vector<float> sinks(threads);
  double best = 0;
  // Bursts of a millisecond or so: the best is the one that no other process disturbed. Each thread has its own clock,
  // because the slowest one's time would be that of a barrier.
  for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < seconds;) {
    std::fill(rates.begin(), rates.end(), 0.0);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto start = Clock::now();
        const double operations = kernels.fma_steps(200'000, &sinks[i]);
        rates[i] = operations / std::chrono::duration<double>(Clock::now() - start).count() / 1e9;
      }
    });
    best = std::max(best, std::accumulate(rates.begin(), rates.end(), 0.0));
  }
  return best;
}

std::vector<int64_t> attention_scratch(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                       const std::string& dtype, bool bias) {
  AttentionBackwardParams p;
  const std::string names[] = {"float16", "bfloat16", "float32", "float64"};
  const auto found = std::find(std::begin(names), std::end(names), dtype);
  if (found == std::end(names)) {
    throw std::invalid_argument("dtype: got '" + dtype + "'; accepted are float16, bfloat16, float32 and float64");
  }
  if (seqlen_q < 0 || seqlen_k < 1 || head_dim < 1 || head_dim_v < 1) {
    throw std::invalid_argument("seqlen_q, seqlen_k, head_dim, head_dim_v: accepted are sizes of at least 1");
  }
  p.dtype = static_cast<DType>(found - std::begin(names));
  p.batch = p.num_heads = 1;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = seqlen_k;
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  if (bias) p.bias.type = BiasType::kFloat32;
  const cpu::AttentionBackwardSizes backward = cpu::kernels().attention_backward_sizes(p);
  return {cpu::kernels().attention_forward_scratch(p), backward.scratch_bytes, backward.leaves, backward.partial_bytes};
}

int64_t held_scratch() { return cpu::held_scratch(); }

}  // namespace fastvit
