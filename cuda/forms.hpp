// A scan in the form that serves it, and what that gave up again in the recurrent form. Features are a pass before it.
#pragma once

#include "../cpp/scan/problem.hpp"
#include "launch.hpp"

namespace fwp::cuda::forms {

// Without p.o only the states are computed.
size_t forward_workspace(const Problem& p);
void forward(const Problem& p, void* workspace, Queue& queue);
size_t backward_workspace(const Problem& p);
void backward(const Problem& p, void* workspace, Queue& queue);
// Of the gradients dh0 alone.
size_t adjoint_workspace(const Problem& p);
void adjoint(const Problem& p, void* workspace, Queue& queue);

}  // namespace fwp::cuda::forms
