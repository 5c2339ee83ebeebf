#include <pybind11/pybind11.h>

#include "bind.hpp"
#include "errors.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled part of fwp_core: the C library called with arrays of any framework.";
  pybind11::options options;
  options.disable_function_signatures();
  fwp::python::bind_errors(m);
  fwp::python::bind_abstract(m);
  fwp::python::bind_array(m);
  fwp::python::bind_config(m);
  fwp::python::bind_features(m);
  fwp::python::bind_scan(m);
  fwp::python::bind_xla(m);
}
