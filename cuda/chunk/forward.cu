#include "../flags.hpp"
#include "chunk.hpp"
#include "scan.cuh"
#include "windows.cuh"

namespace fwp::cuda::chunk {

bool serves(const Problem& p) {
  return (p.dtype == DType::f16 || p.dtype == DType::bf16) && !p.attention_norm && !p.step && p.T > 0 && p.K > 0 &&
         p.K <= kMostKeys && p.V > 0;
}

size_t forward_workspace(const Problem& p, int64_t window) {
  Arena arena(nullptr);
  const int64_t slots = slots_of_axis(p), count = slots_of_scan(p, window);
  Prepared::take(arena, p, {0, count});
  Carried(arena, p, (slots + count - 1) / count);
  return arena.used();
}

void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue, int64_t window) {
  Arena arena(workspace);
  const int64_t slots = slots_of_axis(p), count = slots_of_scan(p, window), windows = (slots + count - 1) / count;
  Scan x{p, {0, count}, Prepared::take(arena, p, {0, count}), left};
  const Carried carried(arena, p, windows);
  clear_flags(p, left, queue);
  for (int64_t i = 0; i < windows; ++i) {
    x.window.begin = i * count;
    x.before = carried.before(i);
    x.after = carried.after(i);
    prepare(p, x.window, x.prepared, left, queue);
    p.o.data != nullptr ? run_scan<true>(x, queue) : run_states_scan(x, queue);
  }
}

size_t forward_workspace(const Problem& p) { return forward_workspace(p, 0); }
void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue) { forward(p, workspace, left, queue, 0); }

}  // namespace fwp::cuda::chunk
