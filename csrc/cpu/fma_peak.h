// The rate at which a core multiplies and adds when nothing else is in its way: registers only, no memory, no latency.
#pragma once

#include "gemm.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// As many independent chains as the micro-kernel has accumulators: 12 or more, where two units of latency 4 need 8.
constexpr int kFmaChains = kTileRows * kTileVectors;

// Does `steps` multiply-adds in each lane of each chain, in float; returns their number of floating-point operations.
// It is a multiply and an add where the instruction set has no FMA. `sink` keeps the compiler from leaving them out.
inline double fma_steps(int64_t steps, float* sink) {
  Vec<float> chains[kFmaChains];
  for (int i = 0; i < kFmaChains; ++i) chains[i] = splat(1.0f + 0.01f * float(i));
  // Contracting to a fixed point, so that no chain overflows or becomes subnormal, at which some processors slow down.
  Vec<float> factor = splat(0.5f), term = splat(0.25f);
  for (int64_t step = 0; step < steps; ++step) {
    // Opaque to the compiler, which would otherwise compute the chains' closed form or share them.
    asm volatile("" : "+x"(factor), "+x"(term));
#pragma GCC unroll 32
    for (int i = 0; i < kFmaChains; ++i) chains[i] = chains[i] * factor + term;
  }
  Vec<float> total{};
  for (int i = 0; i < kFmaChains; ++i) total += chains[i];
  *sink = total[0];
  return 2.0 * double(steps) * kFmaChains * kLanes<float>;
}

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
