// How the backward pass cuts time. Results do not depend on it; memory and speed do.
#pragma once

#include "recurrent.hpp"

namespace fwp::cuda::recurrent {

struct Cut {
  int64_t strips;   // parts of the sequences, taken side by side; the sequences of a part one after the other
  int64_t segment;  // tokens between checkpoints, a multiple of the block
  int64_t window;   // tokens of a strip whose partial sums there is room for at once
};
Cut cut(const Problem& p);

size_t backward_workspace(const Problem& p, const Cut& cut);
void backward(const Problem& p, const Cut& cut, void* workspace, const int32_t* only, Queue& queue);

}  // namespace fwp::cuda::recurrent
