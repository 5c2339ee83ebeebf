// fwp_core.Array: results for frameworks that let nobody write into arrays of theirs.
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "arrays.hpp"
#include "bind.hpp"
#include "dlpack.hpp"
#include "errors.hpp"
#include "exports.hpp"
#include "numpy.hpp"

namespace py = pybind11;

namespace fwp::python {

// Given back without Python, from any thread, at any time; that of a device in the order of its stream, whose owner it
// keeps.
struct Block {
  const DLDevice device;
  void* const stream;
  void* const data;
  PyObject* const owner;

  Block(DLDevice device_, void* stream_, py::handle owner_, size_t bytes)
      : device(device_), stream(stream_), data(allocate(device_, stream_, bytes)), owner(owner_.inc_ref().ptr()) {}
  ~Block() {
    if (is_host(device))
      fwp_free(data);
    else
      fwp_device_free(device.device_id, data, stream);
    if (owner == nullptr || Py_IsInitialized() == 0) return;
    const PyGILState_STATE gil = PyGILState_Ensure();
    Py_DECREF(owner);
    PyGILState_Release(gil);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

 private:
  static void* allocate(DLDevice device, void* stream, size_t bytes) {
    bytes = std::max<size_t>(bytes, 1);
    void* const memory = is_host(device) ? fwp_allocate(bytes) : fwp_device_allocate(device.device_id, bytes, stream);
    if (memory == nullptr) raise(fwp_last_status(), fwp_last_error());
    return memory;
  }
};

namespace {

std::atomic<int64_t> exported{0};

int64_t count(const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(elements, size, &elements)) throw std::bad_alloc();
  return elements;
}

size_t bytes_of(const std::vector<int64_t>& shape, DLDataType dtype) {
  int64_t bytes = 0;
  if (__builtin_mul_overflow(count(shape), dtype.bits / 8, &bytes)) throw std::bad_alloc();
  return static_cast<size_t>(bytes);
}

// What the consumer of an exported tensor holds. It is given back without Python, from any thread, at any time.
template <class Tensor>
struct Export {
  Tensor managed{};
  OwnArray array;

  explicit Export(OwnArray array_) : array(std::move(array_)) {
    managed.tensor = array.tensor();
    managed.context = this;
    managed.deleter = [](Tensor* self) {
      delete static_cast<Export*>(self->context);
      --exported;
    };
    ++exported;
  }
};

// The capsule's own destructor gives the tensor back if no consumer has renamed the capsule.
template <class Tensor>
py::capsule encapsulate(Tensor& managed, const char* name) {
  PyObject* const capsule = PyCapsule_New(&managed, name, [](PyObject* self) {
    const char* const current = PyCapsule_GetName(self);
    if (std::strncmp(current, "used_", 5) == 0) return;
    auto* const tensor = static_cast<Tensor*>(PyCapsule_GetPointer(self, current));
    tensor->deleter(tensor);
  });
  if (capsule == nullptr) {
    managed.deleter(&managed);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::capsule>(capsule);
}

// An argument of a method; DTypeError if it is nothing like what is expected.
template <class T>
T argument(const char* name, const char* expected, py::handle object) {
  try {
    return object.cast<T>();
  } catch (const py::cast_error&) {
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected " + expected + ", got " +
                               std::string(py::repr(py::reinterpret_borrow<py::object>(object))));
  }
}

bool wants_versioned(py::handle max_version) {
  if (max_version.is_none()) return false;
  return argument<std::pair<int64_t, int64_t>>("max_version", "two integers", max_version).first >= dlpack::kMajor;
}

bool wants_copy(py::handle copy) { return !copy.is_none() && argument<bool>("copy", "None, True or False", copy); }

// "cpu" or "cuda:0".
std::string place(const OwnArray& array) {
  const DLDevice device = array.device();
  return is_host(device) ? "cpu" : device_name(device.device_type, device.device_id);
}

// What the consumer puts on its stream from now on finds the contents; -1: it sees to that itself.
void make_wait(const OwnArray& array, py::handle consumer) {
  constexpr int64_t kNoWait = -1, kAmbiguous = 0;
  if (is_host(array.device())) {
    if (!consumer.is_none() && argument<int64_t>("stream", "None", consumer) != kNoWait)
      raise(FWP_DEVICE_ERROR, "stream: expected None for memory of the CPU, got " + std::string(py::str(consumer)));
    return;
  }
  const int64_t stream = consumer.is_none() ? 1 : argument<int64_t>("stream", "None or an integer", consumer);
  if (stream == kAmbiguous || stream < kNoWait)
    raise(FWP_ARGUMENT_ERROR,
          "stream: expected None, -1, 1, 2 or the address of a CUDA stream, got " + std::string(py::str(consumer)));
  if (stream != kNoWait)
    check(fwp_device_wait(array.device().device_id, array.stream(), reinterpret_cast<void*>(stream)));
}

py::capsule to_dlpack(const OwnArray& array, py::handle stream, py::handle max_version, py::handle dl_device,
                      py::handle copy) {
  const DLDevice device = array.device();
  if (!dl_device.is_none()) {
    const auto [type, id] = argument<std::pair<int, int>>("dl_device", "two integers", dl_device);
    if (type != device.device_type || id != device.device_id)
      raise(FWP_DEVICE_ERROR, "dl_device: expected " +
                                  (is_host(device) ? "the CPU, (1, 0)"
                                                   : place(array) + ", (2, " + std::to_string(device.device_id) + ")") +
                                  ", got " + device_name(type, id));
  }
  const bool copied = wants_copy(copy);
  const OwnArray exported_array = copied ? array.copy() : array;
  make_wait(array, stream);
  return wants_versioned(max_version) ? exported_array.export_versioned(copied) : exported_array.export_legacy();
}

py::object to_numpy(py::object self, py::handle dtype, py::handle copy) {
  const auto& array = self.cast<OwnArray&>();
  if (!is_host(array.device()))
    raise(FWP_DEVICE_ERROR, "array: expected memory of the CPU, which is what NumPy reads, got memory of " +
                                place(array) + "; hand it to the from_dlpack of a framework");
  const DLTensor tensor = self.cast<OwnArray&>().tensor();
  py::object view = numpy::over(tensor, self, false);
  const bool cast =
      !dtype.is_none() &&
      !py::object(view.attr("dtype")).equal(py::dtype::from_args(py::reinterpret_borrow<py::object>(dtype)));
  if (!copy.is_none() && !wants_copy(copy)) {
    if (cast)
      raise(FWP_ARGUMENT_ERROR,
            "copy: expected True or None where the dtype changes to " + std::string(py::str(dtype)) + ", got False");
    return view;
  }
  if (cast) return view.attr("astype")(dtype);
  return copy.is_none() ? view : view.attr("copy")();
}

}  // namespace

OwnArray::OwnArray(DLDevice device, const Stream& stream, int rank, const int64_t* shape, DLDataType dtype)
    : shape_(shape, shape + rank), strides_(shape_.size(), 1), dtype_(dtype) {
  memory_ = std::make_shared<Block>(device, stream.handle, stream.owner, bytes_of(shape_, dtype));
  for (size_t i = shape_.size(); i-- > 1;) strides_[i - 1] = strides_[i] * std::max<int64_t>(shape_[i], 1);
}

DLDevice OwnArray::device() const { return memory_->device; }
void* OwnArray::stream() const { return memory_->stream; }

DLTensor OwnArray::tensor() {
  return {memory_->data, device(), static_cast<int32_t>(shape_.size()), dtype_, shape_.data(), strides_.data(), 0};
}

OwnArray OwnArray::copy() const {
  const size_t bytes = bytes_of(shape_, dtype_);
  OwnArray made = *this;
  made.memory_ = std::make_shared<Block>(device(), stream(), memory_->owner, bytes);
  if (is_host(device()))
    std::memcpy(made.memory_->data, memory_->data, bytes);
  else
    check(fwp_device_copy(device().device_id, made.memory_->data, memory_->data, bytes, stream()));
  return made;
}

py::capsule OwnArray::export_versioned(bool copied) const {
  auto& managed = (new Export<dlpack::ManagedTensor>(*this))->managed;
  managed.version = {dlpack::kMajor, 0};  // nothing of a later minor version is in it
  if (copied) managed.flags = dlpack::kIsCopied;
  return encapsulate(managed, dlpack::kName);
}

py::capsule OwnArray::export_legacy() const {
  return encapsulate((new Export<dlpack::LegacyTensor>(*this))->managed, dlpack::kLegacyName);
}

int64_t exported_tensors() { return exported; }

py::object hand_over(py::handle own, py::handle taker) {
  const py::object space = namespace_of(taker);
  if (!py::hasattr(space, "from_dlpack")) return py::reinterpret_borrow<py::object>(own);
  return space.attr("from_dlpack")(own);
}

void bind_array(py::module_& m) {
  py::class_<OwnArray>(
      m, "Array",
      "A result for a framework that cannot be asked to take it over.\n\n"
      "Hand it to that framework's from_dlpack, or to numpy.asarray; the memory is shared, not copied.\n"
      "Memory of a CUDA device is for from_dlpack only, whose stream is made to wait for the contents.")
      .def_property_readonly("shape", [](const OwnArray& self) { return py::tuple(py::cast(self.shape())); })
      .def_property_readonly("ndim", [](const OwnArray& self) { return self.shape().size(); })
      .def_property_readonly("dtype", [](OwnArray& self) { return dtype_name(self.tensor().dtype); })
      .def_property_readonly("device", [](const OwnArray& self) { return place(self); })
      .def("__dlpack__", &to_dlpack, py::kw_only(), py::arg("stream") = py::none(), py::arg("max_version") = py::none(),
           py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__",
           [](const OwnArray& self) {
             return py::make_tuple(static_cast<int>(self.device().device_type), self.device().device_id);
           })
      .def("__array__", &to_numpy, py::arg("dtype") = py::none(), py::arg("copy") = py::none())
      .def("__copy__", [](const OwnArray& self) { return self; })
      .def("__deepcopy__", [](const OwnArray& self, py::handle) { return self.copy(); })
      .def("__repr__", [](OwnArray& self) {
        return "fwp_core.Array(" + dtype_name(self.tensor().dtype) + " " +
               std::string(py::str(py::tuple(py::cast(self.shape())))) +
               (is_host(self.device()) ? "" : " " + place(self)) + ")";
      });
  m.def("live_tensors", &live_tensors);
  // Copies, as arrays of NumPy.
  m.def("to_numpy", [](py::handle name, py::handle object) {
    Array array;
    array.read(PyUnicode_AsUTF8(name.ptr()), object);
    return array.numpy();
  });
  m.def("to_integers", [](py::handle name, py::handle object) {
    Array array;
    array.read_integers(PyUnicode_AsUTF8(name.ptr()), object);
    return array.numpy();
  });
  // What a later change of the caller's array does not touch: a copy that is made without waiting.
  m.def("kept_integers", [](py::handle name, py::handle object) {
    Array array;
    array.read_integers(PyUnicode_AsUTF8(name.ptr()), object);
    return array.kept();
  });
}

}  // namespace fwp::python
