// What the kernels of the backward have in common.
#pragma once

#include "scan.cuh"

namespace fwp::cuda::chunk {

// Gradients whose rows several heads or value tiles have a part of: theirs, by place [tiles][64][size], to be added up.
// Otherwise nullptr.
struct Parts {
  float* numbers = nullptr;
  int64_t tiles = 1, size = 1;

  static Parts take(Arena& arena, const Rows& rows, int64_t places, int64_t tiles, int64_t size) {
    if (rows.data == nullptr || (rows.group == 1 && tiles == 1)) return {};
    return {arena.take<float>(places * tiles * kChunk * size), tiles, size};
  }
  // Where columns [begin, end) of a chunk and head go; data == nullptr: nowhere.
  FWP_DEVICE HeadRows rows(const Rows& sums, const Place& c, int64_t tile, int64_t begin, int64_t end) const {
    if (sums.data == nullptr) return {};
    if (numbers == nullptr) return HeadRows::of(sums, c.s, c.h, begin, end).from(c.t0, c.tokens());
    float* const to = numbers + (c.index * tiles + tile) * kChunk * size + begin;
    return {reinterpret_cast<char*>(to), size, c.tokens(), static_cast<int>(end - begin), DType::f32, size % 4 == 0};
  }
  // From where a sequence's first chunk goes, where another one does.
  FWP_DEVICE HeadRows from(const HeadRows& first, const Problem& p, int chunk, int tokens) const {
    if (numbers == nullptr) return first.from(int64_t{chunk} * kChunk, tokens);
    HeadRows to = first;
    to.data += int64_t{chunk} * p.H * tiles * kChunk * size * 4;
    to.count = tokens;
    return to;
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

}  // namespace fwp::cuda::chunk
