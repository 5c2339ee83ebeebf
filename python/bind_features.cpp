#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "arrays.hpp"
#include "bind.hpp"
#include "errors.hpp"
#include "features.hpp"
#include "numpy.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

// An array as rows of its last axis, for as long as it is not returned.
struct Rows : Array {
  std::vector<int64_t> whole;  // its shape

  Rows(const char* name, py::handle object, const Array* like = nullptr) {
    read(name, object, like);
    if (rank() == 0) raise(FWP_SHAPE_ERROR, std::string(name) + ": expected at least one axis, got none");
    as_rows();
  }
  // New, of the shape of `like` but for the last axis.
  Rows(const Rows& like, int64_t last) {
    std::vector<int64_t> sizes = like.with_last(last);
    make(like, static_cast<int>(sizes.size()), sizes.data(), like.dtype());
    as_rows();
  }

  std::vector<int64_t> with_last(int64_t last) const {
    std::vector<int64_t> sizes = whole;
    sizes.back() = last;
    return sizes;
  }
  int64_t row_size() const { return whole.back(); }

 private:
  void as_rows() {
    whole.assign(shape(), shape() + rank());
    make_rows();
  }
};

std::string text(const std::vector<int64_t>& shape) { return py::str(py::tuple(py::cast(shape))); }

}  // namespace

FeatureMap::FeatureMap(int kind, int nu, double eps, py::handle projection) : map_ FWP_FEATURE_MAP_INIT {
  // A view of its own, so that nobody can take the memory away (ndarray.resize), of a strided last axis a copy. Arrays
  // of others, who can take memory away from any view, are copied, where they are.
  Array given;
  given.read_optional("projection", projection);
  if (given.abstract()) {
    projection_.read("projection", projection);
  } else if (given.present()) {
    const bool in_place = numpy::is_array(projection) && !given.make_contiguous();
    projection_.read("projection", in_place ? projection[py::ellipsis()] : given.kept());
  }
  map_.kind = kind;
  map_.nu = nu;
  map_.eps = eps;
  map_.projection = projection_.tensor();
}

void FeatureMap::check_memory(const Array& x) const {
  if (projection_.present() && projection_.abstract() != x.abstract())
    raise(FWP_DTYPE_ERROR, std::string("projection: expected an array of the framework that q and x are of, got ") +
                               (projection_.abstract() ? "a JAX array" : "another"));
}

int64_t FeatureMap::size(int64_t n) const {
  int64_t size = 0;
  check_scan(fwp_feature_size(&map_, n, &size));
  return size;
}

py::object FeatureMap::forward(py::handle object) const {
  const Rows x("x", object);
  check_memory(x);
  const Rows y(x, size(x.row_size()));
  check_scan(without_gil([&] { return fwp_feature_map_fwd(&map_, x.tensor(), y.tensor(), x.stream()); }));
  return y.object();
}

py::object FeatureMap::backward(py::handle d_y, py::handle object) const {
  const Rows x("x", object), dy("dy", d_y, &x);
  check_memory(x);
  const std::vector<int64_t> expected = x.with_last(size(x.row_size()));
  if (dy.whole != expected) raise(FWP_SHAPE_ERROR, "dy: expected shape " + text(expected) + ", got " + text(dy.whole));
  const Rows dx(x, x.row_size());
  check_scan(without_gil([&] { return fwp_feature_map_bwd(&map_, dy.tensor(), x.tensor(), dx.tensor(), x.stream()); }));
  return dx.object();
}

py::tuple FeatureMap::parameters() const { return py::make_tuple(map_.nu, map_.eps, projection_.object()); }

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
