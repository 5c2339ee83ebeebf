// Chunks of 64 tokens as tiles of float16 numbers in shared memory, and their products on tensor cores.
//
// A tile has D columns (16, 32, 64, 128 or 256) and any number of rows. Its pieces of 16 bytes are swizzled, so that
// load_matrices in both orientations and accesses of whole pieces meet no bank conflict: at<D>(row, column).
//
// Ranges. Float16 reaches from 2^-24 to 2^16, so numbers stand in a tile divided by a power of two, which is exact: the
// largest magnitude of whatever shares the Scale, a row or a column, then lies in [2^14, 2^15). What is 2^-29 of it or
// less loses digits, and is gone at 2^-40 of it. Where a Scale spans tokens, a head with such is given up
// (tokens_to_a); the digits left are all that a token of the future can change in the past, the one exception to
// causality in bits.
//
// Fragments. A warp multiplies a[16][16] b[16][8] into d[16][8]. Of lane l, with g = l / 4 and t = l % 4:
//   d[0..1]  row g,     columns 2t, 2t + 1           a[0] row g, columns 2t, 2t + 1      a[2] the same, columns + 8
//   d[2..3]  row g + 8, the same columns             a[1] row g + 8                      a[3]
// So two neighbours d, packed, are an a: a chain of products of which each is the left operand of the next needs no
// shared memory. The scans have value columns as rows and tokens, or channels, as columns of their fragments (they
// compute S^T, E^T, O^T), so that a warp goes through time with 16 value columns and never meets another.
#pragma once

#include <cmath>
#include <cstring>

#include "../rows.cuh"
#include "../rules.cuh"

namespace fwp::cuda::chunk {

#ifdef __CUDACC__
#define FWP_ROLLED _Pragma("unroll 1")
#else
#define FWP_ROLLED
#endif

constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16, kBlocks = kChunk / kBlock;

FWP_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
FWP_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

FWP_DEVICE int tokens_of_chunk(const Sequence& s, int64_t c) {
  const int64_t left = s.length - c * kChunk;
  return static_cast<int>(left < kChunk ? left : kChunk);
}

// --- Magnitudes and scales ---

// As bits, which compare as magnitudes do, and above which infinity and then NaN stand.
constexpr uint32_t kInfinite = 0x7f800000u;
FWP_DEVICE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }
FWP_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The largest in neighbourhoods of `lanes` lanes: 4, the lanes of a row of fragments, to 32.
template <int lanes>
FWP_DEVICE uint32_t largest(uint32_t x) {
  FWP_UNROLL for (int mask = lanes / 2; mask > 0; mask /= 2) x = larger(x, shuffle_xor(x, mask));
  return x;
}

// The largest of the block, for all its threads; scratch: a number per warp. A barrier before the next use of scratch.
template <int threads>
FWP_DEVICE uint32_t largest_of_block(uint32_t x, uint32_t* scratch) {
  x = largest<kWarpSize>(x);
  if (lane() == 0) store_shared(scratch + warp(), x);
  sync_block();
  FWP_UNROLL for (int w = 0; w < threads / kWarpSize; ++w) x = larger(x, load_shared(scratch + w));
  return x;
}

// A power of two and its inverse: a number x stands in a tile as x * down, and is that times up.
struct Scale {
  float up, down;
};
// For numbers whose largest magnitude is this; 0 where all are 0.
FWP_DEVICE Scale scale_for(uint32_t largest_magnitude) {
  if (largest_magnitude == 0) return {0, 0};
  const uint32_t exponent = larger(largest_magnitude >> 23, 15);
  return {float_of((exponent - 14) << 23), float_of((268 - exponent) << 23)};
}

// --- Tiles ---

// Where a number stands; column: a multiple of 8 for whole pieces.
template <int D>
FWP_DEVICE int at(int row, int column) {
  constexpr int pieces = D / 8, rows_per_line = pieces < 8 ? 8 / pieces : 1, mask = pieces < 8 ? pieces - 1 : 7;
  return row * D + ((column / 8) ^ (row / rows_per_line & mask)) * 8 + column % 8;
}

// Where a head has its rows in an array, or some of their columns.
struct alignas(16) Place {
  int64_t offset;  // in bytes
  int columns;
  int wide;  // whether all rows begin at multiples of 16 bytes

  FWP_DEVICE static Place of(const Rows& rows, const Sequence& s, int64_t h, int64_t first_column, int64_t end_column) {
    const int64_t size = rows.dtype == DType::f32 ? 4 : 2;
    const int64_t offset = size * (row_at(rows, s, 0, h) + first_column);
    const bool wide =
        (reinterpret_cast<uintptr_t>(rows.data) + static_cast<uintptr_t>(offset)) % 16 == 0 && rows.t * size % 16 == 0;
    return {offset, static_cast<int>(end_column - first_column), wide};
  }
};

// Some tokens of them.
struct HeadRows {
  char* data;
  int64_t stride;  // in numbers
  int count, columns;
  DType dtype;
  int wide;

  FWP_DEVICE static HeadRows from(const Rows& rows, const Place& place, int64_t first_token, int count) {
    const int64_t size = rows.dtype == DType::f32 ? 4 : 2;
    char* const data = static_cast<char*>(rows.data) + (place.offset + first_token * rows.t * size);
    return {data, rows.t, count, place.columns, rows.dtype, place.wide};
  }
  // How many of `most` numbers from a column on are there.
  FWP_DEVICE int room(int column, int most) const {
    const int left = columns - column;
    return left < 0 ? 0 : left < most ? left : most;
  }
  template <class X>
  FWP_DEVICE X* at(int row, int column) const {
    return reinterpret_cast<X*>(data) + row * stride + column;
  }
};

// The pieces of a thread in a tile [rows][D] that the threads of a block, or of a warp (threads = 32), share: of one
// column, some rows apart.
template <int D, int rows, int threads>
struct Pieces {
  static constexpr int count = rows * D / 8 / threads, step = threads / (D / 8);
  static_assert(count * step == rows && step % 8 == 0, "pieces of every thread as far apart as the swizzle repeats");
  int row, column;  // of the first
  FWP_DEVICE static Pieces mine() {
    const int thread = fresh(thread_index() % threads);
    return {thread / (D / 8), thread % (D / 8) * 8};
  }
  FWP_DEVICE Half* in(Half* tile, int i) const { return tile + at<D>(row, column) + i * step * D; }
};

FWP_DEVICE float unpack(DType dtype, uint32_t two, int i) {
  return dtype == DType::f16 ? unpack_half(two, i) : unpack_bfloat(two, i);
}
FWP_DEVICE uint32_t pack(DType dtype, float lo, float hi) {
  return dtype == DType::f16 ? pack_half(lo, hi) : pack_bfloat(lo, hi);
}
struct alignas(8) Two {
  uint32_t x[2];
};

// Begins to copy the first 64 rows, of 16-bit numbers, into a tile [64][D] as they are; rows and columns that are not
// there become zeros. For each thread its pieces are there after commit_copies and wait_copies. Rows of float32 are
// left to scale_rows.
template <int D, int threads>
FWP_DEVICE void copy_rows(const HeadRows& x, Half* tile) {
  using Mine = Pieces<D, kChunk, threads>;
  const Mine mine = Mine::mine();
  if (x.dtype == DType::f32) return;
  const int room = x.room(mine.column, 8);
  if (x.wide) {
    FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
      const int row = mine.row + i * Mine::step, valid = row < x.count ? room : 0;
      copy_async<16>(mine.in(tile, i), valid > 0 ? x.at<Half>(row, mine.column) : x.at<Half>(0, 0), 2 * valid);
    }
    return;
  }
  FWP_ROLLED for (int i = 0; i < Mine::count; ++i) {
    const int row = mine.row + i * Mine::step, valid = row < x.count ? room : 0;
    Quad piece = {};
    FWP_UNROLL for (int j = 0; j < 8; ++j) if (j < valid) piece.x[j / 2] |=
        static_cast<uint32_t>(load_global(x.at<Half>(row, mine.column) + j).bits) << (16 * (j % 2));
    store_shared(reinterpret_cast<Quad*>(mine.in(tile, i)), piece);
  }
}

// One piece of a row into a tile, with the scale of its row, which D / 8 lanes have together. Returns the row's largest
// magnitude.
template <int D>
FWP_DEVICE uint32_t scale_piece(const float (&x)[8], Half* piece, float* row_scale, bool first) {
  uint32_t most = 0;
  FWP_UNROLL for (int j = 0; j < 8; ++j) most = larger(most, magnitude(x[j]));
  most = largest<D / 8>(most);
  const Scale scale = scale_for(most);
  Quad halves;
  FWP_UNROLL for (int j = 0; j < 4; ++j) halves.x[j] = pack_half(x[2 * j] * scale.down, x[2 * j + 1] * scale.down);
  store_shared(reinterpret_cast<Quad*>(piece), halves);
  if (first) store_shared(row_scale, scale.up);
  return most;
}

// Turns copied rows into float16 with a scale per row, in place, every thread its own pieces; up [64]: what the tile's
// rows are to be multiplied by. Returns the largest magnitude that this thread saw. A barrier before others read.
// columns_up: where float16 rows have a scale per 16 columns already, these.
template <int D, int threads>
FWP_DEVICE uint32_t scale_rows(const HeadRows& x, Half* tile, float* up, const float* columns_up = nullptr) {
  using Mine = Pieces<D, kChunk, threads>;
  const Mine mine = Mine::mine();
  uint32_t most = 0;
  if (x.dtype == DType::f32) {
    FWP_ROLLED for (int i = 0; i < Mine::count; ++i) {
      const int row = mine.row + i * Mine::step, valid = row < x.count ? x.room(mine.column, 8) : 0;
      float y[8] = {};
      if (x.wide && valid == 8) {
        FWP_UNROLL for (int j = 0; j < 8; j += 4) {
          const Quad four = load_global(reinterpret_cast<const Quad*>(x.at<float>(row, mine.column + j)));
          FWP_UNROLL for (int l = 0; l < 4; ++l) y[j + l] = float_of(four.x[l]);
        }
      } else {
        FWP_UNROLL for (int j = 0; j < 8; ++j) if (j < valid) y[j] = load_global(x.at<float>(row, mine.column) + j);
      }
      most = larger(most, scale_piece<D>(y, mine.in(tile, i), up + row, mine.column == 0));
    }
    return most;
  }
  const auto scale = [&](auto unpack_one) {
    FWP_UNROLL for (int i = 0; i < Mine::count; ++i) {
      const Quad piece = load_shared(reinterpret_cast<const Quad*>(mine.in(tile, i)));
      float y[8];
      FWP_UNROLL for (int j = 0; j < 8; ++j) y[j] = unpack_one(piece.x[j / 2], j % 2);
      const int row = mine.row + i * Mine::step;
      most = larger(most, scale_piece<D>(y, mine.in(tile, i), up + row, mine.column == 0));
    }
  };
  if (columns_up != nullptr) {
    const float column_up = mine.column < x.columns ? load_global(columns_up + mine.column / 16) : 0.0f;
    scale([column_up](uint32_t two, int i) { return unpack_half(two, i) * column_up; });
  } else if (x.dtype == DType::f16)
    scale([](uint32_t two, int i) { return unpack_half(two, i); });
  else
    scale([](uint32_t two, int i) { return unpack_bfloat(two, i); });
  return most;
}

// Begins to copy a dense tile [rows][D] of float16 numbers, 16-byte aligned.
template <int D, int rows, int threads>
FWP_DEVICE void copy_tile(const Half* from, Half* tile) {
  using Mine = Pieces<D, rows, threads>;
  const Mine mine = Mine::mine();
  FWP_UNROLL for (int i = 0; i < Mine::count; ++i)
      copy_async<16>(mine.in(tile, i), from + (mine.row + i * Mine::step) * D + mine.column);
}

// --- Fragments and products ---

// Where the lanes begin to load 16x16 numbers, in the order (0,0) (8,0) (0,8) (8,8) or (0,0) (0,8) (8,0) (8,8) of 8x8
// matrices; rows and columns in whole sixteens, rows of tiles of 16 columns in whole eights.
template <int D>
FWP_DEVICE const Half* down_first(const Half* tile, int row, int column) {
  return tile + (fresh(at<D>(lane() % 16, lane() / 16 * 8)) ^ column) + row * D;
}
template <int D>
FWP_DEVICE const Half* right_first(const Half* tile, int row, int column) {
  return tile + (fresh(at<D>(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2 * 8)) ^ column) + row * D;
}

// How an operand lies in its tile: the summed index runs along rows (A as [m][k], B as [n][k]) or down columns (A as
// [k][m], B as [k][n]).
enum class Sum { along, down };

// a = A[m..m+16)[k..k+16)
template <int D, Sum sum>
FWP_DEVICE void load_a(uint32_t (&a)[4], const Half* A, int m, int k) {
  if constexpr (sum == Sum::along)
    load_matrices(a, down_first<D>(A, m, k));
  else
    load_matrices_transposed(a, right_first<D>(A, k, m));
}

// d[N] += a B[k..k+16)[n..n+8N), N fragments side by side
template <int D, Sum sum, int N>
FWP_DEVICE void multiply(float (*d)[4], const uint32_t (&a)[4], const Half* B, int n, int k) {
  static_assert(N % 2 == 0, "B is loaded in pairs of tiles");
  FWP_UNROLL for (int i = 0; i < N; i += 2) {
    uint32_t b[4];
    if constexpr (sum == Sum::along)
      load_matrices(b, right_first<D>(B, n + 8 * i, k));
    else
      load_matrices_transposed(b, down_first<D>(B, k, n + 8 * i));
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    mma_f16(d[i], a, first);
    mma_f16(d[i + 1], a, second);
  }
}

// Two neighbours d as a left operand, rows g divided by scale[0], rows g + 8 by scale[1].
FWP_DEVICE void to_a(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4], const Scale (&scale)[2]) {
  a[0] = pack_half(left[0] * scale[0].down, left[1] * scale[0].down);
  a[1] = pack_half(left[2] * scale[1].down, left[3] * scale[1].down);
  a[2] = pack_half(right[0] * scale[0].down, right[1] * scale[0].down);
  a[3] = pack_half(right[2] * scale[1].down, right[3] * scale[1].down);
}

// The scales of the two rows, g and g + 8, that this lane has a part of. Returns the largest magnitude in them.
template <int N>
FWP_DEVICE uint32_t row_scales(Scale (&scale)[2], const float (&d)[N][4]) {
  uint32_t most[2] = {};
  FWP_UNROLL for (int n = 0; n < N; ++n) {
    FWP_UNROLL for (int r = 0; r < 4; ++r) most[r / 2] = larger(most[r / 2], magnitude(d[n][r]));
  }
  FWP_UNROLL for (int i = 0; i < 2; ++i) scale[i] = scale_for(most[i] = largest<4>(most[i]));
  return larger(most[0], most[1]);
}

// d[16][8N] as left operands, with a scale per row. Returns the largest magnitude in this lane's rows.
template <int N>
FWP_DEVICE uint32_t to_a(uint32_t (&a)[N / 2][4], Scale (&scale)[2], const float (&d)[N][4]) {
  const uint32_t most = row_scales(scale, d);
  FWP_UNROLL for (int k = 0; k < N / 2; ++k) to_a(a[k], d[2 * k], d[2 * k + 1], scale);
  return most;
}

// As to_a, for numbers of tokens (columns) that others do not make insignificant: a product with a triangle leaves them
// alone. Infinite where a token, by the two rows of a lane, is too small beside the largest to keep its digits.
template <int N>
FWP_DEVICE uint32_t tokens_to_a(uint32_t (&a)[N / 2][4], Scale (&scale)[2], const float (&d)[N][4]) {
  constexpr uint32_t kMostRange = 27u << 23;  // 2^27, as what is added to a float's bits: 12 bits are left
  uint32_t least = kInfinite;                 // of the tokens' bits less one, which are the largest for zeros
  FWP_UNROLL for (int n = 0; n < N; ++n) {
    FWP_UNROLL for (int t = 0; t < 2; ++t) {
      const uint32_t token = bits_of(fmaxf(fabsf(d[n][t]), fabsf(d[n][t + 2]))) - 1;
      least = token < least ? token : least;
    }
  }
  const uint32_t most = to_a(a, scale, d);
  return least + kMostRange < most ? kInfinite : most;
}

// d[16][8] into rows m.. and columns n.. of a tile, rows divided by their scale.
template <int D>
FWP_DEVICE void store_rows(Half* tile, int m, int n, const float (&d)[4], const Scale (&scale)[2]) {
  Half* const to = tile + (fresh(at<D>(lane() / 4, 2 * (lane() % 4))) ^ n) + m * D;
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const uint32_t two = pack_half(d[2 * i] * scale[i].down, d[2 * i + 1] * scale[i].down);
    store_shared(reinterpret_cast<uint32_t*>(to + 8 * i * D), two);
  }
}

// d[16][8] into rows m.. of an array, columns from n on: rounded once, what is not there left out.
FWP_DEVICE void store_fragment(const HeadRows& x, int m, int n, const float (&d)[4]) {
  const int column = n + 2 * (lane() % 4), room = x.room(column, 2);
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const int row = m + lane() / 4 + 8 * i;
    if (row >= x.count) continue;
    if (x.dtype == DType::f32) {
      float* const to = x.at<float>(row, column);
      if (x.wide && room == 2) {
        store_global(reinterpret_cast<Two*>(to), Two{{bits_of(d[2 * i]), bits_of(d[2 * i + 1])}});
      } else {
        FWP_UNROLL for (int j = 0; j < 2; ++j) if (j < room) store_global(to + j, d[2 * i + j]);
      }
      continue;
    }
    const uint32_t two = pack(x.dtype, d[2 * i], d[2 * i + 1]);
    Half* const to = x.at<Half>(row, column);
    if (x.wide && room == 2) {
      store_global(reinterpret_cast<uint32_t*>(to), two);
    } else {
      FWP_UNROLL for (int j = 0; j < 2; ++j) if (j < room)
          store_global(to + j, Half{static_cast<uint16_t>(two >> (16 * j))});
    }
  }
}

// a[16][16] into dense rows [16][stride] in global memory, from column k on; 16-byte aligned.
FWP_DEVICE void store_a(Half* rows, int stride, int k, const uint32_t (&a)[4]) {
  const bool odd = lane() % 2 == 1;  // neighbours exchange halves, so that a row's four lanes write 32 bytes together
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const uint32_t other = shuffle_xor(odd ? a[i] : a[i + 2], 1);
    Half* const to = rows + (lane() / 4 + 8 * i) * stride + k + lane() % 4 / 2 * 4 + (odd ? 8 : 0);
    store_global(reinterpret_cast<Two*>(to), odd ? Two{{other, a[i + 2]}} : Two{{a[i], other}});
  }
}

template <int N>
FWP_DEVICE void clear(float (&d)[N][4]) {
  FWP_UNROLL for (int n = 0; n < N; ++n) { FWP_UNROLL for (int r = 0; r < 4; ++r) d[n][r] = 0; }
}

// Two neighbouring numbers in shared memory.
FWP_DEVICE void load_two(float (&x)[2], const float* from) {
  const Two two = load_shared(reinterpret_cast<const Two*>(from));
  x[0] = float_of(two.x[0]);
  x[1] = float_of(two.x[1]);
}

// --- Value columns as rows of fragments ---

// d = X^T for 16 columns of N * 8 tokens from a row on, from a tile [tokens][16] of 16-bit numbers as copied.
template <int N>
FWP_DEVICE void load_turned(float (&d)[N][4], DType dtype, const Half* tile, int row = 0) {
  FWP_UNROLL for (int n = 0; n < N; n += 2) {
    uint32_t two[4];
    load_matrices_transposed(two, right_first<16>(tile, row + 8 * n, 0));
    FWP_UNROLL for (int r = 0; r < 8; ++r) d[n + r / 4][r % 4] = unpack(dtype, two[r / 2], r % 2);
  }
}

// Lanes l and l + 4 have neighbouring value columns of two tokens; afterwards each has one token's.
FWP_DEVICE void turn(float& first, float& second) {
  const bool odd = lane() / 4 % 2 == 1;
  const float other = shuffle_xor(odd ? first : second, 4);
  (odd ? first : second) = other;
}

// d = X^T [16][8] into rows of float32, tokens from `row` on; what is not there is left out.
FWP_DEVICE void store_turned(const HeadRows& x, int row, float (&d)[4]) {
  const int g = fresh(lane() / 4), token = row + 2 * (lane() % 4) + g % 2;
  turn(d[0], d[1]);
  turn(d[2], d[3]);
  if (token >= x.count) return;
  FWP_UNROLL for (int i = 0; i < 2; ++i) {
    const int column = g / 2 * 2 + 8 * i, room = x.room(column, 2);
    float* const to = x.at<float>(token, column);
    if (x.wide && room == 2) {
      store_global(reinterpret_cast<Two*>(to), Two{{bits_of(d[2 * i]), bits_of(d[2 * i + 1])}});
    } else {
      FWP_UNROLL for (int j = 0; j < 2; ++j) if (j < room) store_global(to + j, d[2 * i + j]);
    }
  }
}
// The same into rows of 16-bit numbers, rounded once.
FWP_DEVICE void store_turned_halves(const HeadRows& x, int row, float (&d)[4]) {
  const int g = fresh(lane() / 4), token = row + 2 * (lane() % 4) + g % 2;
  turn(d[0], d[1]);
  turn(d[2], d[3]);
  // Once more, so that the lanes of a token write 32 bytes together: four columns each.
  const uint32_t left = pack(x.dtype, d[0], d[1]), right = pack(x.dtype, d[2], d[3]);
  const bool odd = g / 2 % 2 == 1;
  const uint32_t other = shuffle_xor(odd ? left : right, 8);
  const Two four = odd ? Two{{other, right}} : Two{{left, other}};
  const int column = g / 4 * 4 + (odd ? 8 : 0), room = x.room(column, 4);
  Half* const to = x.at<Half>(token, column);
  if (token >= x.count) return;
  if (x.wide && room == 4) {
    store_global(reinterpret_cast<Two*>(to), four);
  } else {
    FWP_UNROLL for (int j = 0; j < 4; ++j) if (j < room)
        store_global(to + j, Half{static_cast<uint16_t>(four.x[j / 2] >> (16 * (j % 2)))});
  }
}

}  // namespace fwp::cuda::chunk
