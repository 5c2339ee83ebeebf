// Memory of the library's own, as an object that any framework can take over.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fwp/fwp.h"
#include "streams.hpp"

namespace fwp::python {

struct Block;  // memory, and where it is

// fwp_core.Array: a compact array in C order whose memory others share. It does no arithmetic.
class OwnArray {
 public:
  // On a device for work on this stream; work on another one waits for that.
  OwnArray(DLDevice device, const Stream& stream, int rank, const int64_t* shape, DLDataType dtype);

  const std::vector<int64_t>& shape() const { return shape_; }
  DLDevice device() const;
  void* stream() const;
  DLTensor tensor();  // points into this object
  OwnArray copy() const;

  // A capsule whose tensor keeps the memory alive, but neither this object nor the interpreter.
  pybind11::capsule export_versioned(bool copied) const;
  pybind11::capsule export_legacy() const;

 private:
  std::shared_ptr<Block> memory_;
  std::vector<int64_t> shape_, strides_;
  DLDataType dtype_;
};

// Exported tensors that others have not given back.
int64_t exported_tensors();

// The array in the framework of `taker`: what its namespace's from_dlpack makes of it, or, if it has none, itself.
pybind11::object hand_over(pybind11::handle own, pybind11::handle taker);

}  // namespace fwp::python
