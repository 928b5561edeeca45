#include <cstdlib>
#include <stdexcept>

#if defined(FASTVIT_BUILT_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace fastvit::cpu {

#define FASTVIT_DECLARE(name)      \
  namespace name {                 \
  extern const KernelTable kTable; \
  }
#ifdef FASTVIT_BUILT_AMX
FASTVIT_DECLARE(amx)
#endif
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

constexpr const char* kNotHere = "not on this processor";

struct Entry {
  const KernelTable* table;
  const char* why_not;  // "" if it can run
};

Entry entry(const KernelTable& table, bool supported) { return {&table, supported ? "" : kNotHere}; }

#ifdef FASTVIT_BUILT_AMX
// Returns why this process cannot use AMX tiles of bfloat16; "" if it can. Linux hands out the 8 KiB of tile state on
// request only, to all threads at once (Documentation/arch/x86/xstate.rst); a request that was granted is repeated
// freely.
const char* why_no_amx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kTileBFloat16 = 1u << 22, kOsSavesState = 1u << 27;
  constexpr unsigned kTileState = 3u << 17;  // XTILECFG and XTILEDATA of XCR0
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kTile) || !(edx & kTileBFloat16)) return kNotHere;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsSavesState)) return kNotHere;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  if ((eax & kTileState) != kTileState) return "the operating system does not save the tile registers";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the kernel refuses the tile registers";
  return "";
#else
  return "only on Linux";
#endif
}
#endif

// Best first. The conditions are the flags that setup.py compiles each one with.
std::vector<Entry> entries() {
  std::vector<Entry> list;
#ifdef FASTVIT_BUILT_AVX512
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  list.push_back({&amx::kTable, has_bf16 ? why_no_amx() : kNotHere});
  list.push_back(entry(avx512_bf16::kTable, has_bf16));
  list.push_back(entry(avx512::kTable, has_avx512));
#endif
#ifdef FASTVIT_BUILT_AVX2
  // Every processor with AVX2 and FMA has F16C.
  list.push_back(entry(avx2::kTable, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
#endif
  list.push_back(entry(baseline::kTable, true));
  return list;
}

const KernelTable& choose() {
  const char* forced = std::getenv("FASTVIT_CPU_CAPABILITY");
  std::string accepted, refused;
  for (const Entry& entry : entries()) {
    const std::string name = entry.table->capability;
    if (*entry.why_not != 0) {
      refused += "; " + name + ": " + entry.why_not;
      continue;
    }
    if (forced == nullptr || forced == name) return *entry.table;
    accepted += std::string(accepted.empty() ? "" : ", ") + name;
  }
  throw std::runtime_error("FASTVIT_CPU_CAPABILITY: got '" + std::string(forced) +
                           "'; this build on this processor accepts " + accepted + refused);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

std::vector<Capability> capabilities() {
  std::vector<Capability> list;
  for (const Entry& entry : entries()) list.push_back({entry.table->capability, entry.why_not});
  return list;
}

}  // namespace fastvit::cpu
