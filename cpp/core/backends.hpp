// Which back end runs a problem: the CPU's, or that of CUDA, a library of its own that is opened when it is first
// needed.
#pragma once

#include "../scan/backend.hpp"

namespace fwp::core {

// Of the CUDA device with this number, or of the CPU, kHost. Fails if there is no CUDA back end; name: an array there.
const Backend& backend(const char* name, int device);
inline const Backend& backend(const Problem& problem) { return backend("q", problem.device); }

// State of the CUDA back end in words.
const char* cuda_state();
// Hands back idle memory of devices, if any was ever used.
void empty_device_caches();

}  // namespace fwp::core
