// Decays of channels. A chunk is four blocks of 16 tokens, and a warp goes through one token by token with some
// channels for each of its lanes: inside of a block decays are products of the tokens' own, in float32.
//
// From a block J to a later one I the decay is a product of three, from the token to the end of J, across the blocks in
// between, from the begin of I to the token. So a pair of blocks is a product on tensor cores, of rows of I decayed
// from its begin and rows of J decayed up to there. No decay is ever divided by, none is the difference of two sums,
// and where one is too small for a float32 it is 0, as it should be: gates may be as strong as they like, -inf too.
#pragma once

#include "prep.cuh"

namespace fwp::cuda::chunk {

// As kMostGrowth, of any channel: what is rounded of one that has grown is added to those that have not.
constexpr float kMostChannelGrowth = 4;

// The pairs of blocks J < I, the place of their rows in a tile.
constexpr int kPairs = kBlocks * (kBlocks - 1) / 2;
FWP_DEVICE int pair_of(int I, int J) { return I * (I - 1) / 2 + J; }

// `n` neighbouring channels of a token; zeros where there are none.
template <int n>
FWP_DEVICE void load_channels(float (&x)[n], const HeadRows& rows, int token, int column) {
  const int room = token < rows.count ? rows.room(column, n) : 0;
  if (n == 4 && rows.wide && room == n) {
    if (rows.dtype == DType::f32) {
      const Quad four = load_global(reinterpret_cast<const Quad*>(rows.at<float>(token, column)));
      FWP_UNROLL for (int c = 0; c < n; ++c) x[c] = float_of(four.x[c]);
    } else {
      const Two four = load_global(reinterpret_cast<const Two*>(rows.at<Half>(token, column)));
      FWP_UNROLL for (int c = 0; c < n; ++c) x[c] = unpack(rows.dtype, four.x[c / 2], c % 2);
    }
    return;
  }
  FWP_UNROLL for (int c = 0; c < n; ++c) {
    x[c] = 0;
    if (c >= room) continue;
    x[c] = rows.dtype == DType::f32 ? load_global(rows.at<float>(token, column) + c)
                                    : unpack(rows.dtype, load_global(rows.at<Half>(token, column) + c).bits, 0);
  }
}

// Sums over the lanes of a warp: lane l has that of x[l % n] afterwards.
template <int half, int n>
FWP_DEVICE void fold_lanes(float (&x)[n]) {
  if constexpr (half > 0) {
    const bool upper = (lane() & half) != 0;
    FWP_UNROLL for (int i = 0; i < half; ++i) {
      const float other = shuffle_xor(upper ? x[i] : x[i + half], half);
      x[i] = (upper ? x[i + half] : x[i]) + other;
    }
    fold_lanes<half / 2>(x);
  }
}
template <int n>
FWP_DEVICE float sum_over_lanes(float (&x)[n]) {
  fold_lanes<n / 2>(x);
  FWP_UNROLL for (int mask = n; mask < kWarpSize; mask *= 2) x[0] += shuffle_xor(x[0], mask);
  return x[0];
}

}  // namespace fwp::cuda::chunk
