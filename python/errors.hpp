// Python exceptions for the error codes of fwp.h.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fwp::python {

// Raises the exception of this code.
[[noreturn]] void raise(int code, const std::string& message);

// Raises what a function of fwp.h reported; FWP_OK passes. check_scan gives the arguments their Python names.
void check(int status);
void check_scan(int status);

// Forgets a pending TypeError, for a better message to follow; throws any other pending error.
void clear_type_error();

void bind_errors(pybind11::module_& m);

}  // namespace fwp::python
