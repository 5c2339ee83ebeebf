// What the scans of the backward save for the gradients, in float16: of each chunk and head the state before it and
// the adjoint of the state after it, the errors and their adjoints.
#pragma once

#include "prep.cuh"

namespace fwp::cuda::chunk {

constexpr int kColumns = 16;  // of values, of a warp of the scans

// S^T [columns][channels] of a chunk, rows divided by their scales. Columns are V in whole sixteens.
struct SavedState {
  Half* numbers;
  float* up;
  int rows, stride;

  // By a warp, the first 16 columns, as left operands.
  template <int channels>
  FWP_DEVICE void store(const uint32_t (&a)[channels / 16][4], const Scale (&scale)[2]) const {
    FWP_UNROLL for (int k = 0; k < channels / 16; ++k) store_a(numbers, stride, 16 * k, a[k]);
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      if (lane() % 4 == 0) store_global(up + lane() / 4 + 8 * i, scale[i].up);
    }
  }
};
struct SavedStates {
  Half* numbers = nullptr;
  float* up = nullptr;
  int columns = 0, channels = 0;

  static SavedStates take(Arena& arena, int64_t places, int columns, int channels) {
    return {arena.take<Half>(places * columns * channels), arena.take<float>(places * columns), columns, channels};
  }
  // From a column on, `most` of them.
  FWP_DEVICE SavedState of(int64_t place, int64_t column, int most) const {
    const int64_t row = place * columns + column, left = columns - column;
    return {numbers + row * channels, up + row, left < most ? static_cast<int>(left) : most, channels};
  }
};

// Rows [64][columns] of a chunk, each sixteen columns divided by a scale.
struct SavedRows {
  Half* numbers = nullptr;
  float* scales = nullptr;
  int columns = 0;

  static SavedRows take(Arena& arena, int64_t places, int columns) {
    return {arena.take<Half>(places * kChunk * columns), arena.take<float>(places * (columns / kColumns)), columns};
  }
  // From a column on.
  FWP_DEVICE HeadRows rows(int64_t place, int64_t column) const {
    return {reinterpret_cast<char*>(numbers + place * kChunk * columns + column),
            columns,
            kChunk,
            static_cast<int>(columns - column),
            DType::f16,
            1};
  }
  FWP_DEVICE const float* up(int64_t place, int64_t column) const {
    return scales + (place * columns + column) / kColumns;
  }

  // By a warp, its 16 columns from `column` on, as X^T.
  FWP_DEVICE void store(int64_t place, int64_t column, const float (&x)[kChunk / 8][4]) const {
    uint32_t most = 0;
    FWP_UNROLL for (int i = 0; i < kChunk / 2; ++i) most = larger(most, magnitude(x[i / 4][i % 4]));
    const Scale scale = scale_for(largest<kWarpSize>(most));
    if (lane() == 0) store_global(scales + (place * columns + column) / kColumns, scale.up);
    FWP_UNROLL for (int n = 0; n < kChunk / 8; ++n) {
      float y[4];
      FWP_UNROLL for (int r = 0; r < 4; ++r) y[r] = x[n][r] * scale.down;
      store_turned_halves(rows(place, column), 8 * n, y);
    }
  }
};

}  // namespace fwp::cuda::chunk
