// The parts of the extension module.
#pragma once

#include <pybind11/pybind11.h>

namespace fwp::python {

// Calls a function of fwp.h without the GIL.
template <class Call>
int without_gil(const Call& call) {
  const pybind11::gil_scoped_release nogil;
  return call();
}

void bind_abstract(pybind11::module_& m);
void bind_array(pybind11::module_& m);
void bind_config(pybind11::module_& m);
void bind_features(pybind11::module_& m);
void bind_scan(pybind11::module_& m);
void bind_xla(pybind11::module_& m);

}  // namespace fwp::python
