#include "numpy.hpp"

#include <string>
#include <utility>

#include "errors.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

constexpr int kTypeNumFloat = 11, kTypeNumDouble = 12;  // NPY_FLOAT, NPY_DOUBLE

const py::detail::npy_api& api() { return py::detail::npy_api::get(); }

bool is_array(py::handle object) { return Py_TYPE(object.ptr()) == api().PyArray_Type_; }

std::string type_name(py::handle object) { return object.is_none() ? "None" : Py_TYPE(object.ptr())->tp_name; }

void check_array(const char* name, py::handle object) {
  if (!is_array(object))
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a numpy.ndarray, got " + type_name(object));
}

const py::detail::PyArray_Proxy& fields(py::handle array) { return *py::detail::array_proxy(array.ptr()); }

std::string dtype_name(py::handle array) { return py::str(array.attr("dtype")); }

DLDataType float_dtype(const char* name, py::handle array) {
  const auto& descr = *py::detail::array_descriptor_proxy(fields(array).descr);
  const bool native = descr.byteorder == '=' || descr.byteorder == '|';
  if (native && descr.type_num == kTypeNumFloat) return {kDLFloat, 32, 1};
  if (native && descr.type_num == kTypeNumDouble) return {kDLFloat, 64, 1};
  raise(FWP_DTYPE_ERROR, std::string(name) + ": expected dtype float32 or float64, got " + dtype_name(array));
}

int64_t index_of(const char* name, py::handle item) {
  const std::string expected = std::string(name) + ": expected integers";
  const py::object integer =
      PyBool_Check(item.ptr()) ? py::object() : py::reinterpret_steal<py::object>(PyNumber_Index(item.ptr()));
  if (!integer) {
    clear_type_error();
    raise(FWP_DTYPE_ERROR, expected + ", got " + type_name(item));
  }
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
  if (overflow != 0) raise(FWP_ARGUMENT_ERROR, expected + " of at most 64 bits, got " + std::string(py::str(integer)));
  return value;
}

}  // namespace

void Array::read(const char* name, py::handle object) {
  check_array(name, object);
  object_ = py::reinterpret_borrow<py::object>(object);
  view(name, float_dtype(name, object));
}

void Array::write(const char* name, py::handle object) {
  read(name, object);
  if ((fields(object).flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) == 0)
    raise(FWP_READ_ONLY_ERROR, std::string(name) + ": expected a writable array, got a read-only one");
  writable_ = true;
}

void Array::read_optional(const char* name, py::handle object) {
  if (!object.is_none()) read(name, object);
}

void Array::write_optional(const char* name, py::handle object) {
  if (!object.is_none()) write(name, object);
}

void Array::read_integers(const char* name, py::handle object) {
  if (object.is_none()) return;
  py::object items = py::reinterpret_borrow<py::object>(object);
  if (is_array(object)) {
    const py::dtype dtype = py::reinterpret_borrow<py::array>(object).dtype();
    if (dtype.kind() != 'i' && dtype.kind() != 'u')
      raise(FWP_DTYPE_ERROR, std::string(name) + ": expected integers, got dtype " + dtype_name(object));
    if (dtype.kind() == 'i' && dtype.itemsize() >= 4 && dtype.byteorder() == '=') {
      object_ = std::move(items);
      view(name, {kDLInt, static_cast<uint8_t>(8 * dtype.itemsize()), 1});
      return;
    }
    items = items.attr("tolist")();
  }
  if (PySequence_Check(items.ptr()) == 0 || PyUnicode_Check(items.ptr()) || PyBytes_Check(items.ptr()) ||
      PyObject_TypeCheck(items.ptr(), api().PyArray_Type_))
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a sequence of integers, got " + type_name(object));
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(items)) integers_.push_back(index_of(name, item));
  object_ = std::move(items);
  shape_[0] = static_cast<int64_t>(integers_.size());
  tensor_ = {integers_.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, shape_, nullptr, 0};
}

void Array::make(int rank, const int64_t* shape, DLDataType dtype) {
  PyObject* const descr = api().PyArray_DescrFromType_(dtype.bits == 32 ? kTypeNumFloat : kTypeNumDouble);
  object_ = py::reinterpret_steal<py::object>(api().PyArray_NewFromDescr_(
      api().PyArray_Type_, descr, rank, reinterpret_cast<const Py_intptr_t*>(shape), nullptr, nullptr, 0, nullptr));
  if (!object_) throw py::error_already_set();
  view("", dtype);
}

void Array::make(std::initializer_list<int64_t> shape, DLDataType dtype) {
  make(static_cast<int>(shape.size()), shape.begin(), dtype);
}

py::object Array::object() const {
  if (!present()) return py::none();
  return original_ ? original_ : object_;
}

bool Array::make_contiguous() {
  if (!present() || tensor_.ndim == 0 || shape_[tensor_.ndim - 1] <= 1 || tensor_.strides == nullptr ||
      strides_[tensor_.ndim - 1] == 1)
    return false;
  py::object copy = py::reinterpret_steal<py::object>(api().PyArray_NewCopy_(object_.ptr(), 0));
  if (!copy) throw py::error_already_set();
  original_ = std::exchange(object_, std::move(copy));
  view("", tensor_.dtype);
  return true;
}

void Array::copy_back() {
  if (writable_ && original_ && api().PyArray_CopyInto_(original_.ptr(), object_.ptr()) != 0)
    throw py::error_already_set();
}

void Array::view(const char* name, DLDataType dtype) {
  const auto& array = fields(object_);
  const int64_t item = dtype.bits / 8;
  for (int i = 0; i < array.nd; ++i) {
    shape_[i] = array.dimensions[i];
    strides_[i] = array.strides[i] / item;
    if (shape_[i] > 1 && array.strides[i] % item != 0)
      raise(FWP_ARGUMENT_ERROR, std::string(name) + ": expected strides that are multiples of the item size of " +
                                    std::to_string(item) + " bytes, got " + std::to_string(array.strides[i]) +
                                    " bytes along axis " + std::to_string(i));
  }
  tensor_ = {array.data, {kDLCPU, 0}, array.nd, dtype, shape_, strides_, 0};
}

}  // namespace fwp::python
