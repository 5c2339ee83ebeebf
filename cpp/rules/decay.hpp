// Decay inside a block of C tokens: S' = diag(a_t) S, a_t = exp(g_t), one number or one per key channel (RFA gate,
// RetNet, Mamba-2, GLA, Gated DeltaNet, KDA).  Texts are for one pack P of key channels; channels meet only in M, P
// and, for a scalar gate, in dg.
//
//   kr_t = a_1..a_t k_t            how token t reads the block's first state (qr_t likewise, q carries the scale)
//   kw_i = a_{i+1}..a_C k_i        how write i arrives in the block's last state
//   A = a_1..a_C                   how the first state arrives there
//   M_ti = k_t . (a_{i+1}..a_t k_i)  for i < t          P_ti = q_t . (a_{i+1}..a_t k_i)  for i <= t
//
// Only products of the a_t themselves occur, never quotients or differences of prefix sums, and every term of
// dg_t = <dS'_t, S'_t> carries the factor a_t: nothing cancels. A block ends before such a product could leave the
// range of the arithmetic (scan/block.hpp).
#pragma once

struct NoDecay {
  static constexpr bool decays = false, per_channel = false;
};
struct ScalarDecay {
  static constexpr bool decays = true, per_channel = false;
};
struct ChannelDecay {
  static constexpr bool decays = true, per_channel = true;
};

// Forward: A, kr, qr and kw of the block, and this pack's share of the dot products MP (block.hpp), added to them. M
// only where the rule predicts.
template <class Decay, bool predicts, int C, class P>
FWP_HD void decay_block_fwd(const P* k, const P* q, const P* a, P& A, P* kr, P* qr, P* kw, P* MP) {
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    if constexpr (Decay::decays) A = t == 0 ? a[0] : A * a[t];
    kr[t] = Decay::decays ? A * k[t] : k[t];
    qr[t] = Decay::decays ? A * q[t] : q[t];
    FWP_UNROLL for (int i = 0; i < C; ++i) if (i < t) {  // kw_i: decayed up to t
      if constexpr (Decay::decays) kw[i] *= a[t];
      if constexpr (predicts) MP[M_at<C>(t, i)] += k[t] * kw[i];
      MP[P_at<C>(t, i)] += q[t] * kw[i];
    }
    kw[t] = k[t];
    MP[P_at<C>(t, t)] += q[t] * k[t];
  }
}

// Backward: from the adjoints dkr, dqr, dkw, dM and dP (in one square dMP, block.hpp) and, for dg,
// the channel sums H = sum over value columns of D1 * S0, the gradients dk, dq and dg of this pack of channels. A rule
// that does not predict has no kr and no M; leaving them out, rather than adding zeros, keeps a NaN from reaching what
// does not depend on it.
template <class Decay, bool predicts, int C, class P, class Square>
FWP_HD void decay_block_bwd(const P* k, const P* q, const P* a, const P* dkr, const P* dqr, const P* dkw,
                            const Square& dMP, P H, P* dk, P* dq, P* dg) {
  using T = decltype(+dMP[0]);
  P A[C], B[C];  // a_1..a_t and a_{t+1}..a_C
  if constexpr (Decay::decays) {
    A[0] = a[0];
    FWP_UNROLL for (int t = 1; t < C; ++t) A[t] = A[t - 1] * a[t];
    B[C - 1] = P{} + T(1);
    FWP_UNROLL for (int t = C - 1; t > 0; --t) B[t - 1] = B[t] * a[t];
  }
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    dq[t] = (Decay::decays ? A[t] * dqr[t] : dqr[t]) + dMP[P_at<C>(t, t)] * k[t];
    dk[t] = (Decay::decays ? B[t] * dkw[t] : dkw[t]) + dMP[P_at<C>(t, t)] * q[t];
    if constexpr (predicts) dk[t] += Decay::decays ? A[t] * dkr[t] : dkr[t];
  }
  if constexpr (Decay::decays) {
    // Through a_s pass: the first state on its way to D1 (H) and to the reads t >= s, and the writes i < s to D1.
    P reads = A[C - 1] * H, writes = P{};
    FWP_UNROLL for (int s = C - 1; s >= 0; --s) {
      reads += A[s] * (predicts ? q[s] * dqr[s] + k[s] * dkr[s] : q[s] * dqr[s]);
      dg[s] = reads;
    }
    FWP_UNROLL for (int s = 1; s < C; ++s) {
      writes += k[s - 1] * (B[s - 1] * dkw[s - 1]);
      dg[s] += writes;
    }
  }
  FWP_UNROLL for (int i = 0; i < C - 1; ++i) {
    P L = P{} + T(1);  // a_{i+1}..a_j
    FWP_UNROLL for (int j = i + 1; j < C; ++j) {
      const T m = dMP[M_at<C>(j, i)], p = dMP[P_at<C>(j, i)];
      const P x = predicts ? p * q[j] + m * k[j] : p * q[j];
      if constexpr (Decay::decays) L *= a[j];
      const P Lk = Decay::decays ? L * k[i] : k[i];
      dq[j] += p * Lk;
      if constexpr (predicts) dk[j] += m * Lk;
      dk[i] += Decay::decays ? L * x : x;
      if constexpr (Decay::decays) FWP_UNROLL for (int s = i + 1; s <= j; ++s) dg[s] += Lk * x;
    }
  }
}
