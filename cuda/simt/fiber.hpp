// Fibers: threads of control that hand the processor over by themselves. All fibers of an Emulator run on one OS
// thread.
#pragma once

#include <cstddef>

namespace fwp::simt {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() enters body(argument), which must not return: it ends in suspend(). What ran on this stack before
  // is forgotten, without destructors.
  void restart(void (*body)(void*), void* argument);

  void resume();   // from outside: runs until the fiber suspends
  void suspend();  // from inside: back to whoever resumed

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  static void start(void* self);
  void arrived(void* kept);  // on this fiber's stack, from outside

  char* memory_;  // a page that must not be touched, then the stack, which grows towards it
  size_t bytes_;
  void* inside_ = nullptr;  // stack pointers while the other side runs
  void* outside_ = nullptr;
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
};

}  // namespace fwp::simt
