#include <array>
#include <cctype>
#include <utility>

#include "errors.hpp"
#include "fwp/fwp.h"

namespace py = pybind11;

namespace fwp::python {
namespace {

// The exception class of each code, alive as long as the process.
std::array<PyObject*, 16> exceptions{};

// Arguments that C and Python spell differently.
constexpr std::pair<const char*, const char*> kNames[] = {
    {"o", "out"},
    {"h0", "initial_state"},
    {"hT", "final_state_out"},
    {"d_o", "do"},
    {"dq", "out.dq"},
    {"dk", "out.dk"},
    {"dv", "out.dv"},
    {"d_hT", "dfinal_state"},
    {"dg", "out.dg"},
    {"dbeta", "out.dbeta"},
    {"dh0", "out.dinitial_state"},
    {"d_y", "dy"},
    {"d_x", "dx"},
};

std::string python_name(const std::string& word) {
  for (const auto& [c, python] : kNames)
    if (word == c) return python;
  return word;
}

std::string python_names(const std::string& message) {
  std::string result, word;
  for (const char letter : message + '\n') {
    if (std::isalnum(static_cast<unsigned char>(letter)) != 0 || letter == '_') {
      word += letter;
    } else {
      result += python_name(word) + letter;
      word.clear();
    }
  }
  result.pop_back();
  return result;
}

}  // namespace

void raise(int code, const std::string& message) {
  PyErr_SetString(exceptions.at(static_cast<size_t>(code)), message.c_str());
  throw py::error_already_set();
}

void check(int status) {
  if (status != FWP_OK) raise(status, fwp_last_error());
}

void check_scan(int status) {
  if (status == FWP_OK) return;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();  // what interrupted the call
  raise(status, python_names(fwp_last_error()));
}

void clear_type_error() {
  if (PyErr_Occurred() != nullptr && PyErr_ExceptionMatches(PyExc_TypeError) == 0) throw py::error_already_set();
  PyErr_Clear();
}

void bind_errors(py::module_& m) {
  const py::module_ builtins = py::module_::import("builtins");
  const py::object base = py::reinterpret_steal<py::object>(PyErr_NewExceptionWithDoc(
      "fwp_core.FwpError", "Base of the errors of fwp_core; each is a built-in error too.", nullptr, nullptr));
  m.attr("FwpError") = base;

  size_t count = 0;
  const fwp_error_info* const table = fwp_error_table(&count);
  py::list rows;
  for (const fwp_error_info* error = table; error != table + count; ++error) {
    const std::string name = error->name;
    const py::object python_base = builtins.attr(error->python_base);
    py::object type = python_base;
    if (name != error->python_base) {
      const py::tuple bases = py::make_tuple(base, python_base);
      type = py::reinterpret_steal<py::object>(
          PyErr_NewExceptionWithDoc(("fwp_core." + name).c_str(), error->meaning, bases.ptr(), nullptr));
      m.attr(name.c_str()) = type;
    }
    rows.append(py::make_tuple(error->code, name, error->python_base, error->meaning));
    exceptions.at(static_cast<size_t>(error->code)) = type.release().ptr();
  }
  m.attr("ERRORS") = py::tuple(rows);
}

}  // namespace fwp::python
