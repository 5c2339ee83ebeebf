// CUDA devices as the back end uses them: the current one, memory in the order of a stream, and a word through which
// kernels report what only they can find. Under the emulator there is one device, and its memory is the host's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.hpp"

namespace fwp::cuda {

// "available", "emulated", or why no device can be used, in the driver's words.
const char* device_state();

// Makes a device current, until the end of its scope. Throws Error.
class UseDevice {
 public:
  explicit UseDevice(int device);
  ~UseDevice();
  UseDevice(const UseDevice&) = delete;
  UseDevice& operator=(const UseDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Of a pool that keeps up to FWP_CACHE_MB idle; nullptr: there is none.
void* device_allocate(int device, size_t bytes, void* stream);
void device_free(int device, void* memory, void* stream);
void device_trim();
// Throw Error.
void device_copy(void* to, const void* from, size_t bytes, void* stream);
void device_wait(void* from, void* to);

// Zero until a kernel writes to it. Host memory that the device writes to: reading it waits for nothing.
int32_t* fault_word(int device);
// What it is, from now on zero.
int32_t take_fault(int device);

}  // namespace fwp::cuda
