// What the kernels of the backward have in common.
#pragma once

#include "scan.cuh"

namespace fwp::cuda::chunk {

// Gradients whose rows several heads or value tiles have a part of, to be added up: each part by itself, in
// [axis][H][tiles][tokens of the window][size]. Without numbers there is one part only, which is the gradient.
struct Parts {
  float* numbers = nullptr;
  int64_t tiles = 1, size = 1;

  // Of an input's gradient, `sums`. Memory goes by the input, so that a query for it needs no gradients.
  static Parts take(Arena& arena, const Problem& p, const Window& w, const Rows& input, const Rows& sums, int64_t tiles,
                    int64_t size) {
    if (input.group == 1 && tiles == 1) return {};
    const Parts parts{arena.take<float>(places(p, w) * tiles * kChunk * size), tiles, size};
    return sums.data != nullptr ? parts : Parts{};
  }
  // The row of the first token of the chunk in a slot.
  FWP_DEVICE int64_t row(const Problem& p, const Window& w, const Sequence& s, int64_t slot, int64_t h,
                         int64_t tile) const {
    const int64_t axis = p.cu_seqlens != nullptr ? 0 : s.b;
    return (((axis * p.H + h) * tiles + tile) * w.count + slot - w.begin) * kChunk;
  }
  // Where a sequence, the first chunk of which has this slot, has its columns [begin, end) of a head, and in what.
  FWP_DEVICE Rows rows(const Rows& sums) const {
    return numbers == nullptr ? sums : Rows{numbers, DType::f32, 0, size, 0, 1};
  }
  FWP_DEVICE Place place(const Rows& sums, const Problem& p, const Window& w, const Sequence& s, int64_t slot,
                         int64_t h, int64_t tile, int64_t begin, int64_t end) const {
    if (numbers == nullptr) return Place::of(sums, s, h, begin, end);
    return {(row(p, w, s, slot, h, tile) * size + begin) * 4, static_cast<int>(end - begin), size % 4 == 0};
  }
};

// The backward of a window of time. Adjoints of states go on outside of it as states do (scan.cuh).
struct Backward {
  Problem p;
  Window window{};
  Prepared prepared;
  int32_t* left = nullptr;  // [N][H]
  States before, after;
  SavedStates S, D;  // the state before each chunk, the adjoint of the state after it
  SavedRows E, dE;   // where the rule predicts, the errors and their adjoints
  Parts dq, dk, dv, dbeta, dg;
};

// Value columns of a block of the gradients.
inline int64_t value_tile(const Problem& p) { return p.V <= 64 ? 64 : 128; }
inline int64_t value_tiles(const Problem& p) { return (p.V + value_tile(p) - 1) / value_tile(p); }

// Back through a window; what all its chunks give. Files of their own, as run_states_scan: compilers take long.
void run_reverse_scan(const Backward& x, Queue& queue);
void run_gradients(const Backward& x, Queue& queue);

}  // namespace fwp::cuda::chunk
