// Normalisations of one row of keys or queries, forward and backward side by side.  Schlag, Irie, Schmidhuber 2021,
// eq. 29 (sum); l2: Yang et al. 2024. A row without a norm becomes zero, and so does its gradient: no eps, no NaN.
#pragma once

namespace fwp {
namespace {

// The divisor of a row, 0 if it has none. l2 is scaled where squares would leave the range of T.
template <class Tile, class T>
T norm_of(Norm norm, const T* x, int64_t n) {
  if (norm == Norm::sum) return Tile::sum(x, n);
  const T squares = Tile::dot(x, x, n);
  constexpr T low = sizeof(T) == 8 ? T(1e-290) : T(1e-30), high = sizeof(T) == 8 ? T(1e300) : T(1e35);
  if (squares > low && squares < high) return static_cast<T>(__builtin_sqrt(squares));
  T most = 0, sum = 0;
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : -x[i] > most ? -x[i] : most;
  if (most == 0) return squares;  // 0, or NaN
  for (int64_t i = 0; i < n; ++i) sum += x[i] / most * (x[i] / most);
  return most * static_cast<T>(__builtin_sqrt(sum));
}

// y = x / sum(x), or x / |x|; in place.
template <class Tile, class T>
void norm_fwd(Norm norm, T* x, int64_t n) {
  const T divisor = norm_of<Tile>(norm, x, n);
  for (int64_t i = 0; i < n; ++i) x[i] = divisor == 0 ? 0 : x[i] / divisor;
}

// dx = (dy - <dy, y>) / sum, or (dy - <dy, y> y) / |x|, y = x / divisor; in place.
template <class T>
void norm_bwd(Norm norm, const T* x, T divisor, int64_t n, T* dy) {
  T along = 0;
  for (int64_t i = 0; i < n; ++i) along += dy[i] * (x[i] / divisor);
  for (int64_t i = 0; i < n; ++i)
    dy[i] = divisor == 0 ? 0 : (dy[i] - (norm == Norm::sum ? along : along * (x[i] / divisor))) / divisor;
}

}  // namespace
}  // namespace fwp
