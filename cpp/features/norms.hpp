// Normalisations of one row of keys or queries, forward and backward side by side.  Schlag, Irie, Schmidhuber 2021,
// eq. 29 (sum); l2: Yang et al. 2024. A row without a norm becomes zero, and so does its gradient: no eps, no NaN.
#pragma once

namespace fwp {
namespace {

// y = scale * x / value. The scale, a power of two, brings a row whose squares would leave the range of T back into it.
template <class T>
struct Divisor {
  T scale, value;  // value 0: the row has no norm
};

template <class Tile, class T>
FWP_DEVICE Divisor<T> divisor(Norm norm, const T* x, int64_t n) {
  if (norm == Norm::sum) return {1, Tile::sum(x, n)};
  constexpr bool wide = sizeof(T) == 8;
  constexpr T low = wide ? T(1e-290) : T(1e-30), high = wide ? T(1e300) : T(1e35);
  const T squares = Tile::dot(x, x, n);
  if (squares > low && squares < high) return {1, Tile::sqrt(squares)};
  const T scale = squares <= low ? (wide ? T(0x1p600) : T(0x1p100)) : wide ? T(0x1p-600) : T(0x1p-100);
  typename Tile::P sum = {};
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const typename Tile::P scaled = scale * Tile::load_some(x + i, n - i);
    sum += scaled * scaled;
  }
  return {scale, Tile::sqrt(Tile::sum(sum))};
}

// y = x / sum(x), or x / |x|; in place. Returns what it was divided by.
template <class Tile, class T>
FWP_DEVICE Divisor<T> norm_fwd(Norm norm, T* x, int64_t n) {
  using P = typename Tile::P;
  const Divisor<T> d = divisor<Tile>(norm, x, n);
  for (int64_t i = 0; i < n; i += Tile::kWidth)
    Tile::store_some(x + i, d.value == 0 ? P{} : d.scale * Tile::load_some(x + i, n - i) / d.value, n - i);
  return d;
}

// dx = (dy - <dy, y>) / sum, or (dy - <dy, y> y) / |x|; x becomes y, dy becomes dx.
template <class Tile, class T>
FWP_DEVICE void norm_bwd(Norm norm, T* x, int64_t n, T* dy) {
  using P = typename Tile::P;
  const Divisor<T> d = norm_fwd<Tile>(norm, x, n);
  const T along = Tile::dot(dy, x, n);
  for (int64_t i = 0; i < n; i += Tile::kWidth) {
    const P yi = Tile::load_some(x + i, n - i), dyi = Tile::load_some(dy + i, n - i);
    const P across = norm == Norm::sum ? dyi - along : dyi - along * yi;
    Tile::store_some(dy + i, d.value == 0 ? P{} : across / d.value * d.scale, n - i);
  }
}

}  // namespace
}  // namespace fwp
