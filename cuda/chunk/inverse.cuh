// The inverse T' = (I + L)^-1 of a chunk, L = M diag(beta) strictly lower, by four warps in shared memory.
#pragma once

#include "tile.cuh"

namespace fwp::cuda::chunk {

constexpr int kPrepThreads = 128;

// A square [64][64] of float32 in shared memory without bank conflicts for fragments of either operand.
FWP_DEVICE int square_at(int row, int column) { return row * kChunk + (column ^ (row % 4 * 8 + row / 4 % 2 * 4)); }

// d[16][8N] += A[16][16] B[16][8N] of blocks of squares, near float32: each operand as a sum of two numbers of tf32.
template <int N>
FWP_DEVICE void multiply_blocks(float (*d)[4], const float* square, int a_row, int a_column, int b_row, int b_column) {
  const int g = lane() / 4, t = lane() % 4;
  const auto split = [&](int row, int column, uint32_t& high, uint32_t& low) {
    const float x = load_shared(square + square_at(row, column));
    high = to_tf32(x);
    low = to_tf32(x - float_of(high));
  };
  FWP_UNROLL for (int k = 0; k < 16; k += 8) {
    uint32_t a[4], a_low[4];
    FWP_UNROLL for (int r = 0; r < 4; ++r)
        split(a_row + g + 8 * (r % 2), a_column + k + t + 4 * (r / 2), a[r], a_low[r]);
    FWP_UNROLL for (int n = 0; n < N; ++n) {
      uint32_t b[2], b_low[2];
      FWP_UNROLL for (int r = 0; r < 2; ++r) split(b_row + k + t + 4 * r, b_column + 8 * n + g, b[r], b_low[r]);
      mma_tf32(d[n], a_low, b);
      mma_tf32(d[n], a, b_low);
      mma_tf32(d[n], a, b);
    }
  }
}

template <int N>
FWP_DEVICE void store_block(float* square, int row, int column, const float (*d)[4], float sign) {
  FWP_UNROLL for (int n = 0; n < N; ++n) {
    FWP_UNROLL for (int i = 0; i < 2; ++i) {
      float* const to = square + square_at(row + lane() / 4 + 8 * i, column + 8 * n + 2 * (lane() % 4));
      store_shared(reinterpret_cast<Two*>(to), Two{{bits_of(sign * d[n][2 * i]), bits_of(sign * d[n][2 * i + 1])}});
    }
  }
}

// By a warp: L becomes (I + L)^-1 in a diagonal block of 16, L strictly lower. A lane has a column, by substitution.
FWP_DEVICE void invert_diagonal(float* square, int begin) {
  const int column = lane() % 16;
  float x[16];
  FWP_UNROLL for (int i = 0; i < 16; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
    FWP_UNROLL for (int j = 0; j < i; j += 4) {
      const Quad four = load_shared(reinterpret_cast<const Quad*>(square + square_at(begin + i, begin + j)));
      FWP_UNROLL for (int l = 0; l < 4; ++l) if (j + l < i) x[i] -= float_of(four.x[l]) * x[j + l];
    }
  }
  sync_warp();
  FWP_UNROLL for (int i = 0; i < 16; ++i) {
    if (lane() < 16) store_shared(square + square_at(begin + i, begin + column), x[i]);
  }
}

// By four warps: L becomes (I + L)^-1 below its diagonal blocks, that of a half by X21 = -X22 (L21 X11). Never by a
// Neumann series: its terms grow where the inverse is small, as for keys that are much alike.
FWP_DEVICE void invert(float* square) {
  invert_diagonal(square, 16 * warp());
  sync_block();
  {  // two halves of 32; a warp has 8 columns
    const int begin = 32 * (warp() / 2), column = begin + 8 * (warp() % 2);
    float y[1][4] = {}, x[1][4] = {};
    multiply_blocks<1>(y, square, begin + 16, begin, begin, column);
    sync_block();
    store_block<1>(square, begin + 16, column, y, 1);
    sync_block();
    multiply_blocks<1>(x, square, begin + 16, begin + 16, begin + 16, column);
    sync_block();
    store_block<1>(square, begin + 16, column, x, -1);
    sync_block();
  }
  // the whole; a warp has 16 rows and columns
  const int i = warp() / 2, j = warp() % 2, row = 32 + 16 * i, column = 16 * j;
  float y[2][4] = {}, x[2][4] = {};
  for (int k = j; k < 2; ++k) multiply_blocks<2>(y, square, row, 16 * k, 16 * k, column);
  sync_block();
  store_block<2>(square, row, column, y, 1);
  sync_block();
  for (int k = 0; k <= i; ++k) multiply_blocks<2>(x, square, row, 32 + 16 * k, 32 + 16 * k, column);
  sync_block();
  store_block<2>(square, row, column, x, -1);
  sync_block();
}

// Rows of T' divided by their scales, of a square that `invert` has left, to global memory.
FWP_DEVICE void store_inverse(const float* square, Half* T, float* T_up) {
  constexpr int lanes = kChunk / 4, step = kPrepThreads / lanes;  // four numbers of a row for each lane
  const int j = thread_index() % lanes * 4;
  FWP_UNROLL for (int first = 0; first < kChunk; first += step) {
    const int i = first + thread_index() / lanes;
    const Quad four = load_shared(reinterpret_cast<const Quad*>(square + square_at(i, j)));
    float x[4];
    uint32_t most = 0;
    FWP_UNROLL for (int l = 0; l < 4; ++l) {
      x[l] = j + l <= i ? float_of(four.x[l]) : 0.0f;
      most = larger(most, magnitude(x[l]));
    }
    const Scale scale = scale_for(largest<lanes>(most));
    const Two halves{
        {pack_half(x[0] * scale.down, x[1] * scale.down), pack_half(x[2] * scale.down, x[3] * scale.down)}};
    store_global(reinterpret_cast<Two*>(T + i * kChunk + j), halves);
    if (j == 0) store_global(T_up + i, scale.up);
  }
}

}  // namespace fwp::cuda::chunk
