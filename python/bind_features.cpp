#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bind.hpp"
#include "errors.hpp"
#include "features.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

// An array of any rank as rows of its last axis: [M,n], a view of it where that is possible.
struct RowArray {
  py::object array;
  Array rows;

  RowArray(const char* name, py::handle object) : array(py::reinterpret_borrow<py::object>(object)) {
    Array given;
    given.read(name, object);
    if (given.rank() == 0) raise(FWP_SHAPE_ERROR, std::string(name) + ": expected at least one axis, got none");
    if (given.abstract()) {  // no rows, none of which is there
      const int64_t shape[] = {0, given.size(given.rank() - 1)};
      rows.read(name, make_abstract(2, shape, given.dtype()));
      return;
    }
    int64_t count = 1;
    for (int i = 0; i + 1 < given.rank(); ++i) count *= given.size(i);
    rows.read(name, given.rank() == 2 ? array : array.attr("reshape")(count, given.size(given.rank() - 1)));
    rows.make_contiguous();
  }
  int64_t count() const { return rows.size(0); }
  int64_t size() const { return rows.size(1); }

  // The shape of the array with another last axis.
  py::tuple shape(int64_t last) const {
    py::list sizes(array.attr("shape"));
    sizes[sizes.size() - 1] = last;
    return py::tuple(sizes);
  }

  // Rows in the shape of the array but for the last axis.
  py::object like(const Array& result) const {
    const py::tuple sizes = shape(result.size(1));
    if (!result.abstract()) return result.object().attr("reshape")(sizes);
    const auto whole = sizes.cast<std::vector<int64_t>>();
    return make_abstract(static_cast<int>(whole.size()), whole.data(), result.dtype());
  }
};

}  // namespace

FeatureMap::FeatureMap(int kind, int nu, double eps, py::handle projection) : map_ FWP_FEATURE_MAP_INIT {
  projection_.read_optional("projection", projection);
  // A view of its own, so that nobody can take the memory away (ndarray.resize); of a strided last axis a copy.
  projection_.make_contiguous();
  if (projection_.present() && !projection_.abstract())
    projection_.read("projection", projection_.used()[py::ellipsis()]);
  map_.kind = kind;
  map_.nu = nu;
  map_.eps = eps;
  map_.projection = projection_.tensor();
}

int64_t FeatureMap::size(int64_t n) const {
  int64_t size = 0;
  check_scan(fwp_feature_size(&map_, n, &size));
  return size;
}

py::object FeatureMap::forward(py::handle object) const {
  const RowArray x("x", object);
  check_memory(x.rows);
  Array y;
  y.make(x.rows, {x.count(), size(x.size())}, x.rows.dtype());
  check_scan(without_gil([&] { return fwp_feature_map_fwd(&map_, x.rows.tensor(), y.tensor(), nullptr); }));
  return x.like(y);
}

py::object FeatureMap::backward(py::handle d_y, py::handle object) const {
  const RowArray x("x", object), dy("dy", d_y);
  check_memory(x.rows);
  dy.rows.check_memory(x.rows);
  const py::tuple expected = x.shape(size(x.size()));
  if (!py::object(dy.array.attr("shape")).equal(expected))
    raise(FWP_SHAPE_ERROR, "dy: expected shape " + std::string(py::str(expected)) + ", got " +
                               std::string(py::str(dy.array.attr("shape"))));
  Array dx;
  dx.make(x.rows, {x.count(), x.size()}, x.rows.dtype());
  check_scan(
      without_gil([&] { return fwp_feature_map_bwd(&map_, dy.rows.tensor(), x.rows.tensor(), dx.tensor(), nullptr); }));
  return x.like(dx);
}

py::tuple FeatureMap::parameters() const { return py::make_tuple(map_.nu, map_.eps, projection_.used()); }

const FeatureMap* feature_map(py::handle object) {
  if (object.is_none()) return nullptr;
  if (!py::isinstance<FeatureMap>(object))
    raise(FWP_DTYPE_ERROR, "feature_map: expected None or an object of fwp_core.feature_maps, got " +
                               (PyType_Check(object.ptr()) ? std::string(py::str(object))
                                                           : std::string(Py_TYPE(object.ptr())->tp_name)));
  auto* const instance = reinterpret_cast<py::detail::instance*>(object.ptr());
  if (!instance->get_value_and_holder().holder_constructed())
    raise(FWP_DTYPE_ERROR, "feature_map: expected an object whose __init__ was called, got one without");
  return object.cast<const FeatureMap*>();
}

namespace {

// The map of a method, which cannot be None.
const FeatureMap& self(py::handle object) {
  if (object.is_none()) raise(FWP_DTYPE_ERROR, "feature_map: expected an object of fwp_core.feature_maps, got None");
  return *feature_map(object);
}

}  // namespace

void bind_features(py::module_& m) {
  py::class_<FeatureMap>(m, "FeatureMap").def(py::init<int, int, double, py::handle>());
  m.def("feature_parameters", [](py::handle map) { return self(map).parameters(); });
  m.def("feature_size", [](py::handle map, int64_t n) { return self(map).size(n); });
  m.def("feature_forward", [](py::handle map, py::handle x) { return self(map).forward(x); });
  m.def("feature_backward", [](py::handle map, py::handle dy, py::handle x) { return self(map).backward(dy, x); });
}

}  // namespace fwp::python
