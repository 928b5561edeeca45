#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace fastvit::emulator {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 1 << 20;  // red zones around every local
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

}  // namespace

#ifdef __x86_64__

// swapcontext would ask the kernel for the signal mask at each switch, of which an emulated mma needs 64: only the
// registers that a function must preserve (System V ABI) are saved here.
extern "C" void fastvit_emulator_switch(void** save, void* restore);
asm(R"(
.text
.globl fastvit_emulator_switch
.hidden fastvit_emulator_switch
.type fastvit_emulator_switch, @function
fastvit_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastvit_emulator_switch, .-fastvit_emulator_switch
)");

static void switch_to(void** save, void* restore) { fastvit_emulator_switch(save, restore); }

#else

static void switch_to(void** save, void* restore) {
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(restore));
}

#endif

// The fiber that is being entered: a new stack begins with no arguments. One launch at a time, so one for all threads.
static Fiber* starting = nullptr;

Fiber::~Fiber() {
  if (stack_) munmap(stack_, kStackBytes);
#ifndef __x86_64__
  delete static_cast<ucontext_t*>(inside_);
  delete static_cast<ucontext_t*>(outside_);
#endif
}

void Fiber::prepare(Entry entry, void* argument) {
  if (!stack_) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory);
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
  sanitizer_stack_ = nullptr;
#endif
  entry_ = entry;
  argument_ = argument;
#ifdef __x86_64__
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + kStackBytes);
  *--top = 0;  // the return address of start(), which never returns, and what aligns the stack for it
  *--top = reinterpret_cast<uintptr_t>(+[] { start(starting); });
  top -= 6;  // rbp, rbx, r12 … r15
  for (int i = 0; i < 6; ++i) top[i] = 0;
  inside_ = top;
#else
  if (!inside_) inside_ = new ucontext_t, outside_ = new ucontext_t;
  auto* context = static_cast<ucontext_t*>(inside_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, reinterpret_cast<void (*)()>(+[] { start(starting); }), 0);
#endif
}

void Fiber::start(Fiber* self) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self->caller_stack_, &self->caller_size_);
#endif
  self->entry_(self->argument_);
  std::abort();  // entry must end with leave(true)
}

void Fiber::enter() {
  starting = this;
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
#endif
  switch_to(&outside_, inside_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &sanitizer_stack_, caller_stack_, caller_size_);
#endif
  switch_to(&inside_, outside_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(sanitizer_stack_, &caller_stack_, &caller_size_);
#endif
}

}  // namespace fastvit::emulator
