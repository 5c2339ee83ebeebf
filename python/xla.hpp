// The functions of fwp.h as XLA's custom calls.
#pragma once

#include <cstddef>

#include "xla_ffi.hpp"

namespace fwp::xla {

struct Target {
  const char* name;
  Handler *cpu, *cuda;
};

const Target* targets();
size_t target_count();

}  // namespace fwp::xla
