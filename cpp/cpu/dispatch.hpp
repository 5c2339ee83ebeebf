// The CPU back end as cpp/core sees it: runs problems at the chosen instruction set level. It takes no memory but the
// thread pool's own, once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scan/backend.hpp"

namespace fwp::cpu {

const Backend& backend();

// Instruction set levels built and present, best last, ending with nullptr.
const char* const* available_isas();
const char* isa();               // nullptr: FWP_ISA names a level that is unknown or absent
int level();                     // index of isa(), for Problem::level
bool use_isa(const char* name);  // false: unknown or absent
uint64_t isa_calls(const char* name);
int block_size();
// Fused multiply-adds of one thread at the current level, best rate seen within about `seconds`, in flop/s.
double fma_peak(DType dtype, double seconds);

void set_num_threads(int threads);
int get_num_threads();

}  // namespace fwp::cpu
