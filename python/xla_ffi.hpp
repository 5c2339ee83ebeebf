// The call frame of XLA's foreign function interface, as version 0.1 of its C header (xla/ffi/api/c_api.h of any
// jaxlib) lays it out, under our own names and with only the parts that our handlers need. Later runtimes accept
// handlers of earlier versions, and none of these structs has changed since; a test compares them with the real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwp::xla {

constexpr int kMajorVersion = 0, kMinorVersion = 1;

enum class Extension : int { metadata = 1 };
enum class Stage : int { execute = 3 };
enum class BufferKind : int { buffer = 1 };
enum class AttributeKind : int { scalar = 3 };
enum class DataType : int { boolean = 1, s32 = 4, s64 = 5, f16 = 10, f32 = 11, f64 = 12, bf16 = 16 };
enum class ErrorCode : int {
  cancelled = 1,
  invalid_argument = 3,
  resource_exhausted = 8,
  unimplemented = 12,
  internal = 13,
};

struct ExtensionBase {
  size_t struct_size;
  Extension type;
  ExtensionBase* next;
};

struct ApiVersion {
  size_t struct_size;
  ExtensionBase* extension_start;
  int major_version;
  int minor_version;
};

struct Error;  // the runtime's; null is success

struct ErrorCreateArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  const char* message;
  ErrorCode code;
};

struct ErrorDestroyArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  Error* error;
};

struct ExecutionContext;

struct StreamGetArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  ExecutionContext* context;
  void* stream;  // filled in
};

struct MemoryAllocateArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  ExecutionContext* context;
  size_t size;
  size_t alignment;  // up to 16
  void* data;        // filled in
};

struct MemoryFreeArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  ExecutionContext* context;
  size_t size;
  void* data;
};

struct DeviceGetArgs {
  size_t struct_size;
  ExtensionBase* extension_start;
  ExecutionContext* context;
  int32_t device;  // filled in
};

// The runtime's functions, those that are called here and their neighbours; struct_size says where they end.
struct Api {
  size_t struct_size;
  ExtensionBase* extension_start;
  ApiVersion version;
  const void* internal;
  Error* (*error_create)(ErrorCreateArgs*);
  void (*error_get_message)();
  void (*error_destroy)(ErrorDestroyArgs*);
  void (*handler_register)();
  Error* (*stream_get)(StreamGetArgs*);
  void (*type_register)();
  void (*execution_context_get)();
  void (*state_set)();
  void (*state_get)();
  Error* (*memory_allocate)(MemoryAllocateArgs*);
  Error* (*memory_free)(MemoryFreeArgs*);
  void (*thread_pool_schedule)();
  void (*thread_pool_size)();
  void (*future_create)();
  void (*future_set_available)();
  void (*future_set_error)();
  void (*run_id_get)();
  Error* (*device_get)(DeviceGetArgs*);  // not of the first runtimes
};

struct Buffer {
  size_t struct_size;
  ExtensionBase* extension_start;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

// Operands, or results.
struct Buffers {
  size_t struct_size;
  ExtensionBase* extension_start;
  int64_t size;
  BufferKind* kinds;
  Buffer** buffers;
};

struct ByteSpan {
  const char* data;
  size_t size;
};

struct Scalar {
  DataType dtype;
  void* value;
};

struct Attributes {  // sorted by name
  size_t struct_size;
  ExtensionBase* extension_start;
  int64_t size;
  AttributeKind* kinds;
  ByteSpan** names;
  void** values;  // Scalar* where the kind is scalar
};

struct CallFrame {
  size_t struct_size;
  ExtensionBase* extension_start;
  const Api* api;
  ExecutionContext* context;
  Stage stage;
  Buffers operands;
  Buffers results;
  Attributes attributes;
};

using Handler = Error*(CallFrame*);

// What the runtime asks for, instead of a call, when the handler is registered.
struct Metadata {
  size_t struct_size;
  ApiVersion version;
  uint32_t traits;
};

struct MetadataExtension {
  ExtensionBase base;
  Metadata* metadata;
};

}  // namespace fwp::xla
