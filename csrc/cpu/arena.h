// Carves one thread's scratch memory into arrays.
#pragma once

#include "scratch.h"
#include "simd.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Hands out consecutive aligned arrays: first a pass that only measures, then one over the real memory. Under
// AddressSanitizer a poisoned gap follows each array: to the sanitizer the scratch is one block.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = count * int64_t(sizeof(T)), end = (used_ + bytes + 63) / 64 * 64 + kGap;
    T* here = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
#if defined(__SANITIZE_ADDRESS__)
    if (base_ != nullptr) {
      __asan_unpoison_memory_region(base_ + used_, size_t(bytes));
      __asan_poison_memory_region(base_ + used_ + bytes, size_t(end - used_ - bytes));
    }
#endif
    used_ = end;
    return here;
  }
  int64_t used() const { return used_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kGap = 64;
#else
  static constexpr int64_t kGap = 0;
#endif
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
