#include "imports.hpp"

#include <atomic>
#include <iterator>
#include <string>

#include "errors.hpp"
#include "exports.hpp"

namespace py = pybind11;

namespace fwp::python {
namespace {

std::atomic<int64_t> imported{0};

// The pending error of a framework, as the cause of one of ours; what no framework is to blame for stays as it is.
[[noreturn]] void refused(const char* name, py::handle object) {
  const bool blame = PyErr_ExceptionMatches(PyExc_Exception) != 0 && PyErr_ExceptionMatches(PyExc_MemoryError) == 0;
  py::error_already_set error;
  if (!blame) throw error;
  const std::string reason = py::str(error.value());
  const std::string message = std::string(name) + ": expected an array that hands out its memory, got " +
                              qualified_type_name(object) + ", which does not: " + reason.substr(0, reason.find('\n'));
  try {
    raise(FWP_UNSUPPORTED_ERROR, message);
  } catch (py::error_already_set& ours) {
    py::setattr(ours.value(), "__cause__", error.value());
    throw;
  }
}

// An attribute of the object's type; none without an error.
py::object of_type(py::handle object, const char* attribute) {
  PyObject* const found = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())), attribute);
  if (found == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(found);
}

// The module that an object's type is from, the first part of its name.
std::string module_name(py::handle object) {
  const py::object module = of_type(object, "__module__");
  const std::string name = module && py::isinstance<py::str>(module) ? std::string(py::str(module)) : "";
  return name.substr(0, name.find('.'));
}

bool is_cupy(py::handle object) { return module_name(object) == "cupy"; }

// The capsule of the newest protocol that the producer knows.
py::object capsule_of(const char* name, py::handle object, const Stream* stream) {
  const py::object method = py::reinterpret_steal<py::object>(PyObject_GetAttrString(object.ptr(), "__dlpack__"));
  if (!method) refused(name, object);
  const py::dict keywords;
  if (stream != nullptr)
    keywords["stream"] = reinterpret_cast<uintptr_t>(stream->handle != nullptr ? stream->handle : kDefaultStream);
  const py::dict keywords_before_version_1 = keywords.attr("copy")();
  keywords["max_version"] = py::make_tuple(dlpack::kMajor, dlpack::kMinor);
  const auto call = [&](const py::dict& given) {
    return py::reinterpret_steal<py::object>(PyObject_Call(method.ptr(), py::tuple().ptr(), given.ptr()));
  };
  py::object capsule = call(keywords);
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError) != 0) {
    PyErr_Clear();
    capsule = call(keywords_before_version_1);
  }
  if (!capsule) refused(name, object);
  return capsule;
}

// Takes the tensor out of a capsule of this name; null if it has another.
template <class Tensor>
Tensor* take_over(py::handle capsule, const char* name, const char* used) {
  if (PyCapsule_IsValid(capsule.ptr(), name) == 0) return nullptr;
  auto* const tensor = static_cast<Tensor*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (PyCapsule_SetName(capsule.ptr(), used) != 0) throw py::error_already_set();
  return tensor;
}

Managed checked(const char* name, Managed managed) {
  if (managed.major() != dlpack::kMajor)
    raise(FWP_UNSUPPORTED_ERROR,
          std::string(name) + ": expected a tensor of DLPack 1, got one of version " + std::to_string(managed.major()));
  return managed;
}

template <class Tensor>
void give_back(Tensor* tensor) {
  if (tensor == nullptr) return;
  --imported;
  if (tensor->deleter == nullptr) return;
  const py::error_scope pending;
  tensor->deleter(tensor);
  if (PyErr_Occurred() != nullptr) PyErr_WriteUnraisable(nullptr);
}

// Reports an error of an allocator, which may run without the interpreter's error indicator.
void set_error(void* context, const char* kind, const char* message) {
  *static_cast<std::string*>(context) = std::string(kind) + ": " + message;
}

}  // namespace

Managed::Managed(dlpack::ManagedTensor* tensor) : versioned_(tensor) { ++imported; }
Managed::Managed(dlpack::LegacyTensor* tensor) : legacy_(tensor) { ++imported; }
Managed::~Managed() {
  give_back(versioned_);
  give_back(legacy_);
}

const dlpack::ExchangeApi* exchange_api(py::handle object) {
  const py::object capsule = of_type(object, "__dlpack_c_exchange_api__");
  if (!capsule || PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeName) == 0) return nullptr;
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeName));
  while (header != nullptr && header->version.major != dlpack::kMajor) header = header->previous;
  return reinterpret_cast<const dlpack::ExchangeApi*>(header);
}

bool has_dlpack(py::handle object) { return static_cast<bool>(of_type(object, "__dlpack__")); }

DLDevice device_of(const char* name, py::handle object) {
  if (!of_type(object, "__dlpack_device__")) return kHost;
  try {
    const auto [type, id] = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
    return {static_cast<DLDeviceType>(type), id};
  } catch (const py::cast_error&) {
    raise(FWP_DTYPE_ERROR, std::string(name) + ": expected two integers from __dlpack_device__ of " +
                               type_name(object) + ", got something else");
  } catch (py::error_already_set& error) {
    error.restore();
    refused(name, object);
  }
}

bool cupy_allocates(py::handle object, const Stream& stream) {
  return is_cupy(object) && stream.owner && !stream.owner.attr("is_capturing")().cast<bool>();
}

py::object cupy_memory(DLDevice device, int64_t bytes, void** data) {
  const py::object cuda = py::module_::import("cupy").attr("cuda");
  const py::object context = cuda.attr("Device")(device.device_id);
  context.attr("__enter__")();
  PyObject* const made = PyObject_CallMethod(cuda.ptr(), "alloc", "L", static_cast<long long>(bytes));
  py::object memory = py::reinterpret_steal<py::object>(made);
  {
    const py::error_scope pending;
    context.attr("__exit__")(py::none(), py::none(), py::none());
  }
  if (!memory) throw py::error_already_set();
  *data = reinterpret_cast<void*>(memory.attr("ptr").cast<uintptr_t>());
  return memory;
}

Stream work_stream(const char* name, py::handle object, DLDevice device) {
  if (module_name(object) == "torch")
    raise(
        FWP_UNSUPPORTED_ERROR,
        std::string(name) + ": expected a tensor of torch 2.10 or newer, which tells its stream, got one of an older");
  if (!is_cupy(object)) return {kDefaultStream, {}};
  const py::object stream = py::module_::import("cupy").attr("cuda").attr("get_current_stream")(device.device_id);
  void* const handle = reinterpret_cast<void*>(stream.attr("ptr").cast<uintptr_t>());
  return {handle != nullptr ? handle : kDefaultStream, stream};
}

Stream work_stream(const char* name, const dlpack::ExchangeApi& api, DLDevice device) {
  Stream stream;
  if (api.current_work_stream(device.device_type, device.device_id, &stream.handle) == 0) return stream;
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  raise(FWP_UNSUPPORTED_ERROR, std::string(name) + ": expected an array whose framework tells its stream, got none");
}

Managed take(const char* name, const dlpack::ExchangeApi& api, py::handle object) {
  dlpack::ManagedTensor* tensor = nullptr;
  if (api.managed_from_object(object.ptr(), &tensor) != 0) refused(name, object);
  return checked(name, Managed(tensor));
}

Managed take(const char* name, py::handle object, const Stream* stream) {
  const py::object capsule = capsule_of(name, object, stream);
  if (auto* const tensor = take_over<dlpack::ManagedTensor>(capsule, dlpack::kName, dlpack::kUsedName))
    return checked(name, Managed(tensor));
  if (auto* const tensor = take_over<dlpack::LegacyTensor>(capsule, dlpack::kLegacyName, dlpack::kLegacyUsedName))
    return Managed(tensor);
  raise(FWP_DTYPE_ERROR, std::string(name) + ": expected a DLPack capsule that nobody has taken from __dlpack__ of " +
                             type_name(object) + ", got " + std::string(py::repr(capsule)));
}

DLTensor borrow(const char* name, const dlpack::ExchangeApi& api, py::handle object) {
  DLTensor tensor{};
  if (api.borrow_from_object(object.ptr(), &tensor) != 0) refused(name, object);
  return tensor;
}

py::object allocate(const dlpack::ExchangeApi& api, DLDevice device, int rank, const int64_t* shape, DLDataType dtype) {
  DLTensor prototype{nullptr, device, rank, dtype, const_cast<int64_t*>(shape), nullptr, 0};
  dlpack::ManagedTensor* tensor = nullptr;
  std::string error;
  if (api.allocate(&prototype, &tensor, &error, set_error) != 0) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    raise(FWP_OUT_OF_MEMORY, "cannot allocate a result: " + error);
  }
  void* object = nullptr;
  if (api.object_from_managed(tensor, &object) != 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

py::object namespace_of(py::handle object) {
  if (py::hasattr(object, "__array_namespace__")) return object.attr("__array_namespace__")();
  const py::dict modules = py::module_::import("sys").attr("modules");
  return modules.attr("get")(module_name(object), py::none());
}

py::object copy_of(const char* name, py::handle object) {
  if (py::hasattr(object, "contiguous")) return object.attr("contiguous")().attr("clone")();
  const py::object space = namespace_of(object);
  if (py::hasattr(space, "array") && py::hasattr(space, "ascontiguousarray"))
    return space.attr("array")(object, py::arg("copy") = true, py::arg("order") = "C");
  if (py::hasattr(space, "asarray")) return space.attr("asarray")(object, py::arg("copy") = true);
  raise(FWP_UNSUPPORTED_ERROR, std::string(name) + ": expected an array that need not be copied, got one of type " +
                                   qualified_type_name(object) + ", which has no way to make a copy");
}

int64_t live_tensors() { return imported + exported_tensors(); }

std::string dtype_name(DLDataType dtype) {
  constexpr const char* kNames[] = {"int", "uint", "float", "handle", "bfloat", "complex"};
  std::string name = "DLPack's type code " + std::to_string(dtype.code) + " of size ";
  if (dtype.code <= dlpack::kComplex) name = kNames[dtype.code];
  name = dtype.code == dlpack::kBool ? "bool" : name + std::to_string(dtype.bits);
  return dtype.lanes == 1 ? name : name + "x" + std::to_string(dtype.lanes);
}

std::string device_name(int type, int id) {
  constexpr const char* kNames[] = {nullptr, "cpu", "cuda", "cuda_host", "opencl", nullptr,        nullptr,  "vulkan",
                                    "metal", "vpi", "rocm", "rocm_host", "ext",    "cuda_managed", "oneapi", "webgpu"};
  const bool known = type > 0 && type < static_cast<int>(std::size(kNames)) && kNames[type] != nullptr;
  return (known ? kNames[type] : "device type " + std::to_string(type)) + ":" + std::to_string(id);
}

std::string type_name(py::handle object) { return object.is_none() ? "None" : Py_TYPE(object.ptr())->tp_name; }

std::string qualified_type_name(py::handle object) {
  const py::handle type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return std::string(py::str(type.attr("__module__"))) + "." + std::string(py::str(type.attr("__qualname__")));
}

}  // namespace fwp::python
