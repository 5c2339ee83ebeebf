// The feature maps and normalisations of cpp/features as kernels have them: a pack is a warp, one number in each lane,
// and rows lie in a Place. Results of sums are the same in every lane.
#pragma once

#include "../place.cuh"
#include "../primitives/primitives.cuh"
//
#include "../../cpp/features/features.hpp"
//
#include "../../cpp/features/maps.hpp"
#include "../../cpp/features/norms.hpp"
//
#include "../../cpp/features/row.hpp"

namespace fwp::cuda {

template <class T, class Place>
struct Warp {
  using Scalar = T;
  using P = T;
  static constexpr int kWidth = kWarpSize;

  // n up to whole packs.
  static constexpr int64_t up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

  FWP_DEVICE static P load(const T* p) { return Place::load(p + lane()); }
  FWP_DEVICE static void store(T* p, P x) { Place::store(p + lane(), x); }
  // The first n numbers of a row; `rest` in the other lanes.
  FWP_DEVICE static P load_some(const T* p, int64_t n, P rest = P{}) {
    return lane() < n ? Place::load(p + lane()) : rest;
  }
  FWP_DEVICE static void store_some(T* p, P x, int64_t n) {
    if (lane() < n) Place::store(p + lane(), x);
  }
  FWP_DEVICE static void fence() { sync_warp(); }

  FWP_DEVICE static P broadcast(T x) { return x; }
  FWP_DEVICE static P exp(P x) { return exponential(x); }
  FWP_DEVICE static T sqrt(T x) { return square_root(x); }

  // Of the lanes; no NaN for max.
  FWP_DEVICE static T sum(P x) {
    FWP_UNROLL for (int h = 1; h < kWidth; h *= 2) x += shuffle_xor(x, h);
    return x;
  }
  FWP_DEVICE static T max(P x) {
    FWP_UNROLL for (int h = 1; h < kWidth; h *= 2) {
      const T other = shuffle_xor(x, h);
      x = other > x ? other : x;
    }
    return x;
  }
  // Of the first n numbers of rows.
  FWP_DEVICE static T sum(const T* x, int64_t n) {
    P total = {};
    for (int64_t i = 0; i < n; i += kWidth) total += load_some(x + i, n - i);
    return sum(total);
  }
  FWP_DEVICE static T dot(const T* x, const T* y, int64_t n) {
    P total = {};
    for (int64_t i = 0; i < n; i += kWidth) total += load_some(x + i, n - i) * load_some(y + i, n - i);
    return sum(total);
  }

  // out[i] = sum over d < n of rows[i] * x, for rows in global memory, `stride` apart; whole packs of out are written.
  FWP_DEVICE static void dots(const T* rows, int64_t stride, int64_t count, int64_t n, const T* x, T* out) {
    for (int64_t i = 0; i < count; i += kWidth) {
      P total[kWidth] = {};
      for (int64_t d = lane(); d - lane() < n; d += kWidth) {
        const P xd = d < n ? Place::load(x + d) : T(0);
        FWP_UNROLL for (int r = 0; r < kWidth; ++r) if (i + r < count && d < n) total[r] +=
            load_global(rows + (i + r) * stride + d) * xd;
      }
      store(out + i, sum_each(total));
    }
  }
  // out[d] = sum over i < count of w[i] * rows[i][d], d < n: the transpose of dots.
  FWP_DEVICE static void combine(const T* rows, int64_t stride, int64_t count, int64_t n, const T* w, T* out) {
    for (int64_t d = lane(); d < n; d += kWidth) {
      P total = {};
      for (int64_t i = 0; i < count; ++i) total += Place::load(w + i) * load_global(rows + i * stride + d);
      Place::store(out + d, total);
    }
  }

 private:
  // Transposed reduction: lane i gets the sum over the lanes of x[i], which is overwritten.
  FWP_DEVICE static P sum_each(P (&x)[kWidth]) {
    FWP_UNROLL for (int h = 1; h < kWidth; h *= 2) {
      const bool upper = (lane() & h) != 0;
      FWP_UNROLL for (int i = 0; i < kWidth; ++i) if (i < kWidth / (2 * h)) {
        const P kept = upper ? x[2 * i + 1] : x[2 * i], sent = upper ? x[2 * i] : x[2 * i + 1];
        x[i] = kept + shuffle_xor(sent, h);
      }
    }
    return x[0];
  }
};

}  // namespace fwp::cuda
