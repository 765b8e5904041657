// A fiber: a stack and a place to continue. Switching is eleven instructions on x86-64 and swapcontext elsewhere, which
// costs two system calls and is otherwise the same.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// Stacks are mapped with a forbidden page below, so that an overflow stops at once.
class Stack {
 public:
  static constexpr std::size_t kSize = 128 * 1024, kGuard = 4096;

  Stack() : base_(mmap(nullptr, kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (base_ == MAP_FAILED) throw std::runtime_error("emulator: no memory for a fiber's stack");
    mprotect(base_, kGuard, PROT_NONE);
  }
  ~Stack() { munmap(base_, kSize); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* base() const { return static_cast<char*>(base_) + kGuard; }
  std::size_t size() const { return kSize - kGuard; }
  void* top() const { return static_cast<char*>(base_) + kSize; }

 private:
  void* base_;
};

#if defined(__x86_64__)
// Saves the registers that a call preserves on this stack, and continues on the other one.
extern "C" void unirank_emulator_switch(void** save, void* load);
asm(R"(
.text
.weak unirank_emulator_switch
.hidden unirank_emulator_switch
.type unirank_emulator_switch,@function
unirank_emulator_switch:
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
.size unirank_emulator_switch,.-unirank_emulator_switch
)");
#endif

// The scheduler resumes a fiber, the fiber suspends itself; `entry` must end in suspend() and never return.
class Fiber {
 public:
  void start(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    // A kernel that was stopped by a fault left its frames' red zones behind.
    __asan_unpoison_memory_region(stack_.base(), stack_.size());
#endif
#if defined(__x86_64__)
    // As if `entry` had been called, which left a return address and so this alignment, and had then switched away.
    void** sp = static_cast<void**>(stack_.top());
    *--sp = nullptr;
    *--sp = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--sp = nullptr;
    here_ = sp;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack_.base();
    here_.uc_stack.ss_size = stack_.size();
    here_.uc_link = nullptr;
    makecontext(&here_, entry, 0);
#endif
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.base(), stack_.size());
    swap(there_, here_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swap(there_, here_);
#endif
  }

  void suspend() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_base_, scheduler_size_);
    swap(here_, there_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_base_, &scheduler_size_);
#else
    swap(here_, there_);
#endif
  }

  // First thing on a new fiber.
  void arrived() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_base_, &scheduler_size_);
#endif
  }

 private:
#if defined(__x86_64__)
  using Place = void*;
  static void swap(Place& from, Place& to) { unirank_emulator_switch(&from, to); }
#else
  using Place = ucontext_t;
  static void swap(Place& from, Place& to) { swapcontext(&from, &to); }
#endif
  Stack stack_;
  Place here_{}, there_{};
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_base_ = nullptr;
  std::size_t scheduler_size_ = 0;
#endif
};

}  // namespace emulator
