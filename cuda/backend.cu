// The back end's border: from a validated problem to kernels on its stream. Integers go to the device, features are a
// pass of their own, and then the scan runs, in segments or whole (segments.hpp, forms.hpp).
#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "../cpp/scan/arena.hpp"
#include "../cpp/scan/backend.hpp"
#include "device.hpp"
#include "features/features.hpp"
#include "integers.cuh"
#include "recurrent/recurrent.hpp"
#include "segments.hpp"

namespace fwp::cuda {
namespace {

thread_local char error_of_thread[1024] = "";

template <class Body>
Outcome guarded(const Body& body) {
  try {
    body();
    return Outcome::done;
  } catch (const std::exception& error) {
    std::snprintf(error_of_thread, sizeof error_of_thread, "%s", error.what());
    return Outcome::failed;
  }
}

// ---- calls by their names, and what their kernels find wrong ----

enum Kind : int32_t { kForward, kBackward, kStep, kDiagnose, kMap, kKinds };
constexpr const char* kNames[kKinds][2] = {{"linear_attention", "delta_rule"},
                                           {"linear_attention_backward", "delta_rule_backward"},
                                           {"linear_attention_step", "delta_rule_step"},
                                           {"diagnose", "diagnose"},
                                           {"feature map", "feature map"}};
struct Call {
  Kind kind;
  Rule rule;

  Call(Kind of, const Problem& p) : kind(of == kForward && p.step ? kStep : of), rule(p.rule) {}
  Call(Kind kind_, Rule rule_) : kind(kind_), rule(rule_) {}
  const char* name() const { return kNames[kind][rule == Rule::delta ? 1 : 0]; }
};

// In the device's word, which is 0 where there is none.
struct Fault {
  Call call;
  bool of_slots;  // else of offsets

  int32_t word() const { return 1 + (of_slots ? 1 : 0) + (call.rule == Rule::delta ? 2 : 0) + 4 * call.kind; }
  static Fault of(int32_t word) {
    const int32_t x = word - 1;
    return {{static_cast<Kind>(x / 4), x / 2 % 2 == 1 ? Rule::delta : Rule::linear}, x % 2 == 1};
  }
  std::string message() const {
    return std::string(call.name()) +
           (of_slots ? ", an earlier call: state_indices: expected slots from 0 to S-1, or -1 for none; sequences with "
                       "others were left out"
                     : ", an earlier call: cu_seqlens: expected offsets that start with 0, never fall and end with T; "
                       "others were clamped");
  }
};

// What kernels of earlier calls found wrong. Throws Error.
void report_faults(int device) {
  if (const int32_t word = take_fault(device); word != 0) throw Error(Fault::of(word).message());
}

// ---- memory that kernels may touch, for the emulator ----

struct Extent {
  int64_t below = 0, above = 0;  // in numbers, from the first one
  bool empty = false;
  void axis(int64_t size, int64_t stride) {
    empty = empty || size == 0;
    (stride < 0 ? below : above) += stride * (size - 1);
  }
  void add(std::vector<Memory>& memory, const void* data, int64_t item, bool writable) const {
    if (data == nullptr || empty) return;
    memory.push_back(
        {static_cast<const char*>(data) + below * item, static_cast<size_t>((above - below + 1) * item), writable});
  }
};

void add(std::vector<Memory>& memory, const Problem& p, const Rows& rows, int64_t width, bool writable) {
  Extent extent;
  extent.axis(packed(p) ? 1 : p.N, rows.b);
  extent.axis(p.T, rows.t);
  extent.axis(p.H / std::max<int64_t>(rows.group, 1), rows.h);
  extent.axis(width, 1);
  extent.add(memory, rows.data, item_size(rows.dtype), writable);
}

void add(std::vector<Memory>& memory, const Problem& p, const States& states, bool writable) {
  Extent extent;
  extent.axis(p.state_indices != nullptr || p.device_state_indices.data != nullptr ? p.slots : p.N, states.n);
  extent.axis(p.H, states.h);
  extent.axis(p.K, states.k);
  extent.axis(p.V + (p.attention_norm ? 1 : 0), 1);
  extent.add(memory, states.data, item_size(accumulation(p.dtype)), writable);
}

void add(std::vector<Memory>& memory, const DeviceIntegers& integers, int64_t count) {
  Extent extent;
  extent.axis(count, integers.stride);
  extent.add(memory, integers.data, integers.wide ? 8 : 4, false);
}

// outputs: the size of a row of p.o.
std::vector<Memory> memory_of(const Problem& p, int64_t outputs, const void* workspace, size_t workspace_bytes) {
  std::vector<Memory> memory;
  if (workspace_bytes > 0) memory.push_back({workspace, workspace_bytes, true});
  memory.push_back({fault_word(p.device), sizeof(int32_t), true});
  const int64_t keys = p.key_size(), gates = p.decay == Decay::channel ? p.K : 1;
  for (const Rows* rows : {&p.q, &p.k}) add(memory, p, *rows, keys, false);
  for (const Rows* rows : {&p.dq, &p.dk}) add(memory, p, *rows, keys, true);
  add(memory, p, p.v, p.V, false);
  add(memory, p, p.d_o, p.V, false);
  add(memory, p, p.dv, p.V, true);
  add(memory, p, p.beta, 1, false);
  add(memory, p, p.dbeta, 1, true);
  add(memory, p, p.g, gates, false);
  add(memory, p, p.dg, gates, true);
  add(memory, p, p.o, outputs, true);
  add(memory, p, p.h0, p.step);
  add(memory, p, p.d_hT, false);
  add(memory, p, p.hT, true);
  add(memory, p, p.dh0, true);
  add(memory, p.device_cu_seqlens, p.N + 1);
  add(memory, p.device_state_indices, p.N);
  const Features& f = p.features;
  if (f.map == Map::favor) {
    Extent extent;
    extent.axis(f.directions, f.projection_stride);
    extent.axis(f.inputs, 1);
    extent.add(memory, f.projection, item_size(accumulation(p.dtype)), false);
  }
  return memory;
}

// ---- integers ----

void put(const int64_t* from, int64_t count, int64_t* to, Queue& queue) {
  for (int64_t i = 0; i < count; i += Handful::kMost) {
    Handful some{};
    const int n = static_cast<int>(std::min<int64_t>(count - i, Handful::kMost));
    std::copy(from + i, from + i + n, some.x);
    queue.run("put_integers", put_integers, {1}, 128, 0, some, n, to + i);
  }
}

// inner: p, whose offsets will be there.
void place_integers(const Problem& p, Call call, Problem& inner, int64_t* integers, Queue& queue) {
  constexpr int kThreads = 256;
  constexpr size_t kShared = kThreads / kWarpSize * sizeof(int);
  int32_t* const fault = fault_word(p.device);
  if (p.device_cu_seqlens.data != nullptr)
    queue.run("check_offsets", check_offsets, {1}, kThreads, kShared, p.device_cu_seqlens, p.N, p.T, integers, fault,
              Fault{call, false}.word());
  else if (p.cu_seqlens != nullptr)
    put(p.cu_seqlens, p.N + 1, integers, queue);

  if (p.device_state_indices.data != nullptr)
    queue.run("check_slots", check_slots, {1}, kThreads, kShared, p.device_state_indices, p.N, p.slots, integers, fault,
              Fault{call, true}.word());
  else if (p.state_indices != nullptr)
    put(p.state_indices, p.N, integers, queue);
  if (p.device_state_indices.data != nullptr || p.state_indices != nullptr) inner.state_indices = integers;
}

// ---- plans: where things lie in a workspace, functions of the problem alone ----

// Rows [B,T,heads,K] of the accumulation type, with the heads that `of` has.
struct Mapped {
  Rows rows;
  features::Shape shape;

  Mapped(const Problem& p, const Rows& of, Arena& arena) {
    shape = {packed(p) ? 1 : p.N, p.T, p.H / of.group};
    rows.dtype = accumulation(p.dtype);
    rows.h = p.K;
    rows.t = shape.heads * p.K;
    rows.b = p.T * rows.t;
    rows.group = of.group;
    rows.data = arena.take<char>(shape.B * rows.b * item_size(rows.dtype));
  }
};

// The problem after its features, and its integers, and what is left of the workspace.
struct Plan {
  Call call;
  Problem inner;
  Arena arena;
  int64_t* integers;
  void* rooms = nullptr;  // of features

  Plan(Kind kind, const Problem& p, void* workspace) : call(kind, p), inner(p), arena(workspace) {
    // A step may have slots, which are not looked at before its memory is known.
    integers = arena.take<int64_t>(packed(p) || p.step ? p.N + 1 : 0);
    static constexpr int64_t kNowhere = 0;  // counting memory is about packed sequences, too
    if (packed(p)) inner.cu_seqlens = workspace != nullptr ? integers : &kNowhere;
  }
  // The problem of the scan itself: keys and queries are rows that the features have made.
  void map(const Problem& p, bool backward, Queue* queue) {
    if (!p.features.active()) return;
    const size_t bytes = features::workspace(p.features, accumulation(p.dtype), p.device, backward);
    rooms = arena.take<char>(static_cast<int64_t>(bytes));
    for (Rows Problem::* rows : {&Problem::q, &Problem::k}) {
      if ((p.*rows).data == nullptr) continue;
      const Mapped mapped(p, p.*rows, arena);
      if (queue != nullptr) features::forward(p.features, mapped.shape, p.*rows, mapped.rows, rooms, *queue);
      inner.*rows = mapped.rows;
    }
    inner.features = {};
    inner.features.inputs = inner.features.outputs = p.K;
  }
};

void plan_forward(const Problem& p, Plan& plan, Queue* queue) {
  if (queue != nullptr) place_integers(p, plan.call, plan.inner, plan.integers, *queue);
  plan.map(p, false, queue);
  const int64_t length = segments::length(plan.inner);
  const size_t bytes = p.step ? recurrent::step_workspace(plan.inner) : segments::forward_workspace(plan.inner, length);
  void* const rest = plan.arena.take<char>(static_cast<int64_t>(bytes));
  if (queue == nullptr) return;
  p.step ? recurrent::step(plan.inner, rest, *queue) : segments::forward(plan.inner, length, rest, *queue);
}

void plan_backward(const Problem& p, Plan& plan, Queue* queue) {
  if (queue != nullptr) place_integers(p, plan.call, plan.inner, plan.integers, *queue);
  plan.map(p, true, queue);
  const auto gradient = [&](Rows Problem::* to, Rows Problem::* of) {
    if (p.features.active() && (p.*of).data != nullptr && ((p.*to).data != nullptr || queue == nullptr))
      plan.inner.*to = Mapped(p, p.*of, plan.arena).rows;
  };
  gradient(&Problem::dq, &Problem::q);
  gradient(&Problem::dk, &Problem::k);
  const int64_t length = segments::length(plan.inner);
  const size_t bytes = segments::backward_workspace(plan.inner, length);
  void* const rest = plan.arena.take<char>(static_cast<int64_t>(bytes));
  if (queue != nullptr) segments::backward(plan.inner, length, rest, *queue);
  if (queue == nullptr || !p.features.active()) return;
  for (const auto& [to, of] : {std::pair{&Problem::dq, &Problem::q}, std::pair{&Problem::dk, &Problem::k}}) {
    const Rows& d = p.*to;
    if (d.data == nullptr) continue;
    const features::Shape shape{packed(p) ? 1 : p.N, p.T, p.H / (p.*of).group};
    features::backward(p.features, shape, plan.inner.*to, p.*of, d, plan.rooms, *queue);
  }
}

void plan_diagnose(const Problem& p, Plan& plan, Queue* queue) {
  if (queue != nullptr) place_integers(p, plan.call, plan.inner, plan.integers, *queue);
  plan.map(p, false, queue);
  if (queue != nullptr) recurrent::diagnose(plan.inner, *queue);
}

// ---- the table ----

size_t forward_workspace(const Problem& p) {
  Plan plan(kForward, p, nullptr);
  plan_forward(p, plan, nullptr);
  return plan.arena.used();
}
size_t backward_workspace(const Problem& p) {
  Plan plan(kBackward, p, nullptr);
  plan_backward(p, plan, nullptr);
  return plan.arena.used();
}
size_t diagnose_workspace(const Problem& p) {
  Plan plan(kDiagnose, p, nullptr);
  plan_diagnose(p, plan, nullptr);
  return plan.arena.used();
}
size_t map_workspace(const Problem& p) {
  return features::workspace(p.features, accumulation(p.dtype), p.device, true);
}
int64_t checkpoint_elements(const Problem&) { return 0; }

// Runs the kernels of a plan on the problem's device and stream.
template <class Body>
Outcome on_device(const Problem& p, Kind kind, int64_t outputs, void* workspace, size_t (*query)(const Problem&),
                  const Body& body) {
  return guarded([&] {
    Plan plan(kind, p, workspace);
    std::optional<UseDevice> use;
    try {
      use.emplace(p.device);
      fault_word(p.device);
    } catch (const Error& error) {
      throw Error(std::string(plan.call.name()) + ": " + error.what());
    }
    report_faults(p.device);
    const size_t bytes = kEmulated ? query(p) : 0;
    Queue queue(p.stream, plan.call.name(),
                kEmulated ? memory_of(p, outputs, workspace, bytes) : std::vector<Memory>());
    body(plan, queue);
    if (kEmulated && plan.arena.used() > bytes)
      throw Error("workspace: a query said " + std::to_string(bytes) + " bytes, the call took " +
                  std::to_string(plan.arena.used()));
  });
}

Outcome forward(const Problem& p, void* workspace) {
  return on_device(p, kForward, p.V, workspace, forward_workspace,
                   [&](Plan& plan, Queue& queue) { plan_forward(p, plan, &queue); });
}
Outcome backward(const Problem& p, void* workspace) {
  return on_device(p, kBackward, p.V, workspace, backward_workspace,
                   [&](Plan& plan, Queue& queue) { plan_backward(p, plan, &queue); });
}
Outcome diagnose(const Problem& p, void* workspace) {
  return on_device(p, kDiagnose, kProbes, workspace, diagnose_workspace,
                   [&](Plan& plan, Queue& queue) { plan_diagnose(p, plan, &queue); });
}
Outcome map_rows(const Problem& p, void* workspace) {
  Problem one_head = p;  // as memory_of looks at it
  one_head.N = one_head.H = 1;
  one_head.V = p.K;
  return on_device(one_head, kMap, p.K, workspace, map_workspace, [&](Plan&, Queue& queue) {
    const features::Shape shape{1, p.T, 1};
    if (p.d_o.data == nullptr)
      features::forward(p.features, shape, p.q, p.o, workspace, queue);
    else
      features::backward(p.features, shape, p.d_o, p.q, p.dq, workspace, queue);
  });
}

Outcome check(int device) {
  return guarded([&] {
    const UseDevice use(device);
    report_faults(device);
  });
}
Outcome allocate(int device, size_t bytes, void* stream, void** memory) {
  return guarded([&] {
    const UseDevice use(device);
    *memory = device_allocate(device, bytes, stream);
  });
}
void deallocate(int device, void* memory, void* stream) {
  guarded([&] {
    const UseDevice use(device);
    device_free(device, memory, stream);
  });
}
Outcome copy(int device, void* to, const void* from, size_t bytes, void* stream) {
  return guarded([&] {
    const UseDevice use(device);
    device_copy(to, from, bytes, stream);
  });
}
Outcome wait(int device, void* from, void* to) {
  return guarded([&] {
    const UseDevice use(device);
    device_wait(from, to);
  });
}

}  // namespace
}  // namespace fwp::cuda

extern "C" __attribute__((visibility("default"))) const fwp::Backend* fwp_cuda_backend() {
  static const fwp::Backend table{FWP_LAYOUT,
                                  sizeof(fwp::Backend),
                                  sizeof(fwp::Problem),
                                  fwp::cuda::device_state,
                                  fwp::cuda::forward_workspace,
                                  fwp::cuda::backward_workspace,
                                  fwp::cuda::diagnose_workspace,
                                  fwp::cuda::map_workspace,
                                  fwp::cuda::checkpoint_elements,
                                  fwp::cuda::forward,
                                  fwp::cuda::backward,
                                  fwp::cuda::diagnose,
                                  fwp::cuda::map_rows,
                                  fwp::cuda::check,
                                  [] { return static_cast<const char*>(fwp::cuda::error_of_thread); },
                                  fwp::cuda::allocate,
                                  fwp::cuda::deallocate,
                                  fwp::cuda::copy,
                                  fwp::cuda::wait,
                                  fwp::cuda::device_trim};
  return &table;
}
