#include "arrays.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "abstract.hpp"
#include "bind.hpp"
#include "errors.hpp"
#include "exports.hpp"
#include "numpy.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

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

bool speaks_dlpack(py::handle object) { return !numpy::is_subclass(object) && has_dlpack(object); }

bool is_float(DLDataType dtype) {
  if (dtype.lanes != 1) return false;
  if (dtype.code == kDLBfloat) return dtype.bits == 16;
  return dtype.code == kDLFloat && (dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64);
}

bool is_integer(DLDataType dtype) { return dtype.lanes == 1 && (dtype.code == kDLInt || dtype.code == kDLUInt); }

[[noreturn]] void refuse_strides(const char* name, int item, const py::detail::PyArray_Proxy& array) {
  int axis = 0;
  while (array.dimensions[axis] <= 1 || array.strides[axis] % item == 0) ++axis;
  raise(FWP_ARGUMENT_ERROR, std::string(name) + ": expected strides that are multiples of the item size of " +
                                std::to_string(item) + " bytes, got " + std::to_string(array.strides[axis]) +
                                " bytes along axis " + std::to_string(axis));
}

[[noreturn]] void refuse_framework(const char* name, py::handle object, const char* first, py::handle like) {
  raise(FWP_DTYPE_ERROR, std::string(name) + ": expected an array of type " + qualified_type_name(like) + ", as " +
                             first + " is, got " + qualified_type_name(object));
}

// Integers that fwp.h reads as they are.
bool is_index(DLDataType dtype) { return dtype.code == kDLInt && (dtype.bits == 32 || dtype.bits == 64); }

bool is_cuda(DLDevice device) {
  const int type = device.device_type;
  return type == dlpack::kCUDA || type == dlpack::kCUDAManaged;
}

// The CPU or a CUDA device, whichever kind of its memory it is.
DLDevice usable(const char* name, DLDevice device) {
  if (is_cuda(device)) return {kDLCUDA, device.device_id};
  const int type = device.device_type;
  if (type == dlpack::kCPU || type == dlpack::kCUDAHost) return kHost;
  raise(FWP_DEVICE_ERROR, std::string(name) + ": expected memory of the CPU or of a CUDA device, got " +
                              device_name(type, device.device_id));
}

}  // namespace

void Array::read(const char* name, py::handle object, const Array* like) {
  if (numpy::is_array(object)) {
    view_numpy(name, object, numpy::float_dtype(name, object));
    if (like == nullptr || like->kind_ == Kind::kNumpy) return;
  } else if (abstract_array(object) != nullptr) {
    read_abstract(name, object);
  } else {
    read_foreign(name, object, false, like);
    check_float();
  }
  if (like != nullptr) check_framework(*like);
}

void Array::write(const char* name, py::handle object, const Array* like) {
  if (numpy::is_array(object)) {
    view_numpy(name, object, numpy::float_dtype(name, object));
    writable_ = numpy::is_writable(object);
  } else if (abstract_array(object) != nullptr) {
    read_abstract(name, object);
    writable_ = true;
  } else {
    read_foreign(name, object, true, like);
    check_float();
  }
  check_framework(*like);
  if (writable_) return;
  const bool silent = extra_ != nullptr && extra_->managed.legacy();
  raise(FWP_READ_ONLY_ERROR,
        std::string(name) + ": expected a writable array, got " +
            (silent ? qualified_type_name(object) + ", which does not say that it is one" : "a read-only one"));
}

void Array::read_optional(const char* name, py::handle object, const Array* like) {
  if (!object.is_none()) read(name, object, like);
}

void Array::write_optional(const char* name, py::handle object, const Array* like) {
  if (!object.is_none()) write(name, object, like);
}

void Array::read_integers(const char* name, py::handle object, const Array* like) {
  if (object.is_none()) return;
  py::object items = py::reinterpret_borrow<py::object>(object);
  if (numpy::is_array(object)) {
    const py::dtype dtype = py::reinterpret_borrow<py::array>(object).dtype();
    if (dtype.kind() != 'i' && dtype.kind() != 'u')
      raise(FWP_DTYPE_ERROR,
            std::string(name) + ": expected integers, got dtype " + std::string(py::str(object.attr("dtype"))));
    if (dtype.kind() == 'i' && dtype.itemsize() >= 4 && dtype.byteorder() == '=') {
      view_numpy(name, object, {kDLInt, static_cast<uint8_t>(8 * dtype.itemsize()), 1});
      return;
    }
    items = items.attr("tolist")();
  } else if (speaks_dlpack(object)) {
    read_foreign(name, object, false, like);
    if (!is_integer(tensor_.dtype))
      raise(FWP_DTYPE_ERROR, std::string(name) + ": expected integers, got dtype " + dtype_name(tensor_.dtype));
    if (is_index(tensor_.dtype)) return;
    if (on_device())
      raise(FWP_DTYPE_ERROR,
            std::string(name) + ": expected int32 or int64 on a device, got " + dtype_name(tensor_.dtype));
    items = numpy::over(tensor_, py::handle(), false).attr("tolist")();
  }
  if (PySequence_Check(items.ptr()) == 0 || PyUnicode_Check(items.ptr()) || PyBytes_Check(items.ptr()) ||
      numpy::is_subclass(items))
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a sequence of integers, got " + type_name(object));
  std::vector<int64_t>& integers = extra().integers;
  for (const py::handle item : py::reinterpret_borrow<py::sequence>(items)) integers.push_back(index_of(name, item));
  kind_ = Kind::kSequence;
  object_ = std::move(items);
  shape_[0] = static_cast<int64_t>(integers.size());
  strides_[0] = 1;
  tensor_ = {integers.data(), {kDLCPU, 0}, 1, {kDLInt, 64, 1}, shape_, strides_, 0};
}

void Array::make(const Array& like, int rank, const int64_t* shape, DLDataType dtype) {
  kind_ = like.kind_;
  if (kind_ == Kind::kNumpy) {
    const py::object made = numpy::make(rank, shape, dtype);
    view_numpy("", made, dtype);
  } else if (kind_ == Kind::kExchange) {
    read_foreign("", allocate(*like.exchange_, like.tensor_.device, rank, shape, dtype), false, &like);
  } else if (kind_ == Kind::kAbstract) {
    read_abstract("", make_abstract(rank, shape, dtype));
  } else {
    extra().taker = like.object_;
    object_ = py::cast(OwnArray(like.tensor_.device, like.stream_, rank, shape, dtype));
    view(object_.cast<OwnArray&>().tensor());
    stream_ = like.stream_;
  }
}

void Array::make(const Array& like, std::initializer_list<int64_t> shape, DLDataType dtype) {
  make(like, static_cast<int>(shape.size()), shape.begin(), dtype);
}

void Array::make_scratch(const Array& like, int64_t bytes) {
  constexpr DLDataType kByte{kDLUInt, 8, 1};
  if (like.kind_ == Kind::kExchange) return make(like, {bytes}, kByte);
  kind_ = like.kind_;
  DLTensor memory{nullptr, like.tensor_.device, 1, kByte, &bytes, nullptr, 0};
  object_ = cupy_memory(memory.device, bytes, &memory.data);
  view(memory);
}

py::object Array::object() const {
  if (!present()) return py::none();
  return extra_ != nullptr && extra_->taker ? hand_over(object_, extra_->taker) : object_;
}

py::object Array::numpy() {
  if (!on_device()) return numpy::copy(numpy::over(tensor_, py::handle(), false));
  if (!compact()) use_copy();
  const py::array made = numpy::empty(tensor_);
  const auto bytes = static_cast<size_t>(made.nbytes());
  void* const to = const_cast<void*>(made.data());
  check(
      without_gil([&] { return fwp_device_copy(tensor_.device.device_id, to, tensor_.data, bytes, stream_.handle); }));
  return made;
}

py::object Array::kept() { return on_device() ? copy_of(name_, object_) : numpy(); }

bool Array::make_contiguous() {
  if (!present() || tensor_.ndim == 0 || shape_[tensor_.ndim - 1] <= 1 || strides_[tensor_.ndim - 1] == 1) return false;
  use_copy();
  return true;
}

void Array::copy_back() {
  if (!writable_ || extra_ == nullptr || !extra_->original) return;
  if (on_device())
    extra_->original[py::ellipsis()] = extra_->copy;
  else
    numpy::copy_into(extra_->original, extra_->copy);
}

void Array::make_rows() {
  const int last = tensor_.ndim - 1;
  int64_t count = 1, stride = shape_[last], next = 0;
  bool in_place = shape_[last] <= 1 || strides_[last] == 1;
  for (int i = last; i-- > 0;) {
    if (shape_[i] == 1) continue;
    if (count == 1)
      stride = strides_[i];
    else if (strides_[i] != next)
      in_place = false;
    next = strides_[i] * shape_[i];
    count *= shape_[i];
  }
  if (!in_place && count != 0) {
    use_copy();
    stride = shape_[last];
  }
  strides_[1] = strides_[last];
  shape_[1] = shape_[last];
  strides_[0] = stride;
  shape_[0] = abstract() ? 0 : count;
  tensor_.ndim = 2;
}

Array::Extra& Array::extra() {
  if (extra_ == nullptr) extra_ = std::make_unique<Extra>();
  return *extra_;
}

void Array::read_foreign(const char* name, py::handle object, bool to_write, const Array* like) {
  name_ = name;
  object_ = py::reinterpret_borrow<py::object>(object);
  exchange_ = exchange_api(object);
  if (exchange_ == nullptr && !speaks_dlpack(object))
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected an array" +
                               (numpy::is_subclass(object) ? ", no subclass of numpy.ndarray" : "") + ", got " +
                               type_name(object));
  kind_ = exchange_ != nullptr ? Kind::kExchange : Kind::kDlpack;
  if (exchange_ != nullptr && exchange_->borrow_from_object != nullptr && !to_write) {
    view(borrow(name, *exchange_, object));
    return follow(like);
  }
  Managed& managed = extra().managed;
  if (exchange_ != nullptr) {
    managed = take(name, *exchange_, object);
    view(managed.tensor());
    follow(like);
  } else {
    const DLDevice device = device_of(name, object);
    const bool near = like != nullptr && like->on_device() && like->tensor_.device.device_id == device.device_id;
    if (is_cuda(device)) stream_ = near ? like->stream_ : work_stream(name, object, device);
    managed = take(name, object, is_cuda(device) ? &stream_ : nullptr);
    view(managed.tensor());
  }
  writable_ = !managed.legacy() && (managed.flags() & dlpack::kReadOnly) == 0;
  if (to_write && (managed.flags() & dlpack::kIsCopied) != 0)
    raise(FWP_ARGUMENT_ERROR,
          std::string(name) + ": expected memory to write to, got a copy of it from " + qualified_type_name(object));
}

void Array::read_abstract(const char* name, py::handle object) {
  const AbstractArray& array = *abstract_array(object);
  name_ = name;
  kind_ = Kind::kAbstract;
  object_ = py::reinterpret_borrow<py::object>(object);
  alignas(64) static char nowhere[64];
  std::vector<int64_t> shape = array.shape;
  view({nowhere, {kDLCPU, 0}, static_cast<int32_t>(shape.size()), float_dtype(name, array), shape.data(), nullptr, 0});
}

void Array::check_float() const {
  if (!is_float(tensor_.dtype))
    raise(FWP_DTYPE_ERROR, std::string(name_) + ": expected dtype float32, float64, float16 or bfloat16, got " +
                               dtype_name(tensor_.dtype));
}

void Array::check_framework(const Array& like) const {
  if (kind_ == Kind::kNumpy && like.kind_ == Kind::kNumpy) return;
  const bool same = kind_ == like.kind_ && exchange_ == like.exchange_ &&
                    (kind_ != Kind::kDlpack || Py_TYPE(object_.ptr()) == Py_TYPE(like.object_.ptr()) ||
                     py::isinstance<OwnArray>(object_));  // a result of an earlier call
  if (!same) refuse_framework(name_, object_, like.name_, like.object_);
}

void Array::view_numpy(const char* name, py::handle object, DLDataType dtype) {
  const auto& array = numpy::fields(object);
  const int item = dtype.bits / 8, shift = __builtin_ctz(static_cast<unsigned>(item));  // divisions are slow
  Py_intptr_t bits = 0;
  for (int i = 0; i < array.nd; ++i) {
    const Py_intptr_t size = array.dimensions[i], stride = array.strides[i];
    shape_[i] = size;
    strides_[i] = stride >> shift;
    if (size > 1) bits |= stride;
  }
  if ((bits & (item - 1)) != 0) refuse_strides(name, item, array);
  tensor_ = {array.data, {kDLCPU, 0}, array.nd, dtype, shape_, strides_, 0};
  kind_ = Kind::kNumpy;
  name_ = name;
  object_ = py::reinterpret_borrow<py::object>(object);
}

void Array::view(const DLTensor& tensor) {
  const DLDevice device = usable(name_, tensor.device);
  if (tensor.ndim < 0 || tensor.ndim > kMaxRank)
    raise(FWP_SHAPE_ERROR, std::string(name_) + ": expected at most 64 axes, got " + std::to_string(tensor.ndim));
  if (tensor.ndim > 0 && tensor.shape == nullptr)
    raise(FWP_SHAPE_ERROR, std::string(name_) + ": expected a tensor with a shape, got one of " +
                               std::to_string(tensor.ndim) + " axes without");
  int64_t compact = 1;
  for (int i = tensor.ndim; i-- > 0;) {
    shape_[i] = tensor.shape[i];
    if (shape_[i] < 0)
      raise(FWP_SHAPE_ERROR, std::string(name_) + ": expected sizes of 0 or more, got " + std::to_string(shape_[i]));
    strides_[i] = tensor.strides != nullptr ? tensor.strides[i] : compact;
    if (__builtin_mul_overflow(compact, std::max<int64_t>(shape_[i], 1), &compact)) compact = INT64_MAX;
  }
  const bool empty = std::any_of(shape_, shape_ + tensor.ndim, [](int64_t size) { return size == 0; });
  alignas(64) static char nowhere[64];
  if (tensor.data == nullptr && !empty)
    raise(FWP_ARGUMENT_ERROR,
          std::string(name_) + ": expected a tensor with memory, got one without, as fake ones are");
  void* const data = empty ? nowhere : static_cast<char*>(tensor.data) + tensor.byte_offset;
  tensor_ = {data, device, tensor.ndim, tensor.dtype, shape_, strides_, 0};
}

// The stream that the contents are ready on, of an array by the exchange API; that of `like` waits for it.
void Array::follow(const Array* like) {
  if (!on_device()) return;
  const bool near = like != nullptr && is_same(like->tensor_.device, tensor_.device);
  if (near && like->exchange_ == exchange_) {
    stream_ = like->stream_;
    return;
  }
  stream_ = work_stream(name_, *exchange_, tensor_.device);
  if (near) check(fwp_device_wait(tensor_.device.device_id, stream_.handle, like->stream_.handle));
}

bool Array::compact() const {
  if (std::find(shape_, shape_ + tensor_.ndim, 0) != shape_ + tensor_.ndim) return true;  // nothing is in any order
  int64_t stride = 1;
  for (int i = tensor_.ndim; i-- > 0; stride *= shape_[i])
    if (shape_[i] > 1 && strides_[i] != stride) return false;
  return true;
}

void Array::use_copy() {
  if (on_device()) {
    extra().original = object_;
    extra().copy = copy_of(name_, object_);
    extra().copied = std::make_unique<Array>();
    Array& copied = *extra().copied;
    copied.read_foreign(name_, extra().copy, false, this);
    if (!copied.compact() || !std::equal(shape_, shape_ + tensor_.ndim, copied.shape_))
      raise(FWP_UNSUPPORTED_ERROR, std::string(name_) + ": expected a contiguous last axis, got a strided one, which " +
                                       qualified_type_name(object_) + " copies as it is");
    std::copy(copied.strides_, copied.strides_ + tensor_.ndim, strides_);
    tensor_.data = copied.tensor_.data;
    return;
  }
  extra().original = numpy::over(tensor_, py::handle(), true);
  extra().copy = numpy::copy(extra().original);
  const auto& array = numpy::fields(extra().copy);
  const int64_t item = tensor_.dtype.bits / 8;
  for (int i = 0; i < array.nd; ++i) strides_[i] = array.strides[i] / item;
  tensor_.data = array.data;
}

}  // namespace fwp::python
