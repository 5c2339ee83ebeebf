// Python exceptions for the error codes of fwp.h.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fwp::python {

// Raises the exception of this code.
[[noreturn]] void raise(int code, const std::string& message);

// Raises what a function of fwp.h reported, with arguments under their Python names; FWP_OK passes.
void check(int status);

// Forgets a pending TypeError, for a better message to follow; throws any other pending error.
void clear_type_error();

void bind_errors(pybind11::module_& m);

}  // namespace fwp::python
