// Flags [N][H] of heads that a form gives up while it computes; another form does them again.
#pragma once

#include "../cpp/scan/problem.hpp"
#include "launch.hpp"

namespace fwp::cuda {

void clear_flags(const Problem& p, int32_t* flags, Queue& queue);

}  // namespace fwp::cuda
