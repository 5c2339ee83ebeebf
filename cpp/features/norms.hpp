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
Divisor<T> divisor(Norm norm, const T* x, int64_t n) {
  if (norm == Norm::sum) return {1, Tile::sum(x, n)};
  constexpr bool wide = sizeof(T) == 8;
  constexpr T low = wide ? T(1e-290) : T(1e-30), high = wide ? T(1e300) : T(1e35);
  const T squares = Tile::dot(x, x, n);
  if (squares > low && squares < high) return {1, static_cast<T>(__builtin_sqrt(squares))};
  const T scale = squares <= low ? (wide ? T(0x1p600) : T(0x1p100)) : wide ? T(0x1p-600) : T(0x1p-100);
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += scale * x[i] * (scale * x[i]);
  return {scale, static_cast<T>(__builtin_sqrt(sum))};
}

// y = x / sum(x), or x / |x|; in place. Returns what it was divided by.
template <class Tile, class T>
Divisor<T> norm_fwd(Norm norm, T* x, int64_t n) {
  const Divisor<T> d = divisor<Tile>(norm, x, n);
  for (int64_t i = 0; i < n; ++i) x[i] = d.value == 0 ? 0 : d.scale * x[i] / d.value;
  return d;
}

// dx = (dy - <dy, y>) / sum, or (dy - <dy, y> y) / |x|; x becomes y, dy becomes dx.
template <class Tile, class T>
void norm_bwd(Norm norm, T* x, int64_t n, T* dy) {
  const Divisor<T> d = norm_fwd<Tile>(norm, x, n);
  const T along = Tile::dot(dy, x, n);
  for (int64_t i = 0; i < n; ++i)
    dy[i] = d.value == 0 ? 0 : (dy[i] - (norm == Norm::sum ? along : along * x[i])) / d.value * d.scale;
}

}  // namespace
}  // namespace fwp
