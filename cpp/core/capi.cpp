// The C ABI: every scan is check, take scratch memory, run.
#include <utility>

#include "../cpu/dispatch.hpp"
#include "backends.hpp"
#include "error.hpp"
#include "memory.hpp"
#include "validate.hpp"

namespace fwp::core {
namespace {

using Kernel = Outcome (*Backend::*)(const Problem&, void* workspace);
using Query = size_t (*Backend::*)(const Problem&);

void check(const Backend& backend, Outcome outcome) {
  if (outcome == Outcome::interrupted) fail(FWP_INTERRUPTED, "interrupted");
  if (outcome == Outcome::failed) fail(FWP_CUDA_ERROR, backend.error());
}

// The workspace of a call on a device, which its stream hands back when the work is done.
class DeviceWorkspace {
 public:
  DeviceWorkspace(const Problem& p, size_t bytes) : backend_(backend(p)), device_(p.device), stream_(p.stream) {
    if (bytes == 0) return;
    check(backend_, backend_.allocate(device_, bytes, stream_, &memory_));
    if (memory_ == nullptr) fail(FWP_OUT_OF_MEMORY, "workspace: no ", bytes, " bytes of memory on cuda:", device_);
  }
  ~DeviceWorkspace() {
    if (memory_ != nullptr) backend_.deallocate(device_, memory_, stream_);
  }
  DeviceWorkspace(const DeviceWorkspace&) = delete;
  DeviceWorkspace& operator=(const DeviceWorkspace&) = delete;

  void* data() const { return memory_; }

 private:
  const Backend& backend_;
  const int device_;
  void* const stream_;
  void* memory_ = nullptr;
};

// The library's own workspace. A thread keeps a small one from call to call, so that steps take no memory but once;
// while it is in use, a call from within a call (from the interrupt callback) takes another.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (bytes <= kMostKept) piece_ = std::exchange(kept, {});
    if (bytes > piece_.bytes) piece_ = {Memory(allocate(bytes)), bytes};
  }
  ~Workspace() {
    if (piece_.bytes <= kMostKept && piece_.bytes >= kept.bytes) kept = std::move(piece_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* data() const { return piece_.memory.get(); }

 private:
  struct Piece {
    Memory memory;
    size_t bytes = 0;
  };
  static constexpr size_t kMostKept = size_t{1} << 20;
  static thread_local Piece kept;

  Piece piece_;
};
thread_local Workspace::Piece Workspace::kept;

size_t workspace_of(const Call& call, Query query) {
  return call.slot_bytes() + (call.check_only() ? 0 : (backend(call.problem).*query)(call.problem));
}

void set_stream(Problem& p, void* stream) {
  if (stream != nullptr && p.device == kHost)
    fail(FWP_ARGUMENT_ERROR, "stream: expected NULL for CPU tensors, got a stream");
  p.stream = stream;
}

void run(const Problem& p, Kernel kernel, void* workspace) { check(backend(p), (backend(p).*kernel)(p, workspace)); }

void run(Call& call, Kernel kernel, Query query, void* workspace, size_t workspace_bytes, void* stream) {
  const size_t needed = workspace_of(call, query);
  set_stream(call.problem, stream);
  if (workspace != nullptr) call.add_workspace(workspace, workspace_bytes, needed);
  if (!call.check_only()) call.check_memory();
  const size_t missing = workspace == nullptr ? needed : 0;
  const bool on_host = call.problem.device == kHost;
  const Workspace own(on_host ? missing : 0);
  char* memory = static_cast<char*>(workspace != nullptr ? workspace : own.data());
  call.read_slots(memory);
  if (call.check_only()) return;
  if (on_host) return run(call.problem, kernel, memory + call.slot_bytes());
  const DeviceWorkspace device_own(call.problem, missing);
  run(call.problem, kernel, workspace != nullptr ? workspace : device_own.data());
}

int forward(Rule rule, const fwp_options* options, const fwp_inputs* inputs, const fwp_outputs* outputs,
            void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return guarded([&] {
    Call call(rule, false, options, inputs);
    call.add_outputs(outputs);
    run(call, &Backend::forward, &Backend::forward_workspace, workspace, workspace_bytes, stream);
  });
}

int backward(Rule rule, const fwp_options* options, const fwp_inputs* inputs, const fwp_cotangents* cotangents,
             const fwp_gradients* gradients, void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return guarded([&] {
    Call call(rule, false, options, inputs);
    call.add_cotangents(cotangents);
    call.add_gradients(gradients);
    run(call, &Backend::backward, &Backend::backward_workspace, workspace, workspace_bytes, stream);
  });
}

int step(Rule rule, const fwp_options* options, const fwp_inputs* inputs, const DLTensor* state, const DLTensor* o,
         void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return guarded([&] {
    Call call(rule, true, options, inputs);
    call.add_step_outputs(state, o);
    run(call, &Backend::forward, &Backend::forward_workspace, workspace, workspace_bytes, stream);
  });
}

int diagnose(Rule rule, const fwp_options* options, const fwp_inputs* inputs, const DLTensor* probes, void* workspace,
             size_t workspace_bytes, void* stream) noexcept {
  return guarded([&] {
    Call call(rule, false, options, inputs);
    call.add_probes(probes);
    run(call, &Backend::diagnose, &Backend::diagnose_workspace, workspace, workspace_bytes, stream);
  });
}

void run_map(MapCall& call, void* stream) {
  Problem& p = call.problem;
  set_stream(p, stream);
  call.check_memory();
  const size_t needed = backend(p).map_workspace(p);
  const bool on_host = p.device == kHost;
  const Workspace own(on_host ? needed : 0);
  if (on_host) return run(p, &Backend::map_rows, own.data());
  const DeviceWorkspace device_own(p, needed);
  run(p, &Backend::map_rows, device_own.data());
}

const Backend& backend_of_device(int device) {
  if (device < 0) fail(FWP_ARGUMENT_ERROR, "device: expected a number from 0 on, got ", device);
  return backend("device", device);
}

template <class Number>
Number& result(const char* name, Number* pointer) {
  if (pointer == nullptr) fail(FWP_ARGUMENT_ERROR, name, ": expected a place for the result, got NULL");
  return *pointer;
}

int workspace(Query query, Rule rule, bool step, const fwp_options* options, const fwp_inputs* inputs,
              size_t* bytes) noexcept {
  return guarded([&] { result("bytes", bytes) = workspace_of(Call(rule, step, options, inputs), query); });
}

}  // namespace
}  // namespace fwp::core

using fwp::Rule;
namespace core = fwp::core;
namespace cpu = fwp::cpu;

extern "C" {

int fwp_linear_fwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_outputs* outputs, void* workspace,
                   size_t workspace_bytes, void* stream) noexcept {
  return core::forward(Rule::linear, options, inputs, outputs, workspace, workspace_bytes, stream);
}

int fwp_delta_fwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_outputs* outputs, void* workspace,
                  size_t workspace_bytes, void* stream) noexcept {
  return core::forward(Rule::delta, options, inputs, outputs, workspace, workspace_bytes, stream);
}

int fwp_linear_bwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_cotangents* cotangents,
                   const fwp_gradients* gradients, void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return core::backward(Rule::linear, options, inputs, cotangents, gradients, workspace, workspace_bytes, stream);
}

int fwp_delta_bwd(const fwp_options* options, const fwp_inputs* inputs, const fwp_cotangents* cotangents,
                  const fwp_gradients* gradients, void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return core::backward(Rule::delta, options, inputs, cotangents, gradients, workspace, workspace_bytes, stream);
}

int fwp_linear_step(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* state, const DLTensor* o,
                    void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return core::step(Rule::linear, options, inputs, state, o, workspace, workspace_bytes, stream);
}

int fwp_delta_step(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* state, const DLTensor* o,
                   void* workspace, size_t workspace_bytes, void* stream) noexcept {
  return core::step(Rule::delta, options, inputs, state, o, workspace, workspace_bytes, stream);
}

static_assert(fwp::kProbes == FWP_PROBES);

int fwp_linear_diagnose(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* probes, void* workspace,
                        size_t workspace_bytes, void* stream) noexcept {
  return core::diagnose(Rule::linear, options, inputs, probes, workspace, workspace_bytes, stream);
}

int fwp_delta_diagnose(const fwp_options* options, const fwp_inputs* inputs, const DLTensor* probes, void* workspace,
                       size_t workspace_bytes, void* stream) noexcept {
  return core::diagnose(Rule::delta, options, inputs, probes, workspace, workspace_bytes, stream);
}

int fwp_linear_fwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::forward_workspace, Rule::linear, false, options, inputs, bytes);
}

int fwp_delta_fwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::forward_workspace, Rule::delta, false, options, inputs, bytes);
}

int fwp_linear_bwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::backward_workspace, Rule::linear, false, options, inputs, bytes);
}

int fwp_delta_bwd_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::backward_workspace, Rule::delta, false, options, inputs, bytes);
}

int fwp_linear_step_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::forward_workspace, Rule::linear, true, options, inputs, bytes);
}

int fwp_delta_step_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::forward_workspace, Rule::delta, true, options, inputs, bytes);
}

int fwp_linear_diagnose_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::diagnose_workspace, Rule::linear, false, options, inputs, bytes);
}

int fwp_delta_diagnose_workspace(const fwp_options* options, const fwp_inputs* inputs, size_t* bytes) noexcept {
  return core::workspace(&fwp::Backend::diagnose_workspace, Rule::delta, false, options, inputs, bytes);
}

int fwp_checkpoints(const fwp_options* options, const fwp_inputs* inputs, int64_t* elements) noexcept {
  return core::guarded([&] {
    // The linear rule, because it does without beta: the number does not depend on the rule.
    const core::Call call(Rule::linear, false, options, inputs);
    core::result("elements", elements) = core::backend(call.problem).checkpoint_elements(call.problem);
  });
}

int fwp_feature_size(const fwp_feature_map* map, int64_t n, int64_t* size) noexcept {
  return core::guarded([&] { core::result("size", size) = core::feature_size(map, n); });
}

int fwp_feature_map_fwd(const fwp_feature_map* map, const DLTensor* x, const DLTensor* y, void* stream) noexcept {
  return core::guarded([&] {
    core::MapCall call(map, x);
    call.add_output(y);
    core::run_map(call, stream);
  });
}

int fwp_feature_map_bwd(const fwp_feature_map* map, const DLTensor* d_y, const DLTensor* x, const DLTensor* d_x,
                        void* stream) noexcept {
  return core::guarded([&] {
    core::MapCall call(map, x);
    call.add_gradients(d_y, d_x);
    core::run_map(call, stream);
  });
}

int fwp_abi_version(void) noexcept { return FWP_ABI_VERSION; }

const char* fwp_version(void) noexcept { return FWP_VERSION; }

const char* fwp_compiler(void) noexcept {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GCC " __VERSION__;
#endif
}

int fwp_set_num_threads(int threads) noexcept {
  return core::guarded([&] {
    if (threads < 1) core::fail(FWP_ARGUMENT_ERROR, "threads: expected at least 1, got ", threads);
    cpu::set_num_threads(threads);
  });
}

int fwp_get_num_threads(void) noexcept { return cpu::get_num_threads(); }

const char* const* fwp_available_isas(void) noexcept { return cpu::available_isas(); }

const char* fwp_isa(void) noexcept {
  core::guarded(core::check_isa);
  return cpu::isa();
}

int fwp_use_isa(const char* name) noexcept {
  return core::guarded([&] {
    if (name == nullptr || !cpu::use_isa(name))
      core::fail(FWP_ARGUMENT_ERROR, "name: expected one of ", core::known_isas(), ", got ",
                 name != nullptr ? name : "NULL");
  });
}

uint64_t fwp_isa_calls(const char* name) noexcept { return name != nullptr ? cpu::isa_calls(name) : 0; }

int fwp_block_size(void) noexcept { return cpu::isa() != nullptr ? cpu::block_size() : 0; }

double fwp_fma_peak(int bits, double seconds) noexcept {
  if (cpu::isa() == nullptr || (bits != 32 && bits != 64)) return 0;
  return cpu::fma_peak(bits == 64 ? fwp::DType::f64 : fwp::DType::f32, seconds);
}

void* fwp_allocate(size_t bytes) noexcept { return fwp_reallocate(nullptr, bytes); }

void* fwp_reallocate(void* memory, size_t bytes) noexcept {
  void* grown = nullptr;
  core::guarded([&] { grown = core::reallocate(memory, bytes); });
  return grown;
}

void fwp_free(void* memory) noexcept { core::deallocate(memory); }

int fwp_cache_limit(size_t* bytes) noexcept {
  return core::guarded([&] { core::result("bytes", bytes) = core::cache_limit(); });
}

size_t fwp_cache_idle(void) noexcept { return core::cache_idle(); }

void fwp_empty_cache(void) noexcept {
  core::empty_cache();
  core::empty_device_caches();
}

void* fwp_device_allocate(int device, size_t bytes, void* stream) noexcept {
  void* memory = nullptr;
  core::guarded([&] {
    const fwp::Backend& backend = core::backend_of_device(device);
    core::check(backend, backend.allocate(device, bytes, stream, &memory));
    if (memory == nullptr) core::fail(FWP_OUT_OF_MEMORY, "no ", bytes, " bytes of memory on cuda:", device);
  });
  return memory;
}

void fwp_device_free(int device, void* memory, void* stream) noexcept {
  core::guarded([&] {
    if (memory != nullptr) core::backend_of_device(device).deallocate(device, memory, stream);
  });
}

int fwp_device_copy(int device, void* to, const void* from, size_t bytes, void* stream) noexcept {
  return core::guarded([&] {
    const fwp::Backend& backend = core::backend_of_device(device);
    if (bytes != 0) core::check(backend, backend.copy(device, to, from, bytes, stream));
  });
}

int fwp_device_wait(int device, void* from, void* to) noexcept {
  return core::guarded([&] {
    const fwp::Backend& backend = core::backend_of_device(device);
    if (from != to) core::check(backend, backend.wait(device, from, to));
  });
}

int fwp_device_check(int device) noexcept {
  return core::guarded([&] {
    const fwp::Backend& backend = core::backend_of_device(device);
    core::check(backend, backend.check(device));
  });
}

const char* fwp_cuda_state(void) noexcept { return core::cuda_state(); }

}  // extern "C"
