// The parts of the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace fwp::python {

void bind_config(pybind11::module_& m);
void bind_features(pybind11::module_& m);
void bind_scan(pybind11::module_& m);

}  // namespace fwp::python
