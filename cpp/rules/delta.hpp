// The delta rule: predict the value stored under the key and write the error.  Schlag, Irie, Schmidhuber 2021,
// eqs. 20-25.  S' [K,V] is the decayed state (the paper's W transposed).
//
//   e = v - S'^T k               prediction error
//   u = beta e                   what is written
//   S = S' + k u^T               write                          \ shared by all rules: block.hpp
//   o = S^T q                    read, after the write          /
//
// Gradient, with D = dL/dS including this token's own read and p = D^T k the adjoint of u:
//
//   de = dv = beta p             dbeta = <p, e>
//   dS' = D - k de^T             the prediction read S', so its adjoint flows back along k
//   dk = D u - S' de             dq = S do
//
// In a block of C tokens the state of token t is the block's first state and the writes i < t, each decayed on its way:
// r_t = the first state read with k_t, and M_ti = k_t . (k_i decayed from i to t).
#pragma once

struct Delta {
  static constexpr bool predicts = true;

  // e_t = v_t - r_t - sum_{i<t} M_ti u_i
  template <int C, class P, class Square>
  FWP_HD static P error(int t, P v, P r, const Square& MP, const P* u) {
    P e = v - r;
    FWP_UNROLL for (int i = 0; i < C; ++i) if (i < t) e -= MP[M_at<C>(t, i)] * u[i];
    return e;
  }

  // Adjoint of u_t: p_t, which came through writes and reads, less sum_{j>t} M_jt de_j through later predictions.
  template <int C, class P, class Square>
  FWP_HD static P written_adjoint(int t, P p, const Square& MP, const P* de) {
    FWP_UNROLL for (int j = C - 1; j > 0; --j) if (j > t) p -= MP[M_at<C>(j, t)] * de[j];
    return p;
  }
};
