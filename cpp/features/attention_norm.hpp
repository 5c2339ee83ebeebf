// Attention normalisation of a block of C tokens: reads are divided by the keys gathered so far, z [K].  Schlag, Irie,
// Schmidhuber 2021, eqs. 26-28; z' is z after this token's decay, as for the state.
//
//   s_t = z'_t . k_t       S'^T k_t / (s_t + eps) is predicted (delta)
//   z_t = z'_t + k_t       beta never enters
//   c_t = z_t . q_t        scale S_t^T q_t / (c_t + eps) is the output
//
// Where s_t or c_t is 0 the read is blind: 0 whatever the state, even NaN. In the block z is like a value column that
// is always written 1, so that with the rows and dot products of rules/decay.hpp
//
//   s_t = z0 . kr_t + sum_{i<t} M_ti       c_t = z0 . qr_t + sum_{i<=t} P_ti       z1 = A z0 + sum_i kw_i
//
// and dividing reads means dividing the rows kr_t, qr_t and the dot products M_ti, P_ti: nothing else changes.
// Divisors are [2C], s_t + eps, then c_t + eps, and so are the marks of blind reads, which those of missing tokens are.
// Channels meet only in s, c and the products M, P; the rest is for one pack P of key channels, as in rules/decay.hpp,
// and, below, for rows in memory.
#pragma once

namespace fwp {
namespace {

// Forward. The share of a pack in z0 . kr_t and z0 . qr_t, added to x [2C], from its kr and qr, rows [2C].
template <bool predicts, int C, class P>
FWP_HD void add_gathered(const P* rows, P z, P* x) {
  FWP_UNROLL for (int r = predicts ? 0 : C; r < 2 * C; ++r) x[r] += rows[r] * z;
}

// s_t or c_t of read r from z0 . kr_t or z0 . qr_t.
template <bool predicts, int C, class T, class Square>
FWP_HD T gathered(int r, T sum, const Square& MP) {
  const int t = r % C;
  for (int i = 0; i < t && r < C && predicts; ++i) sum += MP[M_at<C>(t, i)];
  for (int i = 0; i <= t && r >= C; ++i) sum += MP[P_at<C>(t, i)];
  return sum;
}

// A row or dot product of a read as it is after the division; factor: 1 for keys, scale for queries.
template <class P, class T>
FWP_HD P divided(P x, T factor, T divisor, bool blind) {
  return blind ? P{} : x * factor / divisor;
}

// The read that number m of the square MP belongs to.
template <int C>
FWP_HD constexpr int read_of(int m) {
  return m / C > m % C ? m / C : C + m % C;
}

// z1 from z0.
template <class Decay, int C, class P>
FWP_HD P gather(P A, const P* kw, P z) {
  if constexpr (Decay::decays) z *= A;
  FWP_UNROLL for (int i = 0; i < C; ++i) z += kw[i];
  return z;
}

// Backward. From the adjoints of the divided rows (dkr, dqr) and dot products (dMP) those of the rows and dot products
// as they were, and what z adds to them, to dkw and to H (the channel sums of rules/decay.hpp); dz is the adjoint of z
// after the block and becomes that of z0.
//
//   ds_t = -(<dkr_t, kr_t> + sum_i dM_ti M_ti) / (s_t + eps), of divided rows and adjoints; dc_t likewise
//   dkr_t = dkr_t / (s_t + eps) + ds_t z0    dM_ti = dM_ti / (s_t + eps) + ds_t    dqr_t, dP_ti likewise: scale, dc_t
//   dkw_i = dkw_i + dz1                      H = H + dz1 z0
//   dz0 = A dz1 + sum_t (ds_t kr_t + dc_t qr_t), of rows as they were
//
// ds and dc are one d_sum [2C]. First that of read r, from the sum over the channels <dkr_t, kr_t> or <dqr_t, qr_t>.
template <bool predicts, int C, class T, class Square, class Adjoints>
FWP_HD T gathered_adjoint(int r, T sum, const Square& MP, const Adjoints& dMP, T divisor, bool blind) {
  const int t = r % C;
  for (int i = 0; i < t && r < C && predicts; ++i) sum += dMP[M_at<C>(t, i)] * MP[M_at<C>(t, i)];
  for (int i = 0; i <= t && r >= C; ++i) sum += dMP[P_at<C>(t, i)] * MP[P_at<C>(t, i)];
  return blind ? 0 : -sum / divisor;
}

// The adjoint of a row or dot product as it was; x: what its sum's adjoint comes with, z0 or 1.
template <class P, class T>
FWP_HD P divided_bwd(P dx, T factor, T divisor, bool blind, T d_sum, P x) {
  return blind ? P{} : dx * factor / divisor + d_sum * x;
}

// One pack of channels; k and q [C] before any decay, a [C] their decays.
template <class Decay, bool predicts, int C, class P, class T>
FWP_HD void attention_norm_bwd(const P* k, const P* q, const P* a, const T* divisor, const bool* blind, const T* d_sum,
                               T scale, int n, P z0, P* dkr, P* dqr, P* dkw, P& H, P& dz) {
  const P dz1 = dz;
  P decayed = P{} + T(1), dz0 = {};
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    if constexpr (Decay::decays) decayed *= a[t];
    if (t >= n) continue;
    P dw = d_sum[C + t] * q[t];
    dqr[t] = divided_bwd(dqr[t], scale, divisor[C + t], blind[C + t], d_sum[C + t], z0);
    if constexpr (predicts) {
      dkr[t] = divided_bwd(dkr[t], T(1), divisor[t], blind[t], d_sum[t], z0);
      dw += d_sum[t] * k[t];
    }
    dz0 += decayed * dw;
    dkw[t] += dz1;
  }
  if constexpr (Decay::decays) H += dz1 * z0;
  dz = decayed * dz1 + dz0;
}

// Rows in memory: kr, qr [2C][ld] as they are, and from them the divisors.
template <class Tile, bool predicts, int C, class T>
void attention_norm_divisors(const T* rows, const T* z, int64_t ld, const T* MP, int n, T eps, T* divisor,
                             bool* blind) {
  using P = typename Tile::P;
  P x[Tile::template room<2 * C>] = {};
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    P row[2 * C];
    FWP_UNROLL for (int r = predicts ? 0 : C; r < 2 * C; ++r) row[r] = Tile::load(rows + r * ld + d);
    add_gathered<predicts, C>(row, Tile::load(z + d), x);
  }
  alignas(P) T sum[Tile::template room<2 * C>];
  Tile::template sums<2 * C>(x, sum);
  for (int r = 0; r < 2 * C; ++r) {
    const T s = gathered<predicts, C>(r, sum[r], MP);
    blind[r] = r % C >= n || s == 0;
    divisor[r] = s + eps;
  }
}

// Divides the rows of `from`, into `rows`, which may lie in the same place, and MP; z moves on.
template <class Tile, class Decay, bool predicts, int C, class T>
void attention_norm_fwd(const T* from, const T* kw, const T* A, int64_t ld, const T* divisor, const bool* blind,
                        T scale, T* z, T* rows, T* MP) {
  const auto factor = [&](int r) { return r < C ? 1 : scale; };
  for (int r = predicts ? 0 : C; r < 2 * C; ++r)
    for (int64_t d = 0; d < ld; ++d) rows[r * ld + d] = divided(from[r * ld + d], factor(r), divisor[r], blind[r]);
  for (int m = 0; m < C * C; ++m) {
    const int r = read_of<C>(m);
    if (predicts || r >= C) MP[m] = divided(MP[m], factor(r), divisor[r], blind[r]);
  }
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    typename Tile::P w[C], A_d = {};
    if constexpr (Decay::decays) A_d = Tile::load(A + d);
    FWP_UNROLL for (int i = 0; i < C; ++i) w[i] = Tile::load(kw + i * ld + d);
    Tile::store(z + d, gather<Decay, C>(A_d, w, Tile::load(z + d)));
  }
}

// a(t, d): the decay of token t at the channels of pack d; kq [2C][ld]: keys and queries before any decay; rows: the
// divided ones.
template <class Tile, class Decay, bool predicts, int C, class T, class A>
void attention_norm_bwd(const T* kq, const A& a, const T* rows, const T* MP, const T* divisor, const bool* blind,
                        const T* z, int64_t ld, int n, T scale, T* dkr, T* dqr, T* dkw, T* dMP, T* H, T* dz) {
  using P = typename Tile::P;
  T d_sum[2 * C] = {};
  for (int t = 0; t < n; ++t)
    for (int r = predicts ? t : C + t; r < 2 * C; r += C) {
      const T sum = Tile::dot((r < C ? dkr : dqr) + t * ld, rows + r * ld, ld);
      d_sum[r] = gathered_adjoint<predicts, C>(r, sum, MP, dMP, divisor[r], blind[r]);
    }
  for (int m = 0; m < C * C; ++m) {
    const int r = read_of<C>(m);
    if (r % C < n && (predicts || r >= C))
      dMP[m] = divided_bwd(dMP[m], r < C ? 1 : scale, divisor[r], blind[r], d_sum[r], T(1));
  }
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    P k[C], q[C], at[C] = {}, kr_d[C] = {}, qr_d[C] = {}, kw_d[C] = {}, H_d = {}, dz_d = Tile::load(dz + d);
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      k[t] = Tile::load(kq + t * ld + d);
      q[t] = Tile::load(kq + (C + t) * ld + d);
      if constexpr (Decay::decays) at[t] = a(t, d);
      if (t >= n) continue;
      qr_d[t] = Tile::load(dqr + t * ld + d);
      kw_d[t] = Tile::load(dkw + t * ld + d);
      if constexpr (predicts) kr_d[t] = Tile::load(dkr + t * ld + d);
    }
    if constexpr (Decay::decays) H_d = Tile::load(H + d);
    attention_norm_bwd<Decay, predicts, C>(k, q, at, divisor, blind, d_sum, scale, n, Tile::load(z + d), kr_d, qr_d,
                                           kw_d, H_d, dz_d);
    for (int t = 0; t < n; ++t) {
      Tile::store(dqr + t * ld + d, qr_d[t]);
      Tile::store(dkw + t * ld + d, kw_d[t]);
      if constexpr (predicts) Tile::store(dkr + t * ld + d, kr_d[t]);
    }
    if constexpr (Decay::decays) Tile::store(H + d, H_d);
    Tile::store(dz + d, dz_d);
  }
}

}  // namespace
}  // namespace fwp
