#include "chunk.hpp"
#include "scan.cuh"

namespace fwp::cuda::chunk {

bool serves(const Problem& p) {
  constexpr int64_t kFewTokens = 32;  // below, most of a chunk would be padding
  return (p.dtype == DType::f16 || p.dtype == DType::bf16) && p.decay != Decay::channel && !p.attention_norm &&
         !p.step && p.T >= kFewTokens && p.K > 0 && p.K <= kMostKeys && p.V > 0;
}

size_t forward_workspace(const Problem& p) {
  char* nowhere = nullptr;
  size_t bytes = 0;
  place(p, &nowhere, &bytes);
  return bytes;
}

void forward(const Problem& p, void* workspace, int32_t* left, Queue& queue) {
  auto* at = static_cast<char*>(workspace);
  size_t bytes = 0;
  Scan x{p, place(p, &at, &bytes), left, p.h0, p.hT, 0, (p.T + kChunk - 1) / kChunk};
  prepare(p, x.prepared, left, queue);
  run_scan<true>(x, queue);
}

}  // namespace fwp::cuda::chunk
