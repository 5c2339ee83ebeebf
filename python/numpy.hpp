// NumPy's side of arrays: the array struct, read without a call into NumPy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "fwp/fwp.h"

namespace fwp::python::numpy {

inline const pybind11::detail::npy_api& api() { return pybind11::detail::npy_api::get(); }
inline const pybind11::detail::PyArray_Proxy& fields(pybind11::handle array) {
  return *pybind11::detail::array_proxy(array.ptr());
}

// Exactly a numpy.ndarray; and one of its subclasses.
inline bool is_array(pybind11::handle object) { return Py_TYPE(object.ptr()) == api().PyArray_Type_; }
inline bool is_subclass(pybind11::handle object) {
  return !is_array(object) && PyObject_TypeCheck(object.ptr(), api().PyArray_Type_);
}

// Native float32, float64, float16 or bfloat16; raises DTypeError.
DLDataType float_dtype(const char* name, pybind11::handle array);
bool is_writable(pybind11::handle array);

// A new array in C order; `empty`: of the shape and dtype of a tensor.
pybind11::array empty(const DLTensor& tensor);
pybind11::object make(int rank, const int64_t* shape, DLDataType dtype);
pybind11::object copy(pybind11::handle array);
void copy_into(pybind11::handle to, pybind11::handle from);
// An array over the memory of a tensor; it keeps `base` alive, or, without one, nothing. A bfloat16 without ml_dtypes
// is UnsupportedError; as_bits gives unsigned integers of the same size in its place.
pybind11::object over(const DLTensor& tensor, pybind11::handle base, bool as_bits);

}  // namespace fwp::python::numpy
