// One block of C tokens of any rule, for one pack P of value columns; columns never meet here. C = 1 is the recurrence.
//
// State-sized work is done around these functions by matrix products with the block's first state S0 and the adjoint D1
// of its last state; rows are tokens, kr, qr, kw are the decayed rows of decay.hpp and q carries the scale:
//
//   forward    R = kr S0    X = qr S0    (block_fwd)    S1 = A S0 + kw^T U
//   backward   Z = kw D1    (block_bwd)                 D0 = A D1 + qr^T dO - kr^T dE
//              dqr = dO S0^T    dkr = -dE S0^T    dkw = U D1^T    dP = dO U^T    dM = -dE U^T
//
// The dot products inside the block, M_ti (i < t) and P_ti (i <= t), share one square MP [C][C]: M below the diagonal,
// P turned over on and above it. Their adjoints are kept alike. A Square is anything that has numbers by an index.
#pragma once

template <int C>
FWP_HD constexpr int M_at(int t, int i) {
  return t * C + i;
}
template <int C>
FWP_HD constexpr int P_at(int t, int i) {
  return i * C + t;
}

//   e_t from the rule    u_t = beta_t e_t    o_t = X_t + sum_{i<=t} P_ti u_i,   P_ti = q_t . (k_i decayed from i to t)
template <class Rule, int C, class P, class T, class Square>
FWP_HD void block_fwd(const P* R, const P* X, const Square& MP, const P* v, const T* beta, P* e, P* u, P* o) {
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    e[t] = Rule::template error<C>(t, v[t], R[t], MP, u);
    u[t] = beta[t] * e[t];
    o[t] = X[t];
    FWP_UNROLL for (int i = 0; i < C; ++i) if (i <= t) o[t] += MP[P_at<C>(t, i)] * u[i];
  }
}

//   p_t = Z_t + sum_{j>=t} P_jt do_j - (later predictions)    de_t = dv_t = beta_t p_t    dbeta_t = sum over columns
//   p_t e_t
template <class Rule, int C, class P, class T, class Square>
FWP_HD void block_bwd(const P* Z, const Square& MP, const P* d_o, const T* beta, P* p, P* de) {
  FWP_UNROLL for (int t = C - 1; t >= 0; --t) {
    p[t] = Z[t];
    FWP_UNROLL for (int j = C - 1; j >= 0; --j) if (j >= t) p[t] += MP[P_at<C>(j, t)] * d_o[j];
    p[t] = Rule::template written_adjoint<C>(t, p[t], MP, de);
    de[t] = beta[t] * p[t];
  }
}
