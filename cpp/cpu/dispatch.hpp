// The CPU back end as cpp/core sees it: run a validated problem at the chosen instruction set level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scan/problem.hpp"

namespace fwp::cpu {

// Bytes of 64-byte aligned workspace that forward (backward) takes for this problem.
size_t forward_workspace(const Problem& problem);
size_t backward_workspace(const Problem& problem);
// Elements, in the accumulation type, of Problem::checkpoints.
int64_t checkpoint_elements(const Problem& problem);

// Return false if the call was interrupted. They throw nothing and take no memory but the thread pool's own, once.
bool forward(const Problem& problem, void* workspace);
bool backward(const Problem& problem, void* workspace);

// The probes of every token and head, in problem.o [B,T,H,kProbes].
size_t diagnose_workspace(const Problem& problem);
bool diagnose(const Problem& problem, void* workspace);

// A feature map by itself: rows problem.q [T][features.inputs] into problem.o [T][K], or, where problem.d_o is given,
// that into problem.dq.
size_t map_workspace(const Problem& problem);
void map_rows(const Problem& problem, void* workspace);

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
