// The ABI of DLPack 1.3 beyond the DLTensor of fwp.h: managed tensors and the C exchange API. No Python here.
#pragma once

#include <cstdint>

#include "fwp/fwp.h"

namespace fwp::dlpack {

constexpr uint32_t kMajor = 1, kMinor = 3;

// Names of capsules, and what a consumer renames them to when it has taken the tensor.
constexpr const char* kName = "dltensor_versioned";
constexpr const char* kUsedName = "used_dltensor_versioned";
constexpr const char* kLegacyName = "dltensor";
constexpr const char* kLegacyUsedName = "used_dltensor";
constexpr const char* kExchangeName = "dlpack_exchange_api";

// Values of enumerations; fwp.h has those that the library computes with.
enum : int { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };
enum : uint64_t { kReadOnly = 1, kIsCopied = 2 };

struct Version {
  uint32_t major, minor;
};

// Before version 1: no version, no flags.
struct LegacyTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(LegacyTensor*);  // may be null
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);  // may be null
  uint64_t flags;
  DLTensor tensor;
};

// Another major version may have another layout from here on.
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the API of an older major version, or null
};

// What a framework offers on its array type. Functions return 0, or -1 with a Python error set.
struct ExchangeApi {
  ExchangeHeader header;
  int (*allocate)(DLTensor* prototype, ManagedTensor** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*object_from_managed)(ManagedTensor* tensor, void** out);  // takes the tensor over
  int (*borrow_from_object)(void* object, DLTensor* out);         // valid as long as the object; may be null
  int (*current_work_stream)(DLDeviceType type, int32_t id, void** out);
};

}  // namespace fwp::dlpack
