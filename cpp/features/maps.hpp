// Feature maps phi, forward and backward side by side: a row x [n] of keys or queries becomes y [outputs].  Schlag,
// Irie, Schmidhuber 2021, sections 5.1 to 5.3; ELU+1: Katharopoulos et al. 2020; FAVOR+: Choromanski et al. 2021.
//
// Rows lie in scratch, with room up to whole packs. Each backward follows its forward: it finds x, y and what forward
// left in `work`, and turns dy into dx. Where x is NaN so are y and dx.
#pragma once

namespace fwp {
namespace {

// y = max(x, 0); no gradient at 0
template <class T>
void relu_fwd(const T* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] < 0 ? 0 : x[i];
}
template <class T>
void relu_bwd(const T* x, int64_t n, const T* dy, T* dx) {
  for (int64_t i = 0; i < n; ++i) dx[i] = x[i] > 0 ? dy[i] : x[i] <= 0 ? 0 : x[i];
}

// y = x + 1 for x > 0, else exp(x). Not elu(x) + 1, which cancels where x is far below zero.
template <class Tile, class T>
void elu1_fwd(const T* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const typename Tile::P xi = Tile::load(x + i);
    Tile::store(y + i, xi > 0 ? xi + T(1) : Tile::exp(xi));
  }
}
template <class T>
void elu1_bwd(const T* x, int64_t n, const T* y, const T* dy, T* dx) {
  for (int64_t i = 0; i < n; ++i) dx[i] = x[i] > 0 ? dy[i] : dy[i] * y[i];
}

// y = exp(x) / sum(exp(x)); the room after x counts as -inf.
template <class Tile, class T>
void softmax_fwd(T* x, int64_t n, T* y) {
  using P = typename Tile::P;
  const P nothing = Tile::broadcast(static_cast<T>(-__builtin_inf()));
  for (int64_t i = n; i % Tile::kWidth != 0; ++i) x[i] = nothing[0];
  P most = nothing, sum = {};
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P xi = Tile::load(x + i);
    most = xi > most ? xi : most;
  }
  const P top = Tile::broadcast(Tile::max(most));
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P yi = Tile::exp(Tile::load(x + i) - top);
    Tile::store(y + i, yi);
    sum += yi;
  }
  const P total = Tile::broadcast(Tile::sum(sum));
  for (int64_t i = 0; i < n; i += Tile::kWidth) Tile::store(y + i, Tile::load(y + i) / total);
}
// dx = y (dy - <dy, y>)
template <class Tile, class T>
void softmax_bwd(int64_t n, const T* y, const T* dy, T* dx) {
  const T mean = Tile::dot(dy, y, n);
  for (int64_t i = 0; i < n; ++i) dx[i] = y[i] * (dy[i] - mean);
}

// DPFP-nu (eq. 37): with r = [max(x, 0); max(-x, 0)] of size 2n, y_{(j-1) 2n + i} = r_i r_{i-j mod 2n} for j = 1..nu,
// the order of the paper's own code. work [8n]: r twice in a row, so that i - j needs no modulus, and dr likewise.
template <class T>
void dpfp_fwd(const T* x, int64_t n, int64_t nu, T* work, T* y) {
  T* const r = work + 2 * n;
  for (int64_t half = -2 * n; half <= 0; half += 2 * n)
    for (int64_t i = 0; i < n; ++i) {
      r[half + i] = x[i] < 0 ? 0 : x[i];
      r[half + n + i] = x[i] > 0 ? 0 : -x[i];
    }
  for (int64_t j = 1; j <= nu; ++j, y += 2 * n)
    for (int64_t i = 0; i < 2 * n; ++i) y[i] = r[i] * r[i - j];
}
template <class T>
void dpfp_bwd(const T* x, int64_t n, int64_t nu, T* work, const T* dy, T* dx) {
  const T* const r = work + 2 * n;
  T* const dr = work + 6 * n;
  for (int64_t i = -2 * n; i < 2 * n; ++i) dr[i] = 0;
  for (int64_t j = 1; j <= nu; ++j, dy += 2 * n) {
    for (int64_t i = 0; i < 2 * n; ++i) dr[i] += dy[i] * r[i - j];
    for (int64_t i = 0; i < 2 * n; ++i) dr[i - j] += dy[i] * r[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    const T above = dr[i] + dr[i - 2 * n], below = dr[i + n] + dr[i - n];
    dx[i] = x[i] > 0 ? above : x[i] < 0 ? -below : x[i];
  }
}

// The largest magnitude in whole packs; NaN does not count.
template <class Tile, class T>
T largest(const T* x, int64_t n) {
  typename Tile::P most = {};
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const typename Tile::P xi = Tile::load(x + i), size = xi < 0 ? -xi : xi;
    most = size > most ? size : most;
  }
  return Tile::max(most);
}

// FAVOR+ (eqs. 31 and 32), positive random features: with R the projection [m][n],
//   y = [exp(R x - |x|^2 / 2) + eps; exp(-R x - |x|^2 / 2) + eps] / sqrt(2m)
// in log space, log_factor = -ln(2m)/2 and floor = eps / sqrt(2m). work [3][m up to whole packs]: both exponentials, R
// x.
template <class Tile, class T>
void favor_fwd(const Features& f, const T* x, T* work, T* y) {
  const int64_t n = f.inputs, m = f.directions, m_ld = Tile::up(m);
  T *const plus = work, *const minus = work + m_ld, *const Rx = minus + m_ld;
  Tile::dots(static_cast<const T*>(f.projection), f.projection_stride, m, n, x, Rx);
  const T shift = f.scale_free() ? -largest<Tile>(Rx, m_ld) : static_cast<T>(f.log_factor) - Tile::dot(x, x, n) / 2;
  const T floor = static_cast<T>(f.floor);
  for (int64_t i = 0; i < m_ld; i += Tile::kWidth) {
    Tile::store(plus + i, Tile::exp(Tile::load(Rx + i) + shift));
    Tile::store(minus + i, Tile::exp(shift - Tile::load(Rx + i)));
  }
  for (int64_t i = 0; i < m; ++i) y[i] = plus[i] + floor;
  for (int64_t i = 0; i < m; ++i) y[m + i] = minus[i] + floor;
}
// dx = sum_i (dy+_i exp+_i - dy-_i exp-_i) R_i - x sum_i (dy+_i exp+_i + dy-_i exp-_i)
template <class Tile, class T>
void favor_bwd(const Features& f, const T* x, T* work, const T* dy, T* dx) {
  const int64_t n = f.inputs, m = f.directions, m_ld = Tile::up(m);
  const T *const R = static_cast<const T*>(f.projection), *const plus = work, *const minus = work + m_ld;
  T* const both = work + 2 * m_ld;
  for (int64_t d = 0; d < n; ++d) dx[d] = 0;
  for (int64_t i = 0; i < m; ++i) {
    const T p = dy[i] * plus[i], q = dy[m + i] * minus[i], along = p - q;
    both[i] = p + q;
    for (int64_t d = 0; d < n; ++d) dx[d] += along * R[i * f.projection_stride + d];
  }
  const T total = Tile::sum(both, m);
  for (int64_t d = 0; d < n; ++d) dx[d] -= total * x[d];
}

}  // namespace
}  // namespace fwp
