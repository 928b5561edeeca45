// Runs the attention kernel for sm_90a with no fault, then with each of those that tests/planted.py has put into a copy
// of its sources, and prints a line for each: what the emulator says, or "wrong". The sources ask `fault` which one is
// on.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

int fault;
#include "cuda/attention_forward_sm90.cuh"

namespace fastvit::cuda {

std::string attention_forward_sm90_why_not(const AttentionParams&) { return ""; }

// A few rows are enough to see a wrong one.
template <int kDim, int kKeys, bool kOnePass, int kConsumers>
void run(int heads, int queries, int keys) {
  std::vector<uint16_t> q(heads * queries * kDim), k(heads * keys * kDim), v(k.size()), o(q.size());
  std::vector<float> lse(heads * queries);
  std::srand(1);
  for (auto* tensor : {&q, &k, &v}) {
    for (auto& x : *tensor) x = round_to<Half>(float(std::rand() % 2001 - 1000) / 500.0f);
  }
  AttentionParams p;
  p.batch = 1, p.num_heads = heads, p.seqlen_q = queries, p.seqlen_k = keys;
  p.head_dim = p.head_dim_v = kDim, p.scale = 1 / std::sqrt(double(kDim));
  p.query = {q.data(), heads * queries * kDim, queries * kDim, kDim};
  p.key = {k.data(), heads * keys * kDim, keys * kDim, kDim};
  p.value = {v.data(), heads * keys * kDim, keys * kDim, kDim};
  p.output = {o.data(), heads * queries * kDim, queries * kDim, kDim};
  p.lse = lse.data();
  emulator::settings().multiprocessors = 1;
  emulator::settings().shared_bytes = 100 * 1024;  // for a short ring
  const emulator::GlobalMemory memory({{"query", q.data(), int64_t(q.size() * 2), false},
                                       {"key", k.data(), int64_t(k.size() * 2), false},
                                       {"value", v.data(), int64_t(v.size() * 2), false},
                                       {"output", o.data(), int64_t(o.size() * 2), true},
                                       {"lse", lse.data(), int64_t(lse.size() * 4), true}});
  launch_sm90<Half, kDim, kKeys, kOnePass, kConsumers>(p, device_limits(), nullptr);
  for (int row = 0; row < heads * queries; row += 13) {
    std::vector<double> weight(keys), sums(kDim);
    double sum = 0;
    const int head = row / queries;
    for (int j = 0; j < keys; ++j) {
      double score = 0;
      for (int d = 0; d < kDim; ++d) {
        score += to_float<Half>(q[row * kDim + d]) * to_float<Half>(k[(head * keys + j) * kDim + d]);
      }
      sum += weight[j] = std::exp(score * p.scale);
      for (int d = 0; d < kDim; ++d) sums[d] += weight[j] * to_float<Half>(v[(head * keys + j) * kDim + d]);
    }
    for (int d = 0; d < kDim; ++d) {
      if (!(std::abs(to_float<Half>(o[row * kDim + d]) - sums[d] / sum) < 2e-3)) throw std::runtime_error("wrong");
    }
  }
}

}  // namespace fastvit::cuda

int main() {
  for (fault = 0; fault <= FAULTS; ++fault) {
    std::string found = "nothing";
    try {
      fastvit::cuda::run<64, 64, true, 3>(20, 50, 50);
      fastvit::cuda::run<128, 64, true, 2>(7, 64, 64);
    } catch (const std::exception& error) {
      found = error.what();
    }
    std::printf("%s\n", found.c_str());
  }
}
