// The kernels of each instruction set level that is built and that this machine has. Which level runs is stated in
// dispatch.hpp.
#pragma once

#include "kernels.hpp"

namespace fwp::cpu {

const Kernels& kernels(int level);
// The same, and counts a call at this level.
const Kernels& count_call(int level);

}  // namespace fwp::cpu
