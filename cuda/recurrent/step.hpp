// Decoding with states in registers, each of them read once and written once.
#pragma once

#include "../../cpp/scan/problem.hpp"
#include "../launch.hpp"

namespace fwp::cuda::recurrent {

// Whether a thread's channels fit into its registers.
bool fits_registers(const Problem& p);
void step_in_registers(const Problem& p, Queue& queue);

}  // namespace fwp::cuda::recurrent
