// Kernels on a stream. Under the emulator they run at once, on the host, and what they may touch is what was announced.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "primitives/primitives.cuh"

namespace fwp::cuda {

struct Grid {
  int64_t x = 1, y = 1, z = 1;

  static constexpr int64_t kMost = INT32_MAX, kMostOthers = 65535;
};

// Inside the back end; its border (backend.cu) turns it into Outcome::failed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that a call's kernels may touch: its arrays, and its workspace.
struct Memory {
  const void* begin;
  size_t bytes;
  bool writable;
};

// Shared memory that one block of threads can have on a device, by default the current one.
#ifdef __CUDACC__
constexpr bool kEmulated = false;
// The runtime's words for an error, nullptr where there is none. It is cleared, so that nobody else meets it.
inline const char* error_of(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(status);
}
inline int current_device() {
  int device = 0;
  error_of(cudaGetDevice(&device));
  return device;
}
inline size_t most_shared_bytes(int device = current_device()) {
  int bytes = 0;
  if (error_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) == nullptr)
    return static_cast<size_t>(bytes);
  return 48 << 10;  // every device has that
}
#else
constexpr bool kEmulated = true;
inline size_t emulated_shared_bytes = 227 << 10;  // tests may take less
inline size_t most_shared_bytes(int /*device*/ = 0) { return emulated_shared_bytes; }
#endif

// Bytes of shared memory for a kernel that works in such a struct: a block can have them on every architecture, and
// `blocks` at once on a multiprocessor of compute capability 9.0.
template <class Shared, int blocks>
constexpr size_t shared_of() {
  constexpr size_t kMost = 99 << 10, kMostTogether = 228 << 10, kReserved = 1 << 10;
  static_assert(sizeof(Shared) <= kMost && blocks * (sizeof(Shared) + kReserved) <= kMostTogether);
  return sizeof(Shared);
}

class Queue {
 public:
  // call: whose errors these are.
  Queue(void* stream, const char* call, std::vector<Memory> memory)
      : stream_(stream), call_(call), memory_(std::move(memory)) {}

  // Puts kernel(arguments...) on the stream. An empty grid does nothing. Throws Error.
  template <class... Parameters, class... Arguments>
  void run(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes,
           const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (grid.x > Grid::kMost || std::max(grid.y, grid.z) > Grid::kMostOthers)
      fail(name, "the problem takes more blocks of threads than a launch can have");
    launch(name, kernel, grid, threads, shared_bytes, Parameters(arguments)...);
  }

 private:
#ifdef __CUDACC__
  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes,
              Parameters... parameters) {
    constexpr size_t kWithoutAsking = 48 << 10;
    if (shared_bytes > kWithoutAsking)  // for all that is possible: other threads launch the same kernel
      check(name,
            cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(most_shared_bytes())));
    const auto size = [](int64_t n) { return static_cast<unsigned>(n); };
    void* pointers[] = {&parameters..., nullptr};
    check(name, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(size(grid.x), size(grid.y), size(grid.z)),
                                 dim3(size(threads)), pointers, shared_bytes, static_cast<cudaStream_t>(stream_)));
  }
  void check(const char* name, cudaError_t status) const {
    if (const char* const error = error_of(status)) fail(name, error);
  }
#else
  template <class... Parameters>
  void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, size_t shared_bytes,
              Parameters... parameters) {
    if (shared_bytes > emulated_shared_bytes)
      fail(name, std::to_string(shared_bytes) + " bytes of shared memory, more than " +
                     std::to_string(emulated_shared_bytes));
    const auto size = [](int64_t n) { return static_cast<unsigned>(n); };
    simt::Options options = simt::options_from_environment();
    for (const Memory& m : memory_) options.global.push_back({m.begin, m.bytes, m.writable});
    try {
      simt::launch({size(grid.x), size(grid.y), size(grid.z)}, size(threads), shared_bytes, options,
                   [&] { kernel(parameters...); });
    } catch (const simt::Fault& fault) {
      fail(name, fault.what());
    }
  }
#endif

  [[noreturn]] void fail(const char* kernel, const std::string& message) const {
    throw Error(std::string(call_) + ": " + kernel + ": " + message);
  }

  void* stream_;
  const char* call_;
  std::vector<Memory> memory_;
};

}  // namespace fwp::cuda
