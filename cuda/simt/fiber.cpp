#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// fwp_simt_switch(save, load): stores the registers that a call preserves and the stack pointer in *save, and goes on
// from `load`. fwp_simt_enter is where a new fiber starts: it calls body(argument).
extern "C" void fwp_simt_switch(void** save, void* load);
extern "C" void fwp_simt_enter();

#if defined(__x86_64__)
asm(R"(
.text
.globl fwp_simt_switch
.hidden fwp_simt_switch
.type fwp_simt_switch, @function
fwp_simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fwp_simt_switch, .-fwp_simt_switch
.globl fwp_simt_enter
.hidden fwp_simt_enter
.type fwp_simt_enter, @function
fwp_simt_enter:
  mov %r12, %rdi
  call *%rbx
  ud2
.size fwp_simt_enter, .-fwp_simt_enter
.section .note.GNU-stack,"",@progbits
.text
)");

namespace {
// As fwp_simt_switch leaves a stack: r15 r14 r13 r12 rbx rbp, return address. 16-byte aligned at the call in enter.
constexpr size_t kSlots = 9, kArgument = 3, kBody = 4, kReturn = 6;
}  // namespace

#elif defined(__aarch64__)
asm(R"(
.text
.globl fwp_simt_switch
.hidden fwp_simt_switch
.type fwp_simt_switch, %function
fwp_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size fwp_simt_switch, .-fwp_simt_switch
.globl fwp_simt_enter
.hidden fwp_simt_enter
.type fwp_simt_enter, %function
fwp_simt_enter:
  mov x0, x20
  blr x19
  brk #0
.size fwp_simt_enter, .-fwp_simt_enter
.section .note.GNU-stack,"",%progbits
.text
)");

namespace {
constexpr size_t kSlots = 20, kBody = 0, kArgument = 1, kReturn = 11;
}  // namespace

#else
#error "the SIMT emulator switches stacks on x86-64 and aarch64 only"
#endif

namespace fwp::simt {

Fiber::Fiber() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  bytes_ = page + kStackBytes;
  void* const memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<char*>(memory);
  mprotect(memory_, page, PROT_NONE);
}

Fiber::~Fiber() { munmap(memory_, bytes_); }

void Fiber::restart(void (*body)(void*), void* argument) {
  body_ = body;
  argument_ = argument;
  void** const slots = reinterpret_cast<void**>(memory_ + bytes_) - kSlots;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_ + bytes_ - kStackBytes, kStackBytes);
#endif
  for (size_t i = 0; i < kSlots; ++i) slots[i] = nullptr;
  slots[kBody] = reinterpret_cast<void*>(&Fiber::start);
  slots[kArgument] = this;
  slots[kReturn] = reinterpret_cast<void*>(&fwp_simt_enter);
  inside_ = slots;
}

void Fiber::start(void* self) {
  Fiber& fiber = *static_cast<Fiber*>(self);
  fiber.arrived(nullptr);
  fiber.body_(fiber.argument_);
}

// The address sanitizer is told of each change of stacks. `kept` is what it knows of the one that is left.
#if defined(__SANITIZE_ADDRESS__)
void Fiber::resume() {
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(&kept, memory_ + bytes_ - kStackBytes, kStackBytes);
  fwp_simt_switch(&outside_, inside_);
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
}

void Fiber::suspend() {
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(&kept, outside_stack_, outside_bytes_);
  fwp_simt_switch(&inside_, outside_);
  arrived(kept);
}

void Fiber::arrived(void* kept) { __sanitizer_finish_switch_fiber(kept, &outside_stack_, &outside_bytes_); }
#else
void Fiber::resume() { fwp_simt_switch(&outside_, inside_); }
void Fiber::suspend() { fwp_simt_switch(&inside_, outside_); }
void Fiber::arrived(void*) {}
#endif

}  // namespace fwp::simt
