// The token-parallel part of the chunk form: for each chunk and head the decays G and, for the delta rule, the inverse
//
//   T' = (I + M diag(beta))^-1      M_ij = k_i . (k_j decayed from j to i), j < i
//
// with which the errors of a chunk follow from what its first state leaves unpredicted, E = T' R (scan.cuh). M stands
// where diag(beta) M has stood since Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
// Sequence Length": so E itself comes out, beta = 0 or not, and the gradient through the inverse is one product.
#pragma once

#include "../launch.hpp"
#include "tile.cuh"

namespace fwp::cuda::chunk {

// Each chunk of each sequence has a slot. They are counted without a table of the sequences before: some stay empty.
inline int64_t slot_count(const Problem& p) {
  return p.cu_seqlens != nullptr ? p.T / kChunk + p.N : p.N * ((p.T + kChunk - 1) / kChunk);
}
FWP_DEVICE int64_t first_slot(const Problem& p, int64_t n) {
  return p.cu_seqlens != nullptr ? load_global(p.cu_seqlens + n) / kChunk + n : n * ((p.T + kChunk - 1) / kChunk);
}
// The sequence that a slot belongs to: the last one that begins there or before.
FWP_DEVICE int64_t sequence_of_slot(const Problem& p, int64_t slot) {
  if (p.cu_seqlens == nullptr) return slot / ((p.T + kChunk - 1) / kChunk);
  int64_t low = 0, high = p.N;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_slot(p, middle) <= slot ? low : high) = middle;
  }
  return low;
}

// What is left for the scans, for [slot][head].
struct Prepared {
  double* G;    // [64]      log2 of the decay from before the chunk to after the token, with a decay
  Half* T;      // [64][64]  T', rows divided by their scales, for the delta rule
  float* T_up;  // [64]      the scales
};
// Places it in memory at *workspace, or counts bytes where that is null.
inline Prepared place(const Problem& p, char** workspace, size_t* bytes) {
  const size_t heads = static_cast<size_t>(slot_count(p) * p.H), chunk = kChunk;
  const auto take = [&](bool needed, size_t size) -> void* {
    char* const at = *workspace;
    size = needed ? (heads * size + 63) / 64 * 64 : 0;
    *bytes += size;
    if (at != nullptr) *workspace += size;
    return needed ? at : nullptr;
  };
  Prepared x;
  x.G = static_cast<double*>(take(p.decay != Decay::none, chunk * sizeof(double)));
  x.T = static_cast<Half*>(take(p.rule == Rule::delta, chunk * chunk * sizeof(Half)));
  x.T_up = static_cast<float*>(take(p.rule == Rule::delta, chunk * sizeof(float)));
  return x;
}

// Clears left [N][H], and then sets it for heads that this form is not for: keys or gates that are not finite, growth.
void prepare(const Problem& p, const Prepared& out, int32_t* left, Queue& queue);

// Calls f with the number of columns of tiles that hold keys.
template <class F>
void with_size(int64_t K, const F& f) {
  if (K <= 32) return f(std::integral_constant<int, 32>());
  if (K <= 64) return f(std::integral_constant<int, 64>());
  f(std::integral_constant<int, 128>());
}
constexpr int64_t kMostKeys = 128;

}  // namespace fwp::cuda::chunk
