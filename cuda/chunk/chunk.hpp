// The chunk form on tensor cores: 64 tokens at a time by products of float16 operands with float32 sums and states.
#pragma once

#include "../../cpp/scan/problem.hpp"
#include "../launch.hpp"

namespace fwp::cuda::chunk {

// Whether this form takes the problem; a function of its shapes, dtypes and options alone. Features are a pass before.
bool serves(const Problem& p);

// The heads [N][H] that this form gave up, with data that are not finite or out of the range of its operands, are not 0
// in `left` afterwards, and nothing of their outputs counts: the recurrent form does them again.
// Without p.o only the states are computed.
size_t forward_workspace(const Problem& p);
void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue);
// window: chunks of time that are in memory at once; 0: as many as fit. No bit depends on it.
size_t forward_workspace(const Problem& p, int64_t window);
void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue, int64_t window);
size_t backward_workspace(const Problem& p, int64_t window = 0);
void backward(const Problem& p, void* workspace, int32_t* left, Queue& queue, int64_t window = 0);
// Of the gradients dh0 alone: no state is looked at.
size_t adjoint_workspace(const Problem& p);
void adjoint(const Problem& p, void* workspace, int32_t* left, Queue& queue);

}  // namespace fwp::cuda::chunk
