#include "abstract.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "bind.hpp"
#include "errors.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

constexpr std::pair<const char*, DLDataType> kDTypes[] = {
    {"float32", {kDLFloat, 32, 1}},
    {"float64", {kDLFloat, 64, 1}},
    {"float16", {kDLFloat, 16, 1}},
    {"bfloat16", {kDLBfloat, 16, 1}},
};

}  // namespace

const AbstractArray* abstract_array(py::handle object) {
  return py::isinstance<AbstractArray>(object) ? object.cast<const AbstractArray*>() : nullptr;
}

py::object make_abstract(int rank, const int64_t* shape, DLDataType dtype) {
  const auto* const found = std::find_if(std::begin(kDTypes), std::end(kDTypes), [dtype](const auto& known) {
    return known.second.code == dtype.code && known.second.bits == dtype.bits;
  });
  return py::cast(AbstractArray{{shape, shape + rank}, found->first});
}

DLDataType float_dtype(const char* name, const AbstractArray& array) {
  for (const auto& [known, dtype] : kDTypes)
    if (array.dtype == known) return dtype;
  raise(FWP_DTYPE_ERROR,
        std::string(name) + ": expected dtype float32, float64, float16 or bfloat16, got " + array.dtype);
}

void bind_abstract(py::module_& m) {
  py::class_<AbstractArray>(m, "AbstractArray")
      .def(py::init([](std::vector<int64_t> shape, std::string dtype) {
        return AbstractArray{std::move(shape), std::move(dtype)};
      }))
      .def_property_readonly("shape", [](const AbstractArray& array) { return py::tuple(py::cast(array.shape)); })
      .def_readonly("dtype", &AbstractArray::dtype);
}

}  // namespace fwp::python
