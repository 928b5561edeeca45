// A fiber: a function with a stack of its own that can be left and entered again.
#pragma once

#include <cstddef>

namespace fastvit::emulator {

class Fiber {
 public:
  using Entry = void (*)(void*);

  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepare to run entry(argument) at the next enter(); what was on the stack is forgotten.
  void prepare(Entry entry, void* argument);
  // Run it until it calls leave(). Only from outside of any fiber.
  void enter();
  // Go back to where enter() was called. From inside the fiber; with `last`, never to come back.
  void leave(bool last = false);

 private:
  static void start(Fiber* self);

  char* stack_ = nullptr;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  void* inside_ = nullptr;   // the saved state of the fiber
  void* outside_ = nullptr;  // the saved state of whoever entered it
  void* sanitizer_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_size_ = 0;
};

}  // namespace fastvit::emulator
