#include "memory.hpp"

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/numpy.h>

#include <cstring>

#include "errors.hpp"
#include "fwp/fwp.h"

namespace py = pybind11;

namespace fwp::python {
namespace {

constexpr int64_t kLarge = int64_t{1} << 20;

// PyDataMem_Handler of NumPy's C interface.
struct Handler {
  char name[127];
  uint8_t version;
  void* context;
  void* (*allocate)(void*, size_t bytes);
  void* (*allocate_zeros)(void*, size_t count, size_t bytes);
  void* (*reallocate)(void*, void* memory, size_t bytes);
  void (*free)(void*, void* memory, size_t bytes);
};

void* allocate_zeros(void*, size_t count, size_t bytes) {
  if (bytes != 0 && count > SIZE_MAX / bytes) return nullptr;
  void* const memory = fwp_allocate(count * bytes);
  return memory != nullptr ? std::memset(memory, 0, count * bytes) : nullptr;
}

Handler handler{"fwp_core",
                1,
                nullptr,
                [](void*, size_t bytes) { return fwp_allocate(bytes); },
                allocate_zeros,
                [](void*, void* memory, size_t bytes) { return fwp_reallocate(memory, bytes); },
                [](void*, void* memory, size_t) { fwp_free(memory); }};

using SetHandler = PyObject* (*)(PyObject*);

// What pybind11 does not take from NumPy's table of functions.
struct HandlerApi {
  SetHandler set;  // returns the handler that was in force
  py::capsule ours;
};

const HandlerApi& api() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<HandlerApi> found;
  found.call_once_and_store_result([] {
    constexpr int kSetHandler = 304;
    void** const table = py::module_::import("numpy._core.multiarray").attr("_ARRAY_API").cast<py::capsule>();
    return HandlerApi{reinterpret_cast<SetHandler>(table[kSetHandler]), py::capsule(&handler, "mem_handler")};
  });
  return found.get_stored();
}

}  // namespace

WarmMemory::WarmMemory(int64_t bytes) {
  if (bytes < kLarge) return;
  size_t limit = 0;
  check(fwp_cache_limit(&limit));
  before_ = api().set(api().ours.ptr());
  if (before_ == nullptr) throw py::error_already_set();
}

WarmMemory::~WarmMemory() {
  if (before_ == nullptr) return;
  const py::error_scope pending;
  Py_XDECREF(api().set(static_cast<PyObject*>(before_)));
  Py_DECREF(static_cast<PyObject*>(before_));
  PyErr_Clear();
}

}  // namespace fwp::python
