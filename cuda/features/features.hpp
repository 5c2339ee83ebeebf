// Feature maps and normalisations of rows: a pass over q or k before the scan, and over their gradients after it.
#pragma once

#include "../../cpp/scan/problem.hpp"
#include "../launch.hpp"

namespace fwp::cuda::features {

// rows [B,T,heads,f.inputs] of x into y [B,T,heads,f.outputs]; a row of y has its own dtype, that of x or its
// accumulation type.
struct Shape {
  int64_t B, T, heads;
};
void forward(const Features& f, const Shape& shape, const Rows& x, const Rows& y, void* workspace, Queue& queue);
// From dy [.., f.outputs] and x the gradient dx [.., f.inputs].
void backward(const Features& f, const Shape& shape, const Rows& dy, const Rows& x, const Rows& dx, void* workspace,
              Queue& queue);
// Bytes of their workspace: none where rows fit into shared memory. Backward takes more than forward.
size_t workspace(const Features& f, DType accumulation, int device, bool backward);

}  // namespace fwp::cuda::features
