#include "scratch.h"

#include <cstdlib>
#include <new>

namespace fastvit::cpu {

namespace {

struct Block {
  void* data = nullptr;
  int64_t size = 0;
  ~Block() { std::free(data); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Block block;
  if (block.size < bytes) {
    std::free(block.data);
    block.size = (bytes + 63) / 64 * 64;
    block.data = std::aligned_alloc(64, static_cast<size_t>(block.size));
    if (block.data == nullptr) {
      block.size = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace fastvit::cpu
