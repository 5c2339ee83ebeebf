// Feature maps as Python objects, and as fwp.h takes them.
#pragma once

#include <pybind11/pybind11.h>

#include "arrays.hpp"
#include "fwp/fwp.h"

namespace fwp::python {

// Immutable. It keeps its projection alive.
class FeatureMap {
 public:
  FeatureMap(int kind, int nu, double eps, pybind11::handle projection);

  const fwp_feature_map* tensors() const { return &map_; }
  void check_memory(const Array& x) const;  // the projection has memory if x has
  pybind11::tuple parameters() const;       // nu, eps, projection

  int64_t size(int64_t n) const;  // features of a row of n numbers
  pybind11::object forward(pybind11::handle x) const;
  pybind11::object backward(pybind11::handle dy, pybind11::handle x) const;

 private:
  Array projection_;
  fwp_feature_map map_;
};

// An object that is ready for use; None: NULL.
const FeatureMap* feature_map(pybind11::handle object);

}  // namespace fwp::python
