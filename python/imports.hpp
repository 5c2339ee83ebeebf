// Tensors of other libraries, by the C exchange API or by capsules.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

#include "dlpack.hpp"
#include "streams.hpp"

namespace fwp::python {

// A tensor that another library manages, and whose deleter is called once. It touches Python: the GIL is held.
class Managed {
 public:
  Managed() = default;
  explicit Managed(dlpack::ManagedTensor* tensor);
  explicit Managed(dlpack::LegacyTensor* tensor);
  Managed(Managed&& other) noexcept
      : versioned_(std::exchange(other.versioned_, nullptr)), legacy_(std::exchange(other.legacy_, nullptr)) {}
  Managed& operator=(Managed&& other) noexcept {
    std::swap(versioned_, other.versioned_);
    std::swap(legacy_, other.legacy_);
    return *this;
  }
  ~Managed();

  const DLTensor& tensor() const { return versioned_ != nullptr ? versioned_->tensor : legacy_->tensor; }
  bool legacy() const { return legacy_ != nullptr; }
  uint32_t major() const { return versioned_ != nullptr ? versioned_->version.major : dlpack::kMajor; }
  uint64_t flags() const { return versioned_ != nullptr ? versioned_->flags : 0; }

 private:
  dlpack::ManagedTensor* versioned_ = nullptr;
  dlpack::LegacyTensor* legacy_ = nullptr;
};

// The exchange API of this array's type, null if it has none of our major version.
const dlpack::ExchangeApi* exchange_api(pybind11::handle object);
bool has_dlpack(pybind11::handle object);

// The device of the array, on the CPU if it does not say, and the stream that its framework puts work on there now:
// the default one where that cannot be asked for. A torch that does not tell its stream is an UnsupportedError.
DLDevice device_of(const char* name, pybind11::handle object);
Stream work_stream(const char* name, pybind11::handle object, DLDevice device);
Stream work_stream(const char* name, const dlpack::ExchangeApi& api, DLDevice device);

// CuPy has no exchange API. Memory of its allocator, for work on its current stream, is where the object is. Not while
// the stream is captured: its pool does not know of graphs, and would give to others what a graph still uses.
bool cupy_allocates(pybind11::handle object, const Stream& stream);
pybind11::object cupy_memory(DLDevice device, int64_t bytes, void** data);

// The tensor that the array hands out; where its framework refuses, UnsupportedError with that error as its cause. Its
// contents are ready for work on `stream`, null on the CPU; by the exchange API, on the stream of its framework.
Managed take(const char* name, const dlpack::ExchangeApi& api, pybind11::handle object);
Managed take(const char* name, pybind11::handle object, const Stream* stream);
DLTensor borrow(const char* name, const dlpack::ExchangeApi& api, pybind11::handle object);
// A new array of the framework in C order.
pybind11::object allocate(const dlpack::ExchangeApi& api, DLDevice device, int rank, const int64_t* shape,
                          DLDataType dtype);

// What the array's framework calls by the array API's names: its namespace, or its module; none if there is none.
pybind11::object namespace_of(pybind11::handle object);
// A copy that its framework makes, in C order if it can; UnsupportedError if it has no way.
pybind11::object copy_of(const char* name, pybind11::handle object);

// Managed tensors of others that calls hold, and of ours that others hold.
int64_t live_tensors();

std::string dtype_name(DLDataType dtype);
std::string device_name(int type, int id);
std::string type_name(pybind11::handle object);
std::string qualified_type_name(pybind11::handle object);

}  // namespace fwp::python
