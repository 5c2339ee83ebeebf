// Arrays without memory: calls with them check shapes, dtypes and values, and return what their results would be.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "fwp/fwp.h"

namespace fwp::python {

// What stands for an array of another library while it traces a program.
struct AbstractArray {
  std::vector<int64_t> shape;
  std::string dtype;  // by NumPy's name; any, until it is read
};

// Null if the object is none.
const AbstractArray* abstract_array(pybind11::handle object);
pybind11::object make_abstract(int rank, const int64_t* shape, DLDataType dtype);

// The dtype of a floating-point array; raises DTypeError for any other.
DLDataType float_dtype(const char* name, const AbstractArray& array);

}  // namespace fwp::python
