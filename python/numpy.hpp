// NumPy arrays as DLTensors, read through the array struct: a few dozen nanoseconds each.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "abstract.hpp"
#include "fwp/fwp.h"

namespace fwp::python {

// One array argument or result of a call. It keeps the array alive; the DLTensor points into it.
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;  // tensor_ points into this object
  Array& operator=(const Array&) = delete;

  // Exactly a numpy.ndarray of native float32, float64, float16 or bfloat16; a subclass, as a masked array, may mean
  // more than its data.
  void read(const char* name, pybind11::handle object);
  void write(const char* name, pybind11::handle object);  // read-only memory is refused
  // None: absent.
  void read_optional(const char* name, pybind11::handle object);
  void write_optional(const char* name, pybind11::handle object);
  // An integer array, or any sequence of integers; None: absent.
  void read_integers(const char* name, pybind11::handle object);

  // New memory in C order; without memory where `like` has none.
  void make(const Array& like, int rank, const int64_t* shape, DLDataType dtype);
  void make(const Array& like, std::initializer_list<int64_t> shape, DLDataType dtype);

  // Arrays without memory meet no others: a DTypeError if one of the two has memory.
  void check_memory(const Array& other) const;
  bool abstract() const { return abstract_; }
  bool present() const { return object_.ptr() != nullptr; }
  const DLTensor* tensor() const { return present() ? &tensor_ : nullptr; }
  int rank() const { return present() ? tensor_.ndim : 0; }
  int64_t size(int axis) const { return shape_[axis]; }
  const int64_t* shape() const { return shape_; }
  DLDataType dtype() const { return tensor_.dtype; }
  pybind11::object object() const;  // None if absent
  pybind11::object used() const;    // the copy if one was made

  // Replaces an array whose last axis is strided by a copy; copy_back writes that copy into a write() array.
  bool make_contiguous();
  void copy_back();

 private:
  static constexpr int kMaxRank = 64;  // NumPy's own limit

  void view(const char* name, DLDataType dtype);
  void view(const AbstractArray& array, DLDataType dtype);

  pybind11::object object_;
  pybind11::object original_;  // what object_ was before make_contiguous
  bool writable_ = false;
  bool abstract_ = false;
  const char* name_ = "";
  std::vector<int64_t> integers_;
  DLTensor tensor_;
  int64_t shape_[kMaxRank];
  int64_t strides_[kMaxRank];
};

}  // namespace fwp::python
