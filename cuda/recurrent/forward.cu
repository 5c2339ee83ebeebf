#include "forward.cuh"
#include "recurrent.hpp"

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
    launch_forward<true>(p, plan, queue);
  });
}

}  // namespace fwp::cuda::recurrent
