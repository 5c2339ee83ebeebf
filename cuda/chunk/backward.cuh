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

// With decays of channels, all products over value columns, by place and value tile.
struct Products {
  float *pairs = nullptr, *states = nullptr, *sums = nullptr;
  int64_t tiles = 1, rules = 1;  // 2: where the rule predicts
  int channels = 0;

  struct At {
    float *z, *y;                       // [64][64]  scale <dO_i, E_j>, -<dE_i, E_j>, j <= i
    float *reads_q, *writes, *reads_k;  // [64][channels]  scale S0 dO_i, D E_i, -S0 dE_i
    float* carried;                     // [channels]  <S0, D>
  };

  static Products take(Arena& arena, const Problem& p, int64_t places, int64_t tiles, int channels) {
    const int64_t n = places * tiles, rules = p.rule == Rule::delta ? 2 : 1;
    return {arena.take<float>(n * rules * kChunk * kChunk),
            arena.take<float>(n * (1 + rules) * kChunk * channels),
            arena.take<float>(n * channels),
            tiles,
            rules,
            channels};
  }
  FWP_DEVICE At of(int64_t place, int64_t tile) const {
    const int64_t n = place * tiles + tile, rows = int64_t{kChunk} * channels;
    float *const pair = pairs + n * rules * kChunk * kChunk, *const state = states + n * (1 + rules) * rows;
    return {pair, pair + kChunk * kChunk, state, state + rows, state + 2 * rows, sums + n * channels};
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
  Products products;
};

// Value columns of a block of the gradients.
inline int64_t value_tile(const Problem& p) { return p.V <= 64 ? 64 : 128; }
inline int64_t value_tiles(const Problem& p) { return (p.V + value_tile(p) - 1) / value_tile(p); }

// Back through a window; what all its chunks give. Files of their own, as run_states_scan: compilers take long.
void run_reverse_scan(const Backward& x, Queue& queue);
void run_gradients(const Backward& x, Queue& queue);
void run_channel_gradients(const Backward& x, Queue& queue);

}  // namespace fwp::cuda::chunk
