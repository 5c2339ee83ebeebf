#include "numpy.hpp"

#include <algorithm>
#include <atomic>
#include <string>
#include <utility>

#include "errors.hpp"
#include "memory.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

constexpr int kTypeNumFloat = 11, kTypeNumDouble = 12, kTypeNumHalf = 23;  // NPY_FLOAT, NPY_DOUBLE, NPY_HALF
constexpr int kFirstUserTypeNum = 256;                                     // NPY_USERDEF

// NumPy's number of the bfloat16 type that another package, usually ml_dtypes, has registered; 0 until one was met.
std::atomic<int> bfloat16_type_num{0};

const py::detail::npy_api& api() { return py::detail::npy_api::get(); }

bool is_array(py::handle object) { return Py_TYPE(object.ptr()) == api().PyArray_Type_; }

std::string type_name(py::handle object) { return object.is_none() ? "None" : Py_TYPE(object.ptr())->tp_name; }

void check_array(const char* name, py::handle object) {
  if (!is_array(object))
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a numpy.ndarray, got " + type_name(object));
}

const py::detail::PyArray_Proxy& fields(py::handle array) { return *py::detail::array_proxy(array.ptr()); }

std::string dtype_name(py::handle array) { return py::str(array.attr("dtype")); }

// NumPy has no bfloat16 of its own: a registered type of two bytes with that name is one. Asked once per type.
bool is_bfloat16(py::handle array) {
  const int number = py::detail::array_descriptor_proxy(fields(array).descr)->type_num;
  if (number < kFirstUserTypeNum) return false;
  if (number == bfloat16_type_num) return true;
  const py::dtype dtype = py::reinterpret_borrow<py::array>(array).dtype();
  if (dtype.itemsize() != 2 || std::string(py::str(dtype.attr("name"))) != "bfloat16") return false;
  bfloat16_type_num = number;
  return true;
}

DLDataType float_dtype(const char* name, py::handle array) {
  const auto& descr = *py::detail::array_descriptor_proxy(fields(array).descr);
  const bool native = descr.byteorder == '=' || descr.byteorder == '|';
  if (native && descr.type_num == kTypeNumFloat) return {kDLFloat, 32, 1};
  if (native && descr.type_num == kTypeNumDouble) return {kDLFloat, 64, 1};
  if (native && descr.type_num == kTypeNumHalf) return {kDLFloat, 16, 1};
  if (native && is_bfloat16(array)) return {kDLBfloat, 16, 1};
  raise(FWP_DTYPE_ERROR,
        std::string(name) + ": expected dtype float32, float64, float16 or bfloat16, got " + dtype_name(array));
}

int type_num(DLDataType dtype) {
  if (dtype.code == kDLBfloat) return bfloat16_type_num;
  return dtype.bits == 64 ? kTypeNumDouble : dtype.bits == 32 ? kTypeNumFloat : kTypeNumHalf;
}

// Saturates far above what can be allocated.
int64_t size_in_bytes(int rank, const int64_t* shape, DLDataType dtype) {
  double bytes = dtype.bits / 8;
  for (int i = 0; i < rank; ++i) bytes *= static_cast<double>(shape[i]);
  return static_cast<int64_t>(std::min(bytes, 0x1p62));
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
  name_ = name;
  if (const AbstractArray* const array = abstract_array(object)) {
    object_ = py::reinterpret_borrow<py::object>(object);
    view(*array, float_dtype(name, *array));
    return;
  }
  check_array(name, object);
  object_ = py::reinterpret_borrow<py::object>(object);
  view(name, float_dtype(name, object));
}

void Array::write(const char* name, py::handle object) {
  read(name, object);
  if (abstract_) return;
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

void Array::make(const Array& like, int rank, const int64_t* shape, DLDataType dtype) {
  if (like.abstract_) {
    object_ = make_abstract(rank, shape, dtype);
    view(*abstract_array(object_), dtype);
    return;
  }
  const WarmMemory warm(size_in_bytes(rank, shape, dtype));
  PyObject* const descr = api().PyArray_DescrFromType_(type_num(dtype));
  object_ = py::reinterpret_steal<py::object>(api().PyArray_NewFromDescr_(
      api().PyArray_Type_, descr, rank, reinterpret_cast<const Py_intptr_t*>(shape), nullptr, nullptr, 0, nullptr));
  if (!object_) throw py::error_already_set();
  view("", dtype);
}

void Array::make(const Array& like, std::initializer_list<int64_t> shape, DLDataType dtype) {
  make(like, static_cast<int>(shape.size()), shape.begin(), dtype);
}

void Array::check_memory(const Array& other) const {
  if (!present() || abstract_ == other.abstract_) return;
  raise(FWP_DTYPE_ERROR, std::string(name_) + ": expected an array " + (abstract_ ? "with" : "without") +
                             " memory, as " + other.name_ + " is, got one " + (abstract_ ? "without" : "with"));
}

py::object Array::object() const {
  if (!present()) return py::none();
  return original_ ? original_ : object_;
}

py::object Array::used() const { return present() ? object_ : py::none(); }

bool Array::make_contiguous() {
  if (!present() || tensor_.ndim == 0 || shape_[tensor_.ndim - 1] <= 1 || tensor_.strides == nullptr ||
      strides_[tensor_.ndim - 1] == 1)
    return false;
  const WarmMemory warm(size_in_bytes(tensor_.ndim, shape_, tensor_.dtype));
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

void Array::view(const AbstractArray& array, DLDataType dtype) {
  alignas(64) static char nowhere[64];
  abstract_ = true;
  const int rank = static_cast<int>(std::min<size_t>(array.shape.size(), kMaxRank));
  std::copy(array.shape.begin(), array.shape.begin() + rank, shape_);
  tensor_ = {nowhere, {kDLCPU, 0}, rank, dtype, shape_, nullptr, 0};
}

}  // namespace fwp::python
