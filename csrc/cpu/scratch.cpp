#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastvit::cpu {

namespace {

struct Block {
  void* data = nullptr;
  int64_t size = 0;
  ~Block() { std::free(data); }

  void* reserve(int64_t bytes) {
    if (size < bytes) {
      std::free(data);
      size = (bytes + 63) / 64 * 64;
      data = std::aligned_alloc(64, static_cast<size_t>(size));
      if (data == nullptr) {
        size = 0;
        throw std::bad_alloc();
      }
    }
    return data;
  }
};

thread_local Block own, shared;

}  // namespace

void* thread_scratch(int64_t bytes) { return own.reserve(bytes); }
void* call_scratch(int64_t bytes) { return shared.reserve(bytes); }
int64_t held_scratch() { return own.size + shared.size; }

}  // namespace fastvit::cpu
