// What the scans of the backward save for the gradients, in float16: of each chunk and head the state before it and
// the adjoint of the state after it, the errors and their adjoints.
#pragma once

#include "prep.cuh"

namespace fwp::cuda::chunk {

// S^T [columns][channels] of a chunk, rows divided by their scales. Columns are V in whole sixteens.
struct SavedState {
  Half* numbers;
  float* up;
  int rows, stride;

  // By a warp, its 16 columns from `column` on, as left operands.
  template <int channels>
  FWP_DEVICE void store(int column, const uint32_t (&a)[channels / 16][4], const Scale (&scale)[2]) const {
    FWP_UNROLL for (int k = 0; k < channels / 16; ++k) store_a(numbers + column * stride, stride, 16 * k, a[k]);
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      if (lane() % 4 == 0) store_global(up + column + lane() / 4 + 8 * i, scale[i].up);
    }
  }
};
struct SavedStates {
  Half* numbers;
  float* up;
  int columns, channels;
  FWP_DEVICE SavedState of(int64_t place) const {
    return {numbers + place * columns * channels, up + place * columns, columns, channels};
  }
};

// Rows [64][columns] of a chunk, each sixteen columns divided by a scale.
struct SavedRows {
  Half* numbers;
  float* scales;
  int columns;
  FWP_DEVICE ChunkRows rows(int64_t place) const {
    return {numbers + place * kChunk * columns, columns, kChunk, columns, DType::f16, true};
  }
  FWP_DEVICE const float* up(int64_t place) const { return scales + place * (columns / 16); }

  // By a warp, its 16 columns from `column` on, as X^T.
  FWP_DEVICE void store(int64_t place, int column, const float (&x)[kChunk / 8][4]) const {
    uint32_t most = 0;
    FWP_UNROLL for (int i = 0; i < kChunk / 2; ++i) most = larger(most, magnitude(x[i / 4][i % 4]));
    const Scale scale = scale_for(largest<kWarpSize>(most));
    if (lane() == 0) store_global(scales + place * (columns / 16) + column / 16, scale.up);
    ChunkRows to = rows(place);
    to.data = numbers + place * kChunk * columns + column;
    to.columns = columns - column;
    FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
      float y[4];
      FWP_UNROLL for (int r = 0; r < 4; ++r) y[r] = x[n][r] * scale.down;
      store_turned(to, 8 * n, y);
    }
  }
};

// The backward of a window of time.
struct Backward {
  Problem p;
  Window window;
  Prepared prepared;
  int32_t* left;  // [N][H]
  SavedStates S, D;
  SavedRows E, dE;
  float *dq, *dk, *dv;  // [place][64][K] or [V], where heads share rows: each head's part. Else nullptr
  States* carried;

  // Where a head's part of a gradient goes.
  FWP_DEVICE ChunkRows result(const Rows& rows, float* parts, const Place& c, int64_t columns, int64_t column = 0) const {
    if (rows.data == nullptr || parts == nullptr) return ChunkRows::of(rows, c.s, c.t0, c.h, column, columns);
    ChunkRows to = ChunkRows::of(rows, c.s, c.t0, c.h, column, columns);
    return to;
  }
};

}  // namespace fwp::cuda::chunk
