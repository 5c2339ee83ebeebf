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
#pragma once

namespace fwp {
namespace {

// The divisors, from the rows kr, qr [2C][ld] and dot products as they are.
template <class Tile, bool predicts, int C, class T>
void attention_norm_divisors(const T* rows, const T* z, int64_t ld, const T* MP, int n, T eps, T* divisor,
                             bool* blind) {
  using P = typename Tile::P;
  P x[Tile::template room<2 * C>] = {};
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    const P zd = Tile::load(z + d);
    FWP_UNROLL for (int r = predicts ? 0 : C; r < 2 * C; ++r) x[r] += Tile::load(rows + r * ld + d) * zd;
  }
  alignas(P) T sum[Tile::template room<2 * C>];
  Tile::template sums<2 * C>(x, sum);
  for (int t = 0; t < C; ++t) {
    for (int i = 0; i < t && predicts; ++i) sum[t] += MP[M_at<C>(t, i)];
    for (int i = 0; i <= t; ++i) sum[C + t] += MP[P_at<C>(t, i)];
  }
  for (int r = 0; r < 2 * C; ++r) {
    blind[r] = r % C >= n || sum[r] == 0;
    divisor[r] = sum[r] + eps;
  }
}

// From kr, qr in `from` [2C][ld] the rows kr/(s+eps), scale qr/(c+eps), which may lie in the same place; MP likewise; z
// moves on.
template <class Tile, class Decay, bool predicts, int C, class T>
void attention_norm_fwd(const T* from, const T* kw, const T* A, int64_t ld, const T* divisor, const bool* blind,
                        T scale, T* z, T* rows, T* MP) {
  for (int r = predicts ? 0 : C; r < 2 * C; ++r) {
    const T factor = r < C ? 1 : scale;
    for (int64_t d = 0; d < ld; ++d) rows[r * ld + d] = blind[r] ? 0 : from[r * ld + d] * factor / divisor[r];
  }
  for (int t = 0; t < C; ++t) {
    for (int i = 0; i < t && predicts; ++i) {
      T& M = MP[M_at<C>(t, i)];
      M = blind[t] ? 0 : M / divisor[t];
    }
    for (int i = 0; i <= t; ++i) {
      T& P = MP[P_at<C>(t, i)];
      P = blind[C + t] ? 0 : P * scale / divisor[C + t];
    }
  }
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    typename Tile::P zd = Tile::load(z + d);
    if constexpr (Decay::decays) zd *= Tile::load(A + d);
    FWP_UNROLL for (int i = 0; i < C; ++i) zd += Tile::load(kw + i * ld + d);
    Tile::store(z + d, zd);
  }
}

// From the adjoints of the divided rows (dkr, dqr) and dot products (dMP) those of the rows and dot products as they
// were, and what z adds to them, to dkw and to H (the channel sums of rules/decay.hpp); dz is the adjoint of z after
// the block and becomes that of z0.
//
//   ds_t = -(<dkr_t, kr_t> + sum_i dM_ti M_ti) / (s_t + eps), of divided rows and adjoints; dc_t likewise
//   dkr_t = dkr_t / (s_t + eps) + ds_t z0    dM_ti = dM_ti / (s_t + eps) + ds_t    dqr_t, dP_ti likewise: scale, dc_t
//   dkw_i = dkw_i + dz1                      H = H + dz1 z0
//   dz0 = A dz1 + sum_t (ds_t kr_t + dc_t qr_t), of rows as they were
//
// a(t, d): the decay of token t at the channels of pack d; kq [2C][ld]: keys and queries before any decay.
template <class Tile, class Decay, bool predicts, int C, class T, class A>
void attention_norm_bwd(const T* kq, const A& a, const T* rows, const T* MP, const T* divisor, const bool* blind,
                        const T* z, int64_t ld, int n, T scale, T* dkr, T* dqr, T* dkw, T* dMP, T* H, T* dz) {
  using P = typename Tile::P;
  T ds[C] = {}, dc[C] = {};
  for (int t = 0; t < n; ++t) {
    T s = predicts ? Tile::dot(dkr + t * ld, rows + t * ld, ld) : 0,
      c = Tile::dot(dqr + t * ld, rows + (C + t) * ld, ld);
    for (int i = 0; i < t && predicts; ++i) s += dMP[M_at<C>(t, i)] * MP[M_at<C>(t, i)];
    for (int i = 0; i <= t; ++i) c += dMP[P_at<C>(t, i)] * MP[P_at<C>(t, i)];
    const bool no_s = blind[t], no_c = blind[C + t];
    ds[t] = no_s ? 0 : -s / divisor[t];
    dc[t] = no_c ? 0 : -c / divisor[C + t];
    for (int i = 0; i < t && predicts; ++i) dMP[M_at<C>(t, i)] = no_s ? 0 : dMP[M_at<C>(t, i)] / divisor[t] + ds[t];
    for (int i = 0; i <= t; ++i) dMP[P_at<C>(t, i)] = no_c ? 0 : dMP[P_at<C>(t, i)] * scale / divisor[C + t] + dc[t];
  }
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    const P z0 = Tile::load(z + d), dz1 = Tile::load(dz + d);
    P decayed = P{} + T(1), dz0 = {};
    for (int t = 0; t < C; ++t) {
      if constexpr (Decay::decays) decayed *= a(t, d);
      if (t >= n) continue;
      P dx = Tile::load(dqr + t * ld + d), dw = dc[t] * Tile::load(kq + (C + t) * ld + d);
      Tile::store(dqr + t * ld + d, blind[C + t] ? P{} : dx * scale / divisor[C + t] + dc[t] * z0);
      if constexpr (predicts) {
        dx = Tile::load(dkr + t * ld + d);
        Tile::store(dkr + t * ld + d, blind[t] ? P{} : dx / divisor[t] + ds[t] * z0);
        dw += ds[t] * Tile::load(kq + t * ld + d);
      }
      dz0 += decayed * dw;
      Tile::store(dkw + t * ld + d, Tile::load(dkw + t * ld + d) + dz1);
    }
    if constexpr (Decay::decays) Tile::store(H + d, Tile::load(H + d) + dz1 * z0);
    Tile::store(dz + d, decayed * dz1 + dz0);
  }
}

}  // namespace
}  // namespace fwp
