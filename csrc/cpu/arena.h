// Carves one thread's scratch memory into arrays.
#pragma once

#include "scratch.h"
#include "simd.h"

namespace fastvit::cpu::FASTVIT_CAPABILITY {

// Hands out consecutive aligned arrays: first a pass that only measures, then one over the real memory.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* here = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return here;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace fastvit::cpu::FASTVIT_CAPABILITY
