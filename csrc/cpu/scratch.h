// Memory of one thread for one call, kept between calls: fresh pages cost more than the arithmetic of a small head.
#pragma once

#include <cstdint>

namespace fastvit::cpu {

// Returns at least `bytes` bytes, aligned to 64, that stay this thread's until its next call; throws std::bad_alloc.
// Kept at its largest size so far until the thread ends.
void* thread_scratch(int64_t bytes);

// The same for what one call shares between its threads: a second block, of the thread that makes the call.
void* call_scratch(int64_t bytes);

// Bytes that this thread holds in both blocks.
int64_t held_scratch();

}  // namespace fastvit::cpu
