// The back end's border: from a validated problem to kernels on its stream. Integers go to the device, features are a
// pass of their own, and then the scan runs, in segments or whole (segments.hpp, forms.hpp).
#include <algorithm>
#include <cstdio>
#include <exception>
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

// Calls, by the name under which what their kernels find wrong is reported. The fault word holds 1 + twice the place
// here, and one more where it is about slots.
constexpr const char* kCalls[] = {
    "linear_attention",      "linear_attention_backward", "delta_rule", "delta_rule_backward",
    "linear_attention_step", "delta_rule_step",           "diagnose"};
enum Direction : int32_t { kForward, kBackward, kDiagnose };
int32_t fault_of(const Problem& p, Direction direction) {
  const int32_t rule = p.rule == Rule::delta ? 1 : 0;
  return 1 + 2 * (direction == kDiagnose ? 6 : p.step ? 4 + rule : 2 * rule + direction);
}

// inner: p, whose offsets will be there.
void place_integers(const Problem& p, Direction direction, Problem& inner, int64_t* integers, Queue& queue) {
  constexpr int kThreads = 256;
  constexpr size_t kShared = kThreads / kWarpSize * sizeof(int);
  int32_t* const fault = fault_word(p.device);
  if (p.device_cu_seqlens.data != nullptr)
    queue.run("check_offsets", check_offsets, {1}, kThreads, kShared, p.device_cu_seqlens, p.N, p.T, integers, fault,
              fault_of(p, direction));
  else if (p.cu_seqlens != nullptr)
    put(p.cu_seqlens, p.N + 1, integers, queue);

  if (p.device_state_indices.data != nullptr)
    queue.run("check_slots", check_slots, {1}, kThreads, kShared, p.device_state_indices, p.N, p.slots, integers, fault,
              fault_of(p, direction) + 1);
  else if (p.state_indices != nullptr)
    put(p.state_indices, p.N, integers, queue);
  if (p.device_state_indices.data != nullptr || p.state_indices != nullptr) inner.state_indices = integers;
}

// What kernels of earlier calls found wrong.
void report_faults(int device) {
  const int32_t found = take_fault(device);
  if (found == 0) return;
  const std::string call = kCalls[(found - 1) / 2];
  throw Error((found - 1) % 2 == 0
                  ? "an earlier call: cu_seqlens: expected offsets that start with 0, never fall and end with T; " +
                        call + " computed nothing"
                  : "an earlier call: state_indices: expected slots from 0 to S-1, or -1 for none; " + call +
                        " left sequences with others out");
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
  Problem inner;
  Arena arena;
  int64_t* integers;
  void* rooms = nullptr;  // of features

  Plan(const Problem& p, void* workspace) : inner(p), arena(workspace) {
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
  if (queue != nullptr) place_integers(p, kForward, plan.inner, plan.integers, *queue);
  plan.map(p, false, queue);
  const int64_t length = segments::length(plan.inner);
  const size_t bytes = p.step ? recurrent::step_workspace(plan.inner) : segments::forward_workspace(plan.inner, length);
  void* const rest = plan.arena.take<char>(static_cast<int64_t>(bytes));
  if (queue == nullptr) return;
  p.step ? recurrent::step(plan.inner, rest, *queue) : segments::forward(plan.inner, length, rest, *queue);
}

void plan_backward(const Problem& p, Plan& plan, Queue* queue) {
  if (queue != nullptr) place_integers(p, kBackward, plan.inner, plan.integers, *queue);
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
  if (queue != nullptr) place_integers(p, kDiagnose, plan.inner, plan.integers, *queue);
  plan.map(p, false, queue);
  if (queue != nullptr) recurrent::diagnose(plan.inner, *queue);
}

// ---- the table ----

size_t forward_workspace(const Problem& p) {
  Plan plan(p, nullptr);
  plan_forward(p, plan, nullptr);
  return plan.arena.used();
}
size_t backward_workspace(const Problem& p) {
  Plan plan(p, nullptr);
  plan_backward(p, plan, nullptr);
  return plan.arena.used();
}
size_t diagnose_workspace(const Problem& p) {
  Plan plan(p, nullptr);
  plan_diagnose(p, plan, nullptr);
  return plan.arena.used();
}
size_t map_workspace(const Problem& p) {
  return features::workspace(p.features, accumulation(p.dtype), p.device, true);
}
int64_t checkpoint_elements(const Problem&) { return 0; }

// Runs the kernels of a plan on the problem's device and stream.
template <class Body>
Outcome on_device(const Problem& p, int64_t outputs, void* workspace, size_t (*query)(const Problem&),
                  const Body& body) {
  return guarded([&] {
    const UseDevice use(p.device);
    report_faults(p.device);
    const size_t bytes = kEmulated ? query(p) : 0;
    Queue queue(p.stream, kEmulated ? memory_of(p, outputs, workspace, bytes) : std::vector<Memory>());
    Plan plan(p, workspace);
    body(plan, queue);
    if (kEmulated && plan.arena.used() > bytes)
      throw Error("workspace: a query said " + std::to_string(bytes) + " bytes, the call took " +
                  std::to_string(plan.arena.used()));
  });
}

Outcome forward(const Problem& p, void* workspace) {
  return on_device(p, p.V, workspace, forward_workspace,
                   [&](Plan& plan, Queue& queue) { plan_forward(p, plan, &queue); });
}
Outcome backward(const Problem& p, void* workspace) {
  return on_device(p, p.V, workspace, backward_workspace,
                   [&](Plan& plan, Queue& queue) { plan_backward(p, plan, &queue); });
}
Outcome diagnose(const Problem& p, void* workspace) {
  return on_device(p, kProbes, workspace, diagnose_workspace,
                   [&](Plan& plan, Queue& queue) { plan_diagnose(p, plan, &queue); });
}
Outcome map_rows(const Problem& p, void* workspace) {
  Problem one_head = p;  // as memory_of looks at it
  one_head.N = one_head.H = 1;
  one_head.V = p.K;
  return on_device(one_head, p.K, workspace, map_workspace, [&](Plan&, Queue& queue) {
    const features::Shape shape{1, p.T, 1};
    if (p.d_o.data == nullptr)
      features::forward(p.features, shape, p.q, p.o, workspace, queue);
    else
      features::backward(p.features, shape, p.d_o, p.q, p.dq, workspace, queue);
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
                                  [] { return static_cast<const char*>(fwp::cuda::error_of_thread); },
                                  fwp::cuda::allocate,
                                  fwp::cuda::deallocate,
                                  fwp::cuda::copy,
                                  fwp::cuda::wait,
                                  fwp::cuda::device_trim};
  return &table;
}
