#include "forward.cuh"
#include "recurrent.hpp"
#include "step.hpp"

namespace fwp::cuda::recurrent {

size_t forward_workspace(const Problem& p) {
  return with_number(p, [&](auto number) {
    const ForwardPlan<decltype(number)> plan(p, nullptr, 1);
    Arena arena(nullptr);
    arena.take<decltype(number)>(plan.room.workspace(plan.blocks(p)));
    return arena.used();
  });
}

void forward(const Problem& p, void* workspace, const int32_t* only, Queue& queue) {
  with_number(p, [&](auto number) {
    ForwardPlan<decltype(number)> plan(p, only, 1);
    plan.workspace = static_cast<decltype(number)*>(workspace);
    if (p.o.data != nullptr) return launch_forward<true>(p, plan, queue);
    plan.checkpoints.segment = INT64_MAX;
    launch_forward<false>(p, plan, queue);
  });
}

namespace {

// A step reads each tile of a state and updates it where it lies. z is part of no tile: where there are several, it is
// kept until all have read it.
template <class T>
struct StepMemory {
  T *workspace, *z;
  size_t used;

  StepMemory(const Problem& p, const ForwardPlan<T>& plan, void* base) {
    Arena arena(base);
    workspace = arena.take<T>(plan.room.workspace(plan.blocks(p)));
    z = p.attention_norm && plan.tiles > 1 ? arena.take<T>(p.N * p.H * p.K) : nullptr;
    used = arena.used();
  }
};

}  // namespace

size_t step_workspace(const Problem& p) {
  if (fits_registers(p)) return 0;
  return with_number(p, [&](auto number) {
    return StepMemory<decltype(number)>(p, ForwardPlan<decltype(number)>(p, nullptr, 1), nullptr).used;
  });
}

void step(const Problem& p, void* workspace, Queue& queue) {
  if (fits_registers(p)) return step_in_registers(p, queue);
  with_number(p, [&](auto number) {
    using T = decltype(number);
    ForwardPlan<T> plan(p, nullptr, 1);
    const StepMemory<T> memory(p, plan, workspace);
    plan.workspace = memory.workspace;
    plan.z = memory.z;
    launch_forward<true>(p, plan, queue);
    if (plan.z != nullptr) queue.run("put_z", put_z<T>, {p.N * p.H}, threads(p), 0, p, static_cast<const T*>(plan.z));
  });
}

}  // namespace fwp::cuda::recurrent
