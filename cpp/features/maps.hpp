// Feature maps phi, forward and backward side by side: a row x [n] of keys or queries becomes y [outputs].  Schlag,
// Irie, Schmidhuber 2021, sections 5.1 to 5.3; ELU+1: Katharopoulos et al. 2020; FAVOR+: Choromanski et al. 2021.
//
// Rows lie in scratch; x, y and dx have room up to whole packs, dy has not. Each backward follows its forward: it finds
// x, y and what forward left in `work`, and turns dy into dx. Where x is NaN so are y and dx.
//
// Tile is the machine: its packs, and what goes across their lanes. On devices a pack is a warp, and Tile::fence stands
// between writing numbers and reading them in other lanes.
#pragma once

namespace fwp {
namespace {

// y = max(x, 0); no gradient at 0
template <class Tile, class T>
FWP_DEVICE void relu_fwd(const T* x, int64_t n, T* y) {
  using P = typename Tile::P;
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P xi = Tile::load(x + i);
    Tile::store(y + i, xi < 0 ? P{} : xi);
  }
}
template <class Tile, class T>
FWP_DEVICE void relu_bwd(const T* x, int64_t n, const T* dy, T* dx) {
  using P = typename Tile::P;
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P xi = Tile::load(x + i), dyi = Tile::load_some(dy + i, n - i);
    Tile::store(dx + i, xi > 0 ? dyi : xi <= 0 ? P{} : xi);
  }
}

// y = x + 1 for x > 0, else exp(x). Not elu(x) + 1, which cancels where x is far below zero.
template <class Tile, class T>
FWP_DEVICE void elu1_fwd(const T* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const typename Tile::P xi = Tile::load(x + i);
    Tile::store(y + i, xi > 0 ? xi + T(1) : Tile::exp(xi));
  }
}
template <class Tile, class T>
FWP_DEVICE void elu1_bwd(const T* x, int64_t n, const T* y, const T* dy, T* dx) {
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const typename Tile::P dyi = Tile::load_some(dy + i, n - i);
    Tile::store(dx + i, Tile::load(x + i) > 0 ? dyi : dyi * Tile::load(y + i));
  }
}

// y = exp(x) / sum(exp(x))
template <class Tile, class T>
FWP_DEVICE void softmax_fwd(const T* x, int64_t n, T* y) {
  using P = typename Tile::P;
  const P nothing = Tile::broadcast(static_cast<T>(-__builtin_inf()));
  P most = nothing, sum = {};
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P xi = Tile::load_some(x + i, n - i, nothing);
    most = xi > most ? xi : most;
  }
  const P top = Tile::broadcast(Tile::max(most));
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P yi = Tile::exp(Tile::load_some(x + i, n - i, nothing) - top);
    Tile::store(y + i, yi);
    sum += yi;
  }
  const P total = Tile::broadcast(Tile::sum(sum));
  for (int64_t i = 0; i < n; i += Tile::kWidth) Tile::store(y + i, Tile::load(y + i) / total);
}
// dx = y (dy - <dy, y>)
template <class Tile, class T>
FWP_DEVICE void softmax_bwd(int64_t n, const T* y, const T* dy, T* dx) {
  const T mean = Tile::dot(dy, y, n);
  for (int64_t i = 0; i < n; i += Tile::kWidth)
    Tile::store(dx + i, Tile::load(y + i) * (Tile::load_some(dy + i, n - i) - mean));
}

// DPFP-nu (eq. 37): with r = [max(x, 0); max(-x, 0)] of size 2n, y_{(j-1) 2n + i} = r_i r_{i-j mod 2n} for j = 1..nu,
// the order of the paper's own code. work [8n]: r twice in a row, so that i - j needs no modulus, and dr likewise.
template <class Tile, class T>
FWP_DEVICE void dpfp_fwd(const T* x, int64_t n, int64_t nu, T* work, T* y) {
  using P = typename Tile::P;
  const T* const r = work + 2 * n;
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P xi = Tile::load(x + i), above = xi < 0 ? P{} : xi, below = xi > 0 ? P{} : -xi;
    for (int64_t at = i; at < 4 * n; at += 2 * n) {
      Tile::store_some(work + at, above, n - i);
      Tile::store_some(work + n + at, below, n - i);
    }
  }
  Tile::fence();
  for (int64_t j = 1; j <= nu; ++j, y += 2 * n)
    for (int64_t i = 0; i < 2 * n; i += Tile::kWidth) {
      const int64_t some = 2 * n - i;
      Tile::store_some(y + i, Tile::load_some(r + i, some) * Tile::load_some(r + i - j, some), some);
    }
  Tile::fence();
}
template <class Tile, class T>
FWP_DEVICE void dpfp_bwd(const T* x, int64_t n, int64_t nu, T* work, const T* dy, T* dx) {
  using P = typename Tile::P;
  const T* const r = work + 2 * n;
  T* const dr = work + 6 * n;
  for (int64_t i = -2 * n; i < 2 * n; i += Tile::kWidth) Tile::store_some(dr + i, P{}, 2 * n - i);
  // dr_to += dy r_from
  const auto add = [n, r, dr](const T* dyj, int64_t to, int64_t from) {
    Tile::fence();
    for (int64_t i = 0; i < 2 * n; i += Tile::kWidth) {
      const int64_t some = 2 * n - i;
      const P term = Tile::load_some(dyj + i, some) * Tile::load_some(r + from + i, some);
      Tile::store_some(dr + to + i, Tile::load_some(dr + to + i, some) + term, some);
    }
  };
  for (int64_t j = 1; j <= nu; ++j, dy += 2 * n) {
    add(dy, 0, -j);
    add(dy, -j, 0);
  }
  Tile::fence();
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const auto dr_at = [&](int64_t at) { return Tile::load_some(dr + at + i, n - i); };
    const P xi = Tile::load(x + i), above = dr_at(0) + dr_at(-2 * n), below = dr_at(n) + dr_at(-n);
    Tile::store(dx + i, xi > 0 ? above : xi < 0 ? -below : xi);
  }
}

// The largest magnitude in whole packs; NaN does not count.
template <class Tile, class T>
FWP_DEVICE T largest(const T* x, int64_t n) {
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
FWP_DEVICE void favor_fwd(const Features& f, const T* x, T* work, T* y) {
  using P = typename Tile::P;
  const int64_t n = f.inputs, m = f.directions, m_ld = Tile::up(m);
  T *const plus = work, *const minus = work + m_ld, *const Rx = minus + m_ld;
  Tile::dots(static_cast<const T*>(f.projection), f.projection_stride, m, n, x, Rx);
  const T shift = f.scale_free() ? -largest<Tile>(Rx, m_ld) : static_cast<T>(f.log_factor) - Tile::dot(x, x, n) / 2;
  const T floor = static_cast<T>(f.floor);
  for (int64_t i = 0; i < m; i += Tile::kWidth) {
    const P exp_plus = Tile::exp(Tile::load(Rx + i) + shift), exp_minus = Tile::exp(shift - Tile::load(Rx + i));
    Tile::store(plus + i, exp_plus);
    Tile::store(minus + i, exp_minus);
    Tile::store_some(y + i, exp_plus + floor, m - i);
    Tile::store_some(y + m + i, exp_minus + floor, m - i);
  }
  Tile::fence();
}
// dx = sum_i (dy+_i exp+_i - dy-_i exp-_i) R_i - x sum_i (dy+_i exp+_i + dy-_i exp-_i)
template <class Tile, class T>
FWP_DEVICE void favor_bwd(const Features& f, const T* x, T* work, const T* dy, T* dx) {
  using P = typename Tile::P;
  const int64_t n = f.inputs, m = f.directions, m_ld = Tile::up(m);
  T *const plus = work, *const minus = work + m_ld, *const along = minus + m_ld;
  P both = {};
  for (int64_t i = 0; i < m; i += Tile::kWidth) {
    const P p = Tile::load_some(dy + i, m - i) * Tile::load_some(plus + i, m - i),
            q = Tile::load_some(dy + m + i, m - i) * Tile::load_some(minus + i, m - i);
    Tile::store(along + i, p - q);
    both += p + q;
  }
  const T total = Tile::sum(both);
  Tile::fence();
  Tile::combine(static_cast<const T*>(f.projection), f.projection_stride, m, n, along, dx);
  for (int64_t i = 0; i < n; i += Tile::kWidth) Tile::store(dx + i, Tile::load(dx + i) - total * Tile::load(x + i));
}

}  // namespace
}  // namespace fwp
