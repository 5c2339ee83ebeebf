// Where work is put: devices and their streams, as DLPack numbers them.
#pragma once

#include <pybind11/pybind11.h>

#include "dlpack.hpp"

namespace fwp::python {

inline constexpr DLDevice kHost{kDLCPU, 0};

inline bool is_host(DLDevice device) { return device.device_type == kDLCPU; }
inline bool is_same(DLDevice a, DLDevice b) { return a.device_type == b.device_type && a.device_id == b.device_id; }

// A stream of a CUDA device, NULL on the CPU. The owner, if there is one, keeps it valid.
struct Stream {
  void* handle = nullptr;
  pybind11::object owner;
};

// As DLPack numbers streams, the default one is 1; the handles of CUDA know this number, too.
inline void* const kDefaultStream = reinterpret_cast<void*>(1);  // NOLINT

}  // namespace fwp::python
