#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace fastvit::cpu {

#define FASTVIT_DECLARE(name)      \
  namespace name {                 \
  extern const KernelTable kTable; \
  }
#ifdef FASTVIT_BUILT_AVX512_BF16
FASTVIT_DECLARE(avx512_bf16)
#endif
#ifdef FASTVIT_BUILT_AVX512
FASTVIT_DECLARE(avx512)
#endif
#ifdef FASTVIT_BUILT_AVX2
FASTVIT_DECLARE(avx2)
#endif
FASTVIT_DECLARE(baseline)
#undef FASTVIT_DECLARE

namespace {

struct Entry {
  const KernelTable* table;
  bool supported;
};

// Best first. The conditions are the flags that setup.py compiles each one with.
std::vector<Entry> entries() {
  std::vector<Entry> list;
#ifdef FASTVIT_BUILT_AVX512
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  list.push_back({&avx512_bf16::kTable, has_avx512 && __builtin_cpu_supports("avx512bf16")});
  list.push_back({&avx512::kTable, has_avx512});
#endif
#ifdef FASTVIT_BUILT_AVX2
  // Every processor with AVX2 and FMA has F16C.
  list.push_back({&avx2::kTable, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")});
#endif
  list.push_back({&baseline::kTable, true});
  return list;
}

const KernelTable& choose() {
  const char* forced = std::getenv("FASTVIT_CPU_CAPABILITY");
  std::string accepted;
  for (const Entry& entry : entries()) {
    if (forced == nullptr ? entry.supported : forced == std::string(entry.table->capability) && entry.supported) {
      return *entry.table;
    }
    if (entry.supported) accepted += std::string(accepted.empty() ? "" : ", ") + entry.table->capability;
  }
  throw std::runtime_error("FASTVIT_CPU_CAPABILITY: got '" + std::string(forced) +
                           "'; this build on this processor accepts " + accepted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

std::vector<Capability> capabilities() {
  std::vector<Capability> list;
  for (const Entry& entry : entries()) list.push_back({entry.table->capability, entry.supported});
  return list;
}

}  // namespace fastvit::cpu
