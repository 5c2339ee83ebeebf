// XLA's custom calls: operands and attributes of a call frame become the tensors and options of fwp.h.
//
// The attribute "operands" has one bit for every Operand that is there, in this order, and "results" likewise; the
// other attributes are the options. vmap puts axes in front of every buffer: "rank" says how many axes q has without
// them. Handlers run on XLA's threads, several at once, without Python. Those of CUDA put work on the stream of the
// call, with scratch memory of the runtime's own; nothing there waits for the device.
#include "xla.hpp"

#include <algorithm>
#include <cfenv>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <utility>

#include "fwp/fwp.h"

namespace fwp::xla {
namespace {

constexpr int kMaxRank = 5;  // of a tensor of fwp.h, without vmap's axes

enum Operand { q, k, v, beta, g, h0, cu_seqlens, state_indices, projection, state, d_o, d_hT, checkpoints, level };
constexpr int kOperands = level + 1;
// made and made_at are the checkpoints that forward makes, and the level that they hold for.
enum Result { o, hT, made, made_at, dq, dk, dv, dbeta, dg, dh0 };
constexpr int kResults = dh0 + 1;
constexpr int32_t kNoLevel = -1;

// What a handler returns: null, or the runtime's error.
Error* failure(const CallFrame& frame, ErrorCode code, const char* message) {
  ErrorCreateArgs args{sizeof args, nullptr, message, code};
  return frame.api->error_create(&args);
}

ErrorCode error_code(int status) {
  switch (status) {
    case FWP_SHAPE_ERROR:
    case FWP_DTYPE_ERROR:
    case FWP_ARGUMENT_ERROR:
      return ErrorCode::invalid_argument;
    case FWP_UNSUPPORTED_ERROR:
      return ErrorCode::unimplemented;
    case FWP_OUT_OF_MEMORY:
      return ErrorCode::resource_exhausted;
    case FWP_INTERRUPTED:
      return ErrorCode::cancelled;
    default:
      return ErrorCode::internal;
  }
}

const char* error_name(int status) {
  size_t count = 0;
  const fwp_error_info* const table = fwp_error_table(&count);
  const fwp_error_info* const found =
      std::find_if(table, table + count, [status](const fwp_error_info& error) { return error.code == status; });
  return found != table + count ? found->name : "FwpError";
}

// "ArgumentError: cu_seqlens: expected ..."
Error* failure(const CallFrame& frame, int status) {
  char message[1024];
  std::snprintf(message, sizeof message, "%s: %s", error_name(status), fwp_last_error());
  return failure(frame, error_code(status), message);
}

DLDataType dtype_of(DataType type) {
  switch (type) {
    case DataType::f16:
      return {kDLFloat, 16, 1};
    case DataType::f32:
      return {kDLFloat, 32, 1};
    case DataType::f64:
      return {kDLFloat, 64, 1};
    case DataType::bf16:
      return {kDLBfloat, 16, 1};
    case DataType::s32:
      return {kDLInt, 32, 1};
    case DataType::s64:
      return {kDLInt, 64, 1};
    default:
      return {kDLUInt, 0, 1};  // which fwp.h refuses
  }
}

// Where the buffers of a frame are, and what the work on them is put on.
struct Place {
  DLDevice device{kDLCPU, 0};
  void* stream = nullptr;

  bool on_device() const { return device.device_type != kDLCPU; }

  // Of a frame of CUDA's; null, or the runtime's error.
  Error* find(const CallFrame& frame) {
    if (frame.api->struct_size < offsetof(Api, device_get) + sizeof frame.api->device_get)
      return failure(frame, ErrorCode::unimplemented,
                     "DeviceError: expected a jaxlib that tells on which device a call runs, got an older one");
    StreamGetArgs at{sizeof at, nullptr, frame.context, nullptr};
    if (Error* const error = frame.api->stream_get(&at)) return error;
    DeviceGetArgs on{sizeof on, nullptr, frame.context, 0};
    if (Error* const error = frame.api->device_get(&on)) return error;
    stream = at.stream;
    device = {kDLCUDA, on.device};
    return nullptr;
  }
};

// Memory of the runtime's allocator on a device, which knows that the work on the call's stream comes first.
class Scratch {
 public:
  explicit Scratch(const CallFrame& frame) : frame_(frame) {}
  ~Scratch() {
    if (memory_ == nullptr) return;
    MemoryFreeArgs args{sizeof args, nullptr, frame_.context, bytes_ + kAlignment, memory_};
    if (Error* const error = frame_.api->memory_free(&args)) {
      ErrorDestroyArgs destroy{sizeof destroy, nullptr, error};
      frame_.api->error_destroy(&destroy);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Null, or the runtime's error.
  Error* take(size_t bytes) {
    if (bytes == 0) return nullptr;
    bytes_ = bytes;
    MemoryAllocateArgs args{sizeof args, nullptr, frame_.context, bytes + kAlignment, 16, nullptr};
    Error* const error = frame_.api->memory_allocate(&args);
    memory_ = args.data;
    return error;
  }
  void* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 64;  // of workspaces; more than the runtime can be asked for

  const CallFrame& frame_;
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// A buffer as one tensor of all samples, their axes folded into its first, or as that of one sample.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor&) = delete;  // tensor_ points into this object
  Tensor& operator=(const Tensor&) = delete;

  void all(const Buffer& buffer, DLDevice device, int64_t axes, int64_t samples) {
    one(buffer, device, axes, 0);
    if (tensor_.ndim > 0) shape_[0] *= samples;
  }

  void one(const Buffer& buffer, DLDevice device, int64_t axes, int64_t sample) {
    const DLDataType dtype = dtype_of(buffer.dtype);
    std::copy(buffer.dims + axes, buffer.dims + buffer.rank, shape_);
    int64_t bytes = dtype.bits / 8;
    for (int64_t i = axes; i < buffer.rank; ++i) bytes *= buffer.dims[i];
    tensor_ = {static_cast<char*>(buffer.data) + sample * bytes,
               device,
               static_cast<int32_t>(buffer.rank - axes),
               dtype,
               shape_,
               nullptr,
               0};
    present_ = true;
  }

  const DLTensor* get() const { return present_ ? &tensor_ : nullptr; }
  int32_t* scalars() const { return present_ ? static_cast<int32_t*>(tensor_.data) : nullptr; }
  int64_t size() const { return shape_[0]; }

 private:
  bool present_ = false;
  DLTensor tensor_;
  int64_t shape_[kMaxRank];
};

// The level of fwp_isa() as a number.
int32_t current_level() {
  const char* const* const all = fwp_available_isas();
  const char* const isa = fwp_isa();
  for (int32_t i = 0; isa != nullptr && all[i] != nullptr; ++i)
    if (std::strcmp(isa, all[i]) == 0) return i;
  return kNoLevel;
}

// One call of fwp.h.
struct Call {
  Place place;
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
  fwp_options options;
  Tensor operands[kOperands];
  Tensor results[kResults];
  int64_t level_count;  // numbers in `level` and `made_at`, all the same

  const DLTensor* in(Operand name) const { return operands[name].get(); }
  const DLTensor* out(Result name) const { return results[name].get(); }
  fwp_inputs inputs() const {
    return {sizeof(fwp_inputs), in(q), in(k), in(v), in(beta), in(g), in(h0), in(cu_seqlens), in(state_indices)};
  }

  // Whether a tensor of checkpoints has the number of elements that these inputs take now.
  bool fits(const Tensor& kept) const {
    int64_t elements = 0;
    const fwp_inputs given = inputs();
    return kept.get() != nullptr && fwp_checkpoints(&options, &given, &elements) == FWP_OK && elements == kept.size();
  }
};

// A function of fwp.h for one call, and the size of the workspace that it takes.
using Function = int (*)(const Call&);
using Query = int (*)(const Call&, size_t* bytes);

template <decltype(&fwp_delta_fwd_workspace) query>
int workspace(const Call& call, size_t* bytes) {
  const fwp_inputs inputs = call.inputs();
  return query(&call.options, &inputs, bytes);
}

// Checkpoints hold for one level, and programs outlive a switch: what was made, or is asked for, at another level
// is left out, and backward makes its own. On a device none are made: their level is a number there.
template <decltype(&fwp_delta_fwd) function>
int forward(const Call& call) {
  const bool keeps = !call.place.on_device();
  const int32_t level = keeps ? current_level() : kNoLevel;
  const Tensor& kept = call.results[made];
  const fwp_inputs inputs = call.inputs();
  const fwp_outputs outputs{sizeof outputs, call.out(o), call.out(hT), keeps && call.fits(kept) ? kept.get() : nullptr};
  const int status =
      function(&call.options, &inputs, &outputs, call.workspace, call.workspace_bytes, call.place.stream);
  if (!keeps) return status;
  const bool holds = outputs.checkpoints != nullptr && current_level() == level;
  if (int32_t* const levels = call.results[made_at].scalars())
    std::fill(levels, levels + call.level_count, holds ? level : kNoLevel);
  return status;
}

// Whether the checkpoints that a forward pass has kept are of the level in use.
bool holds(const Call& call) {
  const int32_t* const levels = call.operands[level].scalars();
  if (levels == nullptr || call.place.on_device()) return false;
  const int32_t now = current_level();
  return now != kNoLevel && std::all_of(levels, levels + call.level_count, [now](int32_t at) { return at == now; });
}

template <decltype(&fwp_delta_bwd) function>
int backward(const Call& call) {
  const Tensor& kept = call.operands[checkpoints];
  const fwp_inputs inputs = call.inputs();
  const fwp_cotangents cotangents{sizeof cotangents, call.in(d_o), call.in(d_hT),
                                  holds(call) && call.fits(kept) ? kept.get() : nullptr};
  const fwp_gradients gradients{sizeof gradients, call.out(dq), call.out(dk), call.out(dv),
                                call.out(dbeta),  call.out(dg), call.out(dh0)};
  return function(&call.options, &inputs, &cotangents, &gradients, call.workspace, call.workspace_bytes,
                  call.place.stream);
}

// The new state takes the memory of the old one where the runtime allows.
template <decltype(&fwp_delta_step) function>
int step(const Call& call) {
  const DLTensor &before = *call.in(state), &after = *call.out(hT);
  if (after.data != before.data) {
    size_t bytes = after.dtype.bits / 8u;
    for (int32_t i = 0; i < after.ndim; ++i) bytes *= static_cast<size_t>(after.shape[i]);
    const Place& place = call.place;
    if (!place.on_device())
      std::memcpy(after.data, before.data, bytes);
    else if (const int status = fwp_device_copy(place.device.device_id, after.data, before.data, bytes, place.stream))
      return status;
  }
  const fwp_inputs inputs = call.inputs();
  return function(&call.options, &inputs, &after, call.out(o), call.workspace, call.workspace_bytes, call.place.stream);
}

int map_forward(const Call& call) {
  return fwp_feature_map_fwd(call.options.feature_map, call.in(q), call.out(o), call.place.stream);
}

int map_backward(const Call& call) {
  return fwp_feature_map_bwd(call.options.feature_map, call.in(d_o), call.in(q), call.out(dq), call.place.stream);
}

// The scalar of this name; false if there is none of this type.
template <class Number>
bool attribute(const Attributes& attributes, const char* name, DataType type, Number* value) {
  for (int64_t i = 0; i < attributes.size; ++i) {
    const ByteSpan& found = *attributes.names[i];
    if (found.size != std::strlen(name) || std::memcmp(found.data, name, found.size) != 0) continue;
    const Scalar& scalar = *static_cast<const Scalar*>(attributes.values[i]);
    if (attributes.kinds[i] != AttributeKind::scalar || scalar.dtype != type) return false;
    std::memcpy(value, scalar.value, sizeof *value);
    return true;
  }
  return false;
}

struct Settings {
  int64_t operands, results, rank, map, nu, qk_norm;
  bool attention_norm;
  double map_eps, eps, scale;

  // The name of an attribute that is missing or of another type; null if all are there.
  const char* read(const Attributes& from) {
    const std::pair<const char*, int64_t*> integers[] = {
        {"operands", &operands}, {"results", &results}, {"rank", &rank},
        {"map", &map},           {"nu", &nu},           {"qk_norm", &qk_norm}};
    const std::pair<const char*, double*> numbers[] = {{"map_eps", &map_eps}, {"eps", &eps}, {"scale", &scale}};
    for (const auto& [name, value] : integers)
      if (!attribute(from, name, DataType::s64, value)) return name;
    for (const auto& [name, value] : numbers)
      if (!attribute(from, name, DataType::f64, value)) return name;
    return attribute(from, "attention_norm", DataType::boolean, &attention_norm) ? nullptr : "attention_norm";
  }
};

// The buffers of a call by their names.
struct Frame {
  const Buffer* operands[kOperands] = {};
  const Buffer* results[kResults] = {};
  int64_t axes = 0, samples = 1;  // vmap's

  // False if the frame has other buffers than the settings say.
  bool read(const CallFrame& frame, const Settings& settings) {
    if (!take(frame.operands, settings.operands, operands, kOperands)) return false;
    if (!take(frame.results, settings.results, results, kResults)) return false;
    if (operands[q] == nullptr || operands[q]->rank < settings.rank) return false;
    axes = operands[q]->rank - settings.rank;
    for (int64_t i = 0; i < axes; ++i) samples *= operands[q]->dims[i];
    return fits(operands, kOperands) && fits(results, kResults);
  }

  // Whether every sample needs a call of its own: else they are one large batch.
  bool separate() const {
    return samples != 1 && (operands[cu_seqlens] || operands[state_indices] || operands[projection]);
  }

 private:
  static bool take(const Buffers& from, int64_t mask, const Buffer** to, int count) {
    int64_t next = 0;
    for (int i = 0; i < count; ++i)
      if ((mask >> i & 1) != 0) {
        if (next == from.size || from.kinds[next] != BufferKind::buffer) return false;
        to[i] = from.buffers[next++];
      }
    return next == from.size && mask >> count == 0;
  }

  bool fits(const Buffer* const* buffers, int count) const {
    return std::all_of(buffers, buffers + count, [this](const Buffer* buffer) {
      return buffer == nullptr || (buffer->rank >= axes && buffer->rank <= axes + kMaxRank &&
                                   std::equal(buffer->dims, buffer->dims + axes, operands[q]->dims));
    });
  }
};

// Arithmetic as everywhere else while it lives: XLA's threads flush subnormal numbers to zero.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

Error* run(const CallFrame& given, Function function, Query query, const Place& place, const Frame& frame,
           const Settings& settings) {
  const bool separate = frame.separate();
  for (int64_t sample = 0; sample < (separate ? frame.samples : 1); ++sample) {
    Call call;
    const auto view = [&](const Buffer* buffer, Tensor& tensor) {
      if (buffer == nullptr) return;
      separate ? tensor.one(*buffer, place.device, frame.axes, sample)
               : tensor.all(*buffer, place.device, frame.axes, frame.samples);
    };
    for (int i = 0; i < kOperands; ++i) view(frame.operands[i], call.operands[i]);
    for (int i = 0; i < kResults; ++i) view(frame.results[i], call.results[i]);
    call.place = place;
    call.level_count = separate ? 1 : frame.samples;
    const fwp_feature_map map{sizeof map, static_cast<int>(settings.map), static_cast<int>(settings.nu),
                              settings.map_eps, call.in(projection)};
    call.options = FWP_OPTIONS_INIT;
    call.options.scale = settings.scale;
    call.options.feature_map = settings.map != 0 ? &map : nullptr;
    call.options.qk_norm = static_cast<int>(settings.qk_norm);
    call.options.attention_norm = settings.attention_norm ? 1 : 0;
    call.options.eps = settings.eps;
    Scratch scratch(given);
    if (place.on_device() && query != nullptr) {
      if (const int status = query(call, &call.workspace_bytes)) return failure(given, status);
      if (Error* const error = scratch.take(call.workspace_bytes)) return error;
      call.workspace = scratch.data();
    }
    if (const int status = function(call)) return failure(given, status);
  }
  return nullptr;
}

// Answers the question for metadata, if the frame is that and no call.
bool answered(const CallFrame& frame) {
  if (frame.extension_start == nullptr || frame.extension_start->type != Extension::metadata) return false;
  Metadata& metadata = *reinterpret_cast<MetadataExtension*>(frame.extension_start)->metadata;
  metadata.version.major_version = kMajorVersion;
  metadata.version.minor_version = kMinorVersion;
  metadata.traits = 0;
  return true;
}

template <bool on_device, Function function, Query query>
Error* handler(CallFrame* given) {
  const CallFrame& frame = *given;
  if (answered(frame)) return nullptr;
  Place place;
  if constexpr (on_device)
    if (Error* const error = place.find(frame)) return error;
  Settings settings;
  Frame buffers;
  char message[128];
  if (const char* const name = settings.read(frame.attributes)) {
    std::snprintf(message, sizeof message, "%s: expected an attribute, i64, f64 or bool, got none", name);
    return failure(frame, ErrorCode::internal, message);
  }
  if (!buffers.read(frame, settings))
    return failure(frame, ErrorCode::internal, "operands, results: expected the buffers that the attributes tell of");
  const DefaultArithmetic arithmetic;
  return run(frame, function, query, place, buffers, settings);
}

template <Function function, Query query>
constexpr Target target(const char* name) {
  return {name, handler<false, function, query>, handler<true, function, query>};
}

constexpr Target kTargets[] = {
    target<forward<fwp_linear_fwd>, workspace<fwp_linear_fwd_workspace>>("fwp_core.linear_attention"),
    target<forward<fwp_delta_fwd>, workspace<fwp_delta_fwd_workspace>>("fwp_core.delta_rule"),
    target<backward<fwp_linear_bwd>, workspace<fwp_linear_bwd_workspace>>("fwp_core.linear_attention_backward"),
    target<backward<fwp_delta_bwd>, workspace<fwp_delta_bwd_workspace>>("fwp_core.delta_rule_backward"),
    target<step<fwp_linear_step>, workspace<fwp_linear_step_workspace>>("fwp_core.linear_attention_step"),
    target<step<fwp_delta_step>, workspace<fwp_delta_step_workspace>>("fwp_core.delta_rule_step"),
    target<map_forward, nullptr>("fwp_core.feature_forward"),
    target<map_backward, nullptr>("fwp_core.feature_backward"),
};

}  // namespace

const Target* targets() { return kTargets; }
size_t target_count() { return std::size(kTargets); }

}  // namespace fwp::xla
