// The recurrent form: fused multiply-adds on a state in shared memory, a few tokens at a time. It serves every dtype,
// size, option and datum; features are a pass before it (features/features.hpp).
#pragma once

#include "../../cpp/scan/problem.hpp"
#include "../launch.hpp"

namespace fwp::cuda::recurrent {

// p.features are not looked at: rows of q and k are keys of size p.K, of p.dtype or of its accumulation type
// (p.q.dtype, p.k.dtype), and so are those of dq and dk. only: [N][H], the heads to do are those where it is not 0;
// nullptr: all. Without p.o only the states are computed.
size_t forward_workspace(const Problem& p);
void forward(const Problem& p, void* workspace, const int32_t* only, Queue& queue);
size_t backward_workspace(const Problem& p);
void backward(const Problem& p, void* workspace, const int32_t* only, Queue& queue);

// Decoding: a scan whose states, h0 and hT, are the same, those of p.state_indices where that is given.
size_t step_workspace(const Problem& p);
void step(const Problem& p, void* workspace, Queue& queue);

// Probes of every token and head, problem.o.
void diagnose(const Problem& p, Queue& queue);

}  // namespace fwp::cuda::recurrent
