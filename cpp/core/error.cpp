#include "error.hpp"

#include <cstddef>
#include <cstdio>
#include <iterator>

namespace fwp::core {
namespace {

constexpr fwp_error_info kErrors[] = {
    {FWP_SHAPE_ERROR, "ShapeError", "ValueError", "an argument has the wrong number of axes or the wrong size"},
    {FWP_DTYPE_ERROR, "DTypeError", "TypeError", "an argument has the wrong type or dtype, or a required one is None"},
    {FWP_DEVICE_ERROR, "DeviceError", "BufferError", "an argument lives on a device that cannot be used here"},
    {FWP_UNSUPPORTED_ERROR, "UnsupportedError", "NotImplementedError", "a valid request without an implementation"},
    {FWP_ARGUMENT_ERROR, "ArgumentError", "ValueError",
     "an argument has a wrong value, alignment or stride, or an output overlaps another argument"},
    {FWP_READ_ONLY_ERROR, "ReadOnlyError", "BufferError", "an output is read-only"},
    {FWP_CUDA_ERROR, "CudaError", "RuntimeError", "the CUDA runtime reported a failure"},
    {FWP_OUT_OF_MEMORY, "MemoryError", "MemoryError", "memory ran out"},
    {FWP_INTERRUPTED, "KeyboardInterrupt", "KeyboardInterrupt", "the interrupt callback asked the call to stop"},
    {FWP_INTERNAL_ERROR, "RuntimeError", "RuntimeError", "a fault of the library itself"},
};

thread_local int status_of_thread = FWP_OK;
thread_local char message_of_thread[1024] = "";

}  // namespace

int set_last_error(int code, const char* message) noexcept {
  std::snprintf(message_of_thread, sizeof message_of_thread, "%s", message);
  return status_of_thread = code;
}

int last_status() noexcept { return status_of_thread; }
const char* last_error() noexcept { return message_of_thread; }

}  // namespace fwp::core

extern "C" {

const fwp_error_info* fwp_error_table(size_t* count) noexcept {
  if (count != nullptr) *count = std::size(fwp::core::kErrors);
  return fwp::core::kErrors;
}

int fwp_last_status(void) noexcept { return fwp::core::last_status(); }
const char* fwp_last_error(void) noexcept { return fwp::core::last_error(); }

}  // extern "C"
