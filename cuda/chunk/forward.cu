#include "chunk.hpp"
#include "scan.cuh"

namespace fwp::cuda::chunk {

bool serves(const Problem& p) {
  constexpr int64_t kFewTokens = 32;  // below, most of a chunk would be padding
  return (p.dtype == DType::f16 || p.dtype == DType::bf16) && p.decay != Decay::channel && !p.attention_norm &&
         !p.step && p.T >= kFewTokens && p.K > 0 && p.K <= kMostKeys && p.V > 0;
}

size_t forward_workspace(const Problem& p) {
  Arena arena(nullptr);
  Prepared::take(arena, p, all_slots(p));
  return arena.bytes();
}

void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue) {
  Arena arena(workspace);
  const Window window = all_slots(p);
  const Scan x{p, window, Prepared::take(arena, p, window), left};
  clear_left(p, left, queue);
  prepare(p, window, x.prepared, left, queue);
  p.o.data != nullptr ? run_scan<true>(x, queue) : run_states_scan(x, queue);
}

}  // namespace fwp::cuda::chunk
