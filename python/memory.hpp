// Memory of NumPy arrays from the library's cache.
#pragma once

#include <cstdint>

namespace fwp::python {

// While it lives, arrays that NumPy makes in this thread take their memory from fwp_allocate if they are as large as
// the blocks which that keeps warm. Such an array owns its memory like any other.
class WarmMemory {
 public:
  explicit WarmMemory(int64_t bytes);
  ~WarmMemory();
  WarmMemory(const WarmMemory&) = delete;
  WarmMemory& operator=(const WarmMemory&) = delete;

 private:
  void* before_ = nullptr;  // the handler that was in force, null if this changed nothing
};

}  // namespace fwp::python
