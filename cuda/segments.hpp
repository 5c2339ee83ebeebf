// Long sequences of few heads, cut into segments that are scanned side by side. What a segment does to a state is
//
//   S after = A S before + b        D before = A^T D after + c        (D: the adjoint of S)
//
// b is its last state from a first one of zeros, and c the adjoint of its first state where that of its last is zero.
// A is the product of its decays (linear), or what it makes of the identity where there are no values (delta). A short
// pass through the segments of a sequence then gives the states and adjoints between them, and each is a sequence of
// its own for the forms. Sequences whose states between segments are not finite are done again as a whole.
#pragma once

#include "../cpp/scan/problem.hpp"
#include "launch.hpp"

namespace fwp::cuda::segments {

// Tokens of a segment; 0: sequences stay whole. A function of shapes, dtypes and options alone, of no device.
int64_t length(const Problem& p);

// Features are a pass before it. length: 0, or a multiple of 64 for whole chunks; not for what stays whole anyway.
size_t forward_workspace(const Problem& p, int64_t length);
void forward(const Problem& p, int64_t length, void* workspace, Queue& queue);
size_t backward_workspace(const Problem& p, int64_t length);
void backward(const Problem& p, int64_t length, void* workspace, Queue& queue);

}  // namespace fwp::cuda::segments
