// The machine as cpp/scan sees it: packs, and the passes over a tile of a state that do all state-sized work. A tile S
// is [K][kColumns], two packs wide, contiguous and aligned; rows of keys and queries are [.][ld], ld a multiple of the
// pack. read and write also take a tile where it lies in a caller's state: rows `stride` apart, at any address.
//
// The passes stay out of line: inlined into their callers, their loops run 5 % slower (GCC 12).
//
// Sums run over K in ascending order whatever the number of rows, so that a row's result does not depend on the rows
// beside it.
#pragma once

#include "pack.hpp"

#define FWP_PASS __attribute__((noinline))

namespace fwp {
namespace {

template <class T>
struct Tiles {
  using Scalar = T;
  using P = Pack<T>;
  static constexpr int kPacks = 2;
  static constexpr int kWidth = kLanes<T>;
  static constexpr int kColumns = kPacks * kWidth;
  static constexpr int kLine = 64 / static_cast<int>(sizeof(T));  // numbers in a line of the caches
  // Rows whose accumulators fit into the registers beside two packs of the state and one broadcast.
  static constexpr int kRows = kVectorRegisters >= 32 ? 12 : 6;

  FWP_HD static P load(const T* p) { return fwp::load(p); }
  FWP_HD static void store(T* p, P x) { fwp::store(p, x); }
  template <class U>  // any number type; U = T moves bits
  FWP_HD static P load_unaligned(const U* p) {
    return load_as<T>(p);
  }
  template <class U>
  FWP_HD static void store_unaligned(U* p, P x) {
    store_as<T>(p, x);
  }
  // The first n > 0 numbers of a row, at any address; `rest` in the other lanes.
  FWP_HD static P load_some(const T* p, int64_t n, P rest = P{}) {
    if (n >= kWidth) return load_unaligned(p);
    for (int64_t i = 0; i < n; ++i) rest[i] = p[i];
    return rest;
  }
  FWP_HD static void store_some(T* p, P x, int64_t n) {
    if (n >= kWidth) return store_unaligned(p, x);
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
  }
  static void fence() {}  // one thread sees what it has written

  template <class U>
  FWP_HD static T widen(U x) {
    return Stored<T, U>::widen(x);
  }
  template <class U>
  FWP_HD static U round(T x) {
    return Stored<T, U>::round(x);
  }
  FWP_HD static P broadcast(T x) { return fwp::broadcast(x); }
  FWP_HD static P exp(P x) { return fwp::exp<T>(x); }
  FWP_HD static T sqrt(T x) { return static_cast<T>(__builtin_sqrt(x)); }

  // n up to whole packs.
  static constexpr int64_t up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

  // Of the lanes of a pack; max ignores NaN.
  FWP_HD static T sum(P x) {
    return fold<T>(x, [](P a, P b) { return a + b; })[0];
  }
  FWP_HD static T max(P x) {
    return fold<T>(x, [](P a, P b) { return b > a ? b : a; })[0];
  }
  // Of the first n numbers of rows in scratch.
  static T sum(const T* x, int64_t n) {
    P packs = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) packs += load(x + i);
    T total = sum(packs);
    for (; i < n; ++i) total += x[i];
    return total;
  }
  static T dot(const T* x, const T* y, int64_t n) {
    P packs = {};
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) packs += load_unaligned(x + i) * load_unaligned(y + i);
    T total = sum(packs);
    for (; i < n; ++i) total += x[i] * y[i];
    return total;
  }

  // out[i] = sum over d < n of rows[i] * x, for rows anywhere, `stride` apart, and x, out in scratch; whole packs of
  // out are written.
  static void dots(const T* rows, ptrdiff_t stride, int64_t count, int64_t n, const T* x, T* out) {
    const int64_t whole = n / kWidth * kWidth;
    for (int64_t i = 0; i < count; i += kWidth) {
      const int64_t there = count - i < kWidth ? count - i : kWidth;
      P sum[kWidth] = {};
      for (int64_t d = 0; d < whole; d += kWidth) {
        const P xd = load(x + d);
        if (there == kWidth)
          FWP_UNROLL for (int r = 0; r < kWidth; ++r) sum[r] += load_unaligned(rows + (i + r) * stride + d) * xd;
        else
          for (int64_t r = 0; r < there; ++r) sum[r] += load_unaligned(rows + (i + r) * stride + d) * xd;
      }
      store(out + i, sum_each<T>(sum));
      for (int64_t r = 0; r < there; ++r)
        for (int64_t d = whole; d < n; ++d) out[i + r] += rows[(i + r) * stride + d] * x[d];
    }
  }

  // out[d] = sum over i < count of w[i] * rows[i][d], d < n: the transpose of dots.
  static void combine(const T* rows, ptrdiff_t stride, int64_t count, int64_t n, const T* w, T* out) {
    for (int64_t d = 0; d < n; ++d) out[d] = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < n; ++d) out[d] += w[i] * rows[i * stride + d];
  }

  // Sums come in whole packs: n of them take this much room.
  template <int n>
  static constexpr int room = (n + kWidth - 1) / kWidth * kWidth;

  // out[i] = sum over the lanes of x[i], i < n, both with room<n>; x is overwritten.
  template <int n>
  FWP_HD static void sums(P* x, T* out) {
    FWP_UNROLL for (int i = 0; i < n; i += kWidth) store(out + i, sum_each<T>(x + i));
  }

  // out[R][kColumns] = rows[R][K] S. asks: fetches the tile that lies `ahead` numbers after S into the second-level
  // cache meanwhile; steps on states in main memory spend half of their time otherwise waiting.
  template <int R, bool asks = false>
  FWP_PASS static void read(const T* rows, ptrdiff_t ld, int64_t K, const T* S, T* out, ptrdiff_t stride = kColumns,
                            ptrdiff_t ahead = 0) {
    if constexpr (R > kRows) {
      read<kRows, asks>(rows, ld, K, S, out, stride, ahead);
      read<R - kRows>(rows + kRows * ld, ld, K, S, out + kRows * kColumns, stride);
    } else {
      P sum[R][kPacks] = {};
      for (int64_t d = 0; d < K; ++d) {
        const P s0 = load_unaligned(S + d * stride), s1 = load_unaligned(S + d * stride + kWidth);
        if constexpr (asks)
          FWP_UNROLL for (int j = 0; j < kColumns; j += kLine) __builtin_prefetch(S + d * stride + ahead + j, 0, 2);
        FWP_UNROLL for (int r = 0; r < R; ++r) {
          const P x = broadcast(rows[r * ld + d]);
          sum[r][0] += x * s0;
          sum[r][1] += x * s1;
        }
      }
      FWP_UNROLL for (int r = 0; r < R; ++r) {
        store(out + r * kColumns, sum[r][0]);
        store(out + r * kColumns + kWidth, sum[r][1]);
      }
    }
  }

  // out = diag(A) S + rows[R][K]^T U[R][kColumns]; out may be S. A is not read where nothing decays.
  template <int R, bool decays>
  FWP_PASS static void write(const T* rows, ptrdiff_t ld, int64_t K, const T* A, const T* U, const T* S, T* out,
                             ptrdiff_t stride = kColumns) {
    if constexpr (R > kRows) {
      write<kRows, decays>(rows, ld, K, A, U, S, out, stride);
      return write<R - kRows, false>(rows + kRows * ld, ld, K, A, U + kRows * kColumns, out, out, stride);
    }
    P u[R][kPacks];
    FWP_UNROLL for (int r = 0; r < R; ++r) {
      u[r][0] = load(U + r * kColumns);
      u[r][1] = load(U + r * kColumns + kWidth);
    }
    for (int64_t d = 0; d < K; ++d) {
      P s0 = load_unaligned(S + d * stride), s1 = load_unaligned(S + d * stride + kWidth);
      if constexpr (decays) {
        const P a = broadcast(A[d]);
        s0 *= a;
        s1 *= a;
      }
      FWP_UNROLL for (int r = 0; r < R; ++r) {
        const P x = broadcast(rows[r * ld + d]);
        s0 += x * u[r][0];
        s1 += x * u[r][1];
      }
      store_unaligned(out + d * stride, s0);
      store_unaligned(out + d * stride + kWidth, s1);
    }
  }

  // The first n rows only, 0 < n <= C.
  template <int C, bool decays>
  static void write_some(int n, const T* rows, ptrdiff_t ld, int64_t K, const T* A, const T* U, const T* S, T* out,
                         ptrdiff_t stride = kColumns) {
    if constexpr (C > 1)
      if (n < C) return write_some<C - 1, decays>(n, rows, ld, K, A, U, S, out, stride);
    write<C, decays>(rows, ld, K, A, U, S, out, stride);
  }

  // out[d] = sum over columns of S[d] * x, for one x [kColumns] and d < ld; S has ld rows.
  FWP_PASS static void read_columns(const T* S, int64_t ld, const T* x, T* out) {
    const P x0 = load(x), x1 = load(x + kWidth);
    for (int64_t d = 0; d < ld; d += kWidth) {
      P sum[kWidth];
      const T* s = S + d * kColumns;
      FWP_UNROLL for (int r = 0; r < kWidth; ++r) sum[r] =
          load(s + r * kColumns) * x0 + load(s + r * kColumns + kWidth) * x1;
      store(out + d, sum_each<T>(sum));
    }
  }

  // out[d] = sum over columns of S[d] * D[d].
  FWP_PASS static void dot_rows(const T* S, const T* D, int64_t ld, T* out) {
    for (int64_t d = 0; d < ld; d += kWidth) {
      P sum[kWidth];
      FWP_UNROLL for (int r = 0; r < kWidth; ++r) {
        const T *s = S + (d + r) * kColumns, *t = D + (d + r) * kColumns;
        sum[r] = load(s) * load(t) + load(s + kWidth) * load(t + kWidth);
      }
      store(out + d, sum_each<T>(sum));
    }
  }
};

}  // namespace
}  // namespace fwp
