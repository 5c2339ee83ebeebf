#include <algorithm>
#include <string>

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
};

template <class Call>
void run(const Call& call) {
  int status = 0;
  {
    const py::gil_scoped_release nogil;
    status = call();
  }
  check_scan(status);
}

}  // namespace

FeatureMap::FeatureMap(int kind, int nu, double eps, py::handle projection) : map_ FWP_FEATURE_MAP_INIT {
  projection_.read_optional("projection", projection);
  projection_.make_contiguous();
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
  Array y;
  y.make({x.count(), size(x.size())}, x.rows.dtype());
  run([&] { return fwp_feature_map_fwd(&map_, x.rows.tensor(), y.tensor(), nullptr); });
  return y.object().attr("reshape")(x.shape(y.size(1)));
}

py::object FeatureMap::backward(py::handle d_y, py::handle object) const {
  const RowArray x("x", object), dy("dy", d_y);
  const py::tuple expected = x.shape(size(x.size()));
  if (!py::object(dy.array.attr("shape")).equal(expected))
    raise(FWP_SHAPE_ERROR, "dy: expected shape " + std::string(py::str(expected)) + ", got " +
                               std::string(py::str(dy.array.attr("shape"))));
  Array dx;
  dx.make({x.count(), x.size()}, x.rows.dtype());
  run([&] { return fwp_feature_map_bwd(&map_, dy.rows.tensor(), x.rows.tensor(), dx.tensor(), nullptr); });
  return dx.object().attr("reshape")(x.shape(x.size()));
}

const FeatureMap* feature_map(py::handle object) {
  if (object.is_none()) return nullptr;
  if (!py::isinstance<FeatureMap>(object))
    raise(FWP_DTYPE_ERROR, std::string("feature_map: expected None or an object of fwp_core.feature_maps, got ") +
                               Py_TYPE(object.ptr())->tp_name);
  return object.cast<const FeatureMap*>();
}

void bind_features(py::module_& m) {
  py::class_<FeatureMap>(m, "FeatureMap")
      .def(py::init<int, int, double, py::handle>())
      .def_property_readonly("_nu", &FeatureMap::nu)
      .def_property_readonly("_eps", &FeatureMap::eps)
      .def_property_readonly("_projection", &FeatureMap::projection)
      .def("_size", &FeatureMap::size)
      .def("_forward", &FeatureMap::forward)
      .def("_backward", &FeatureMap::backward);
}

}  // namespace fwp::python
