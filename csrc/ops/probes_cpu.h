// Figures of the CPU kernels for benchmarks, `fastvit env` and tests.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fastvit {

// GFLOP/s of multiply-adds in registers, on all of torch's threads at once: the best of the bursts of `seconds`.
double fma_peak(double seconds);

// Bytes of scratch per thread of an attention call, forward and backward; then the number of parts into which backward
// can cut a head, and the bytes that one part's sums take. Throws std::invalid_argument.
std::vector<int64_t> attention_scratch(int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                       const std::string& dtype, bool bias);

// Bytes of scratch that the calling thread holds.
int64_t held_scratch();

}  // namespace fastvit
