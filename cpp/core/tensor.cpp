#include "tensor.hpp"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <string>

#include "error.hpp"

namespace fwp::core {
namespace {

constexpr int kMaxDLRank = 64;
// What an empty tensor points to, so that a null pointer always means absent.
alignas(64) char empty_data[64];

std::string text(const Axes& axes) {
  std::ostringstream out;
  out << '(';
  for (int i = 0; i < axes.rank; ++i) {
    out << (i > 0 ? ", " : "") << axes.axis[i].name;
    if (axes.axis[i].size >= 0) out << '=' << axes.axis[i].size;
  }
  out << (axes.rank == 1 ? ",)" : ")");
  return out.str();
}

std::string text(const int64_t* sizes, int rank) {
  std::ostringstream out;
  out << '(';
  for (int i = 0; i < rank; ++i) out << (i > 0 ? ", " : "") << sizes[i];
  out << (rank == 1 ? ",)" : ")");
  return out.str();
}

std::string text(DLDataType dtype) {
  const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::ostringstream out;
  if (dtype.code < std::size(kinds))
    out << kinds[dtype.code];
  else
    out << "dtype code " << int{dtype.code} << " of bits ";
  if (dtype.code != 6) out << int{dtype.bits};
  if (dtype.lanes != 1) out << " with " << dtype.lanes << " lanes";
  return out.str();
}

const char* text(DType dtype) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

// "float32", "float64 or float32", "float32, float64 or float16"; a dtype named twice counts once.
std::string text(std::initializer_list<DType> dtypes) {
  std::string list;
  for (const DType* dtype = dtypes.begin(); dtype != dtypes.end(); ++dtype) {
    if (std::find(dtypes.begin(), dtype, *dtype) != dtype) continue;
    if (dtype != dtypes.begin()) list += dtype + 1 == dtypes.end() ? " or " : ", ";
    list += text(*dtype);
  }
  return list;
}

// Whether an array of this type stores numbers of that one.
bool matches(DLDataType dtype, DType wanted) {
  const int code = wanted == DType::bf16 ? kDLBfloat : kDLFloat;
  return dtype.code == code && dtype.bits == 8 * item_size(wanted) && dtype.lanes == 1;
}

// kHost, or the number of a CUDA device.
int device_of(const char* name, const DLDevice& given) {
  constexpr int32_t kManagedCUDA = 13;
  // Copied as an integer: a producer may send a device that this header's enumeration does not name.
  int32_t type = 0;
  std::memcpy(&type, &given.device_type, sizeof type);
  if (type == kDLCPU) return kHost;
  if (type != kDLCUDA && type != kManagedCUDA)
    fail(FWP_DEVICE_ERROR, name, ": expected a CPU or CUDA tensor, got one on device type ", type);
  if (given.device_id < 0) fail(FWP_DEVICE_ERROR, name, ": expected a device from 0 on, got ", given.device_id);
  return given.device_id;
}

void check_present(const char* name, const DLTensor* tensor) {
  if (tensor == nullptr) fail(FWP_ARGUMENT_ERROR, name, ": expected a tensor, got NULL");
  if (tensor->ndim < 0 || tensor->ndim > kMaxDLRank)
    fail(FWP_ARGUMENT_ERROR, name, ": expected 0 to ", kMaxDLRank, " axes, got ", tensor->ndim);
  if (tensor->ndim > 0 && tensor->shape == nullptr) fail(FWP_ARGUMENT_ERROR, name, ": expected a shape, got NULL");
}

bool matches(const DLTensor& tensor, const Axes& axes) {
  if (tensor.ndim != axes.rank) return false;
  for (int i = 0; i < axes.rank; ++i)
    if (axes.axis[i].size >= 0 && axes.axis[i].size != tensor.shape[i]) return false;
  return true;
}

void check_shape(const char* name, const DLTensor& tensor, std::initializer_list<Axes> shapes) {
  for (int i = 0; i < tensor.ndim; ++i)
    if (tensor.shape[i] < 0)
      fail(FWP_ARGUMENT_ERROR, name, ": expected sizes of 0 or more, got ", text(tensor.shape, tensor.ndim));
  for (const Axes& axes : shapes)
    if (matches(tensor, axes)) return;
  std::string expected;
  for (const Axes& axes : shapes) expected += (expected.empty() ? "" : " or ") + text(axes);
  fail(FWP_SHAPE_ERROR, name, ": expected shape ", expected, ", got ", text(tensor.shape, tensor.ndim));
}

// Sets the region of a non-empty tensor: lowest and highest byte, no wrap-around of addresses.
void set_region(Tensor& x, uintptr_t address, int64_t item) {
  constexpr int64_t kMaxExtent = int64_t{1} << 60;
  int64_t below = 0, above = item;
  Region& region = x.region;
  region.name = x.name;
  region.item = item;
  for (int i = 0; i < x.rank; ++i) {
    if (x.shape[i] <= 1) continue;
    int64_t stride = 0, reach = 0;
    const bool wraps = __builtin_mul_overflow(x.stride[i], item, &stride) ||
                       __builtin_mul_overflow(stride, x.shape[i] - 1, &reach) || reach > kMaxExtent ||
                       reach < -kMaxExtent;
    if (!wraps) (reach < 0 ? below : above) += reach;
    if (wraps || above > kMaxExtent || below < -kMaxExtent)
      fail(FWP_ARGUMENT_ERROR, x.name, ": expected strides within the address space, got a stride of ", x.stride[i],
           " elements along an axis of size ", x.shape[i]);
    region.shape[region.rank] = x.shape[i];
    region.stride[region.rank++] = stride < 0 ? -stride : stride;
  }
  if (__builtin_add_overflow(address, below, &region.first) || __builtin_add_overflow(address, above, &region.end))
    fail(FWP_ARGUMENT_ERROR, x.name, ": expected strides within the address space, got some that leave it");
}

Tensor read_memory(const char* name, const DLTensor& tensor, int64_t item) {
  Tensor x;
  x.name = name;
  x.data = empty_data;
  x.rank = tensor.ndim;
  std::copy(tensor.shape, tensor.shape + tensor.ndim, x.shape);
  check_count(name, x.shape, x.rank);
  if (std::find(x.shape, x.shape + x.rank, 0) != x.shape + x.rank) return x;

  int64_t compact = 1;
  for (int i = x.rank - 1; i >= 0; --i) {
    if (x.shape[i] > 1) x.stride[i] = tensor.strides != nullptr ? tensor.strides[i] : compact;
    compact *= x.shape[i];
  }
  if (tensor.data == nullptr)
    fail(FWP_ARGUMENT_ERROR, name, ": expected data for shape ", text(x.shape, x.rank), ", got NULL");
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  if (address % static_cast<uintptr_t>(item) != 0)
    fail(FWP_ARGUMENT_ERROR, name, ": expected data aligned to its item size of ", item, " bytes, got an address ",
         address % static_cast<uintptr_t>(item), " bytes past a multiple");
  set_region(x, address, item);
  x.data = reinterpret_cast<char*>(address);
  return x;
}

}  // namespace

void check_count(const char* name, const int64_t* sizes, int rank) {
  int64_t count = 1;
  for (int i = 0; i < rank; ++i)
    if (__builtin_mul_overflow(count, std::max<int64_t>(sizes[i], 1), &count) || count > kMaxElements)
      fail(FWP_ARGUMENT_ERROR, name, ": expected at most 2^55 elements, got shape ", text(sizes, rank));
}

Tensor read_tensor(const char* name, const DLTensor* tensor, std::initializer_list<DType> dtypes,
                   std::initializer_list<Axes> shapes) {
  check_present(name, tensor);
  const int device = device_of(name, tensor->device);
  const DType* const found =
      std::find_if(dtypes.begin(), dtypes.end(), [&](DType wanted) { return matches(tensor->dtype, wanted); });
  if (found == dtypes.end())
    fail(FWP_DTYPE_ERROR, name, ": expected dtype ", text(dtypes), ", got ", text(tensor->dtype));
  check_shape(name, *tensor, shapes);
  Tensor x = read_memory(name, *tensor, item_size(*found));
  x.device = device;
  x.dtype = *found;
  return x;
}

int64_t Integers::at(int64_t i) const {
  const int64_t at = i * tensor.stride[0];
  return wide ? reinterpret_cast<const int64_t*>(tensor.data)[at] : reinterpret_cast<const int32_t*>(tensor.data)[at];
}

Integers read_integers(const char* name, const DLTensor* tensor, Axis axis) {
  check_present(name, tensor);
  const DLDataType& dtype = tensor->dtype;
  if (dtype.code != kDLInt || (dtype.bits != 32 && dtype.bits != 64) || dtype.lanes != 1)
    fail(FWP_DTYPE_ERROR, name, ": expected dtype int32 or int64, got ", text(dtype));
  check_shape(name, *tensor, {{axis}});
  Integers integers{read_memory(name, *tensor, dtype.bits / 8), dtype.bits == 64};
  integers.tensor.device = device_of(name, tensor->device);
  return integers;
}

}  // namespace fwp::core
