#include "numpy.hpp"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "errors.hpp"
#include "memory.hpp"

namespace py = pybind11;

namespace fwp::python::numpy {
namespace {

constexpr int kTypeNumFloat = 11, kTypeNumDouble = 12, kTypeNumHalf = 23;  // NPY_FLOAT, NPY_DOUBLE, NPY_HALF
constexpr int kFirstUserTypeNum = 256;                                     // NPY_USERDEF

// NumPy's number of the bfloat16 type that another package, usually ml_dtypes, has registered; 0 until one was met.
std::atomic<int> bfloat16_type_num{0};

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

int type_num(DLDataType dtype) {
  if (dtype.code == kDLBfloat) return bfloat16_type_num;
  return dtype.bits == 64 ? kTypeNumDouble : dtype.bits == 32 ? kTypeNumFloat : kTypeNumHalf;
}

py::dtype bfloat16() {
  try {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    raise(FWP_UNSUPPORTED_ERROR, "bfloat16: expected the package ml_dtypes, which gives NumPy this type, got none");
  }
}

py::dtype named(DLDataType dtype, bool as_bits) {
  if (dtype.code == kDLBfloat && !as_bits) return bfloat16();
  const char kind = as_bits || dtype.code == kDLUInt ? 'u' : dtype.code == kDLInt ? 'i' : 'f';
  return py::dtype(kind + std::to_string(dtype.bits / 8));
}

// Saturates far above what can be allocated.
int64_t size_in_bytes(int rank, const int64_t* shape, int item) {
  double bytes = item;
  for (int i = 0; i < rank; ++i) bytes *= static_cast<double>(shape[i]);
  return static_cast<int64_t>(std::min(bytes, 0x1p62));
}

}  // namespace

DLDataType float_dtype(const char* name, py::handle array) {
  const auto& descr = *py::detail::array_descriptor_proxy(fields(array).descr);
  const bool native = descr.byteorder == '=' || descr.byteorder == '|';
  if (native && descr.type_num == kTypeNumFloat) return {kDLFloat, 32, 1};
  if (native && descr.type_num == kTypeNumDouble) return {kDLFloat, 64, 1};
  if (native && descr.type_num == kTypeNumHalf) return {kDLFloat, 16, 1};
  if (native && is_bfloat16(array)) return {kDLBfloat, 16, 1};
  raise(FWP_DTYPE_ERROR, std::string(name) + ": expected dtype float32, float64, float16 or bfloat16, got " +
                             std::string(py::str(array.attr("dtype"))));
}

bool is_writable(py::handle array) { return (fields(array).flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0; }

py::object make(int rank, const int64_t* shape, DLDataType dtype) {
  const WarmMemory warm(size_in_bytes(rank, shape, dtype.bits / 8));
  PyObject* const descr = api().PyArray_DescrFromType_(type_num(dtype));
  py::object array = py::reinterpret_steal<py::object>(api().PyArray_NewFromDescr_(
      api().PyArray_Type_, descr, rank, reinterpret_cast<const Py_intptr_t*>(shape), nullptr, nullptr, 0, nullptr));
  if (!array) throw py::error_already_set();
  return array;
}

py::array empty(const DLTensor& tensor) {
  return {named(tensor.dtype, false), std::vector<py::ssize_t>(tensor.shape, tensor.shape + tensor.ndim)};
}

py::object copy(py::handle array) {
  const auto from = py::reinterpret_borrow<py::array>(array);
  const WarmMemory warm(size_in_bytes(static_cast<int>(from.ndim()), reinterpret_cast<const int64_t*>(from.shape()),
                                      static_cast<int>(from.itemsize())));
  py::object made = py::reinterpret_steal<py::object>(api().PyArray_NewCopy_(array.ptr(), 0));
  if (!made) throw py::error_already_set();
  return made;
}

void copy_into(py::handle to, py::handle from) {
  if (api().PyArray_CopyInto_(to.ptr(), from.ptr()) != 0) throw py::error_already_set();
}

py::object over(const DLTensor& tensor, py::handle base, bool as_bits) {
  std::vector<py::ssize_t> strides(tensor.strides, tensor.strides + tensor.ndim);
  for (py::ssize_t& stride : strides) stride *= tensor.dtype.bits / 8;
  const std::vector<py::ssize_t> shape(tensor.shape, tensor.shape + tensor.ndim);
  // Without a base pybind11 would copy.
  return py::array(named(tensor.dtype, as_bits), shape, strides, tensor.data, base ? base : py::none());
}

}  // namespace fwp::python::numpy
