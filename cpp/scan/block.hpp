// A block of C tokens of one head, staged: rows widened to the accumulation type, padded to whole packs and decayed
// (rules/decay.hpp). Staging does not depend on the value columns; all tiles of a head share it.
#pragma once

#include "../rules/block.hpp"
#include "../rules/decay.hpp"
#include "../rules/delta.hpp"
#include "../rules/linear.hpp"
#include "rows.hpp"

namespace fwp {
namespace {

// Where the block that starts at token t ends: after C tokens, but before any whose gate, with those of the block so
// far, might take a product of decays out of the range of T. So products inside a block are as good as the recurrence's
// own steps, whatever the gates, and a gate that is not finite stands first: there a reset (g = -inf) clears the state
// by selection, and nothing of the past survives it, not even NaN. The past alone decides: the rule is causal.
template <class Tile, class Decay, int C>
int block_length(const Head& head, int64_t K, int64_t t, int64_t end) {
  using T = typename Tile::Scalar;
  const int most = end - t < C ? static_cast<int>(end - t) : C;
  if constexpr (Decay::decays) {
    constexpr T kRange = sizeof(T) == 8 ? 600 : 60;  // exp of it, and of minus it, leave room for the data
    T range = 0;
    for (int i = 0; i < most; ++i) {
      range += gate_size<Tile, T>(head.g, t + i, Decay::per_channel ? K : 1);
      if (i > 0 && !(range <= kRange)) return i;
    }
  }
  return most;
}

template <class Tile, class Decay, int C>
struct Block {
  using T = typename Tile::Scalar;
  using P = typename Tile::P;
  T* kq;    // [2C][ld]  k_t, then scale * q_t; zero rows from token n on
  T* kq_r;  // [2C][ld]  kr_t, then qr_t: as they read the block's first state
  T* k_w;   // [C][ld]   kw_i: as it is written into the block's last state
  T* a;     // [C][ld] per channel, [C] per head
  T* A;     // [ld]
  T* M;     // [C][C], lower triangle
  T* P_;    // [C][C], lower triangle
  T* beta;  // [C]
  T* keep;  // [ld]  where the first token resets: 0 for the channels it clears, 1 for the others
  bool resets;
  int n;  // tokens

  static Block take(Arena& arena, int64_t ld) {
    Block b;
    b.kq = arena.take<T>(2 * C * ld);
    b.kq_r = Decay::decays ? arena.take<T>(2 * C * ld) : b.kq;
    b.k_w = Decay::decays ? arena.take<T>(C * ld) : b.kq;
    b.a = arena.take<T>(Decay::per_channel ? C * ld : C);
    b.A = Decay::decays ? arena.take<T>(ld) : nullptr;
    b.M = arena.take<T>(C * C);
    b.P_ = arena.take<T>(C * C);
    b.beta = arena.take<T>(C);
    b.keep = Decay::decays ? arena.take<T>(ld) : nullptr;
    b.resets = false;
    b.n = 0;
    return b;
  }

  P decay(int t, int64_t d, int64_t ld) const {
    if constexpr (Decay::per_channel) return Tile::load(a + t * ld + d);
    return Tile::broadcast(a[t]);
  }

  void stage(const Problem& p, const Geometry& g, const Head& head, int64_t t0, int tokens) {
    n = tokens;
    const int64_t ld = g.ld;
    for (int t = 0; t < n; ++t) {
      stage_row<Tile>(head.k, t0 + t, 0, p.K, kq + t * ld, ld);
      stage_row<Tile>(head.q, t0 + t, 0, p.K, kq + (C + t) * ld, ld, static_cast<T>(p.scale));
      beta[t] = 1;
      if (head.beta.data) stage_row<Tile>(head.beta, t0 + t, 0, 1, beta + t, 1);
    }
    fill<T>(kq + n * ld, (C - n) * ld, 0);
    fill<T>(kq + (C + n) * ld, (C - n) * ld, 0);
    fill<T>(beta + n, C - n, 0);
    if constexpr (Decay::decays) stage_decay(head.g, p.K, ld, t0);
    token<0>(ld);
  }

  // Clears the rows of a tile that the first token resets.
  void reset(const Problem& p, T* S) const {
    if (!resets) return;
    for (int64_t d = 0; d < p.K; ++d)
      if (keep[d] == 0) fill<T>(S + d * Tile::kColumns, Tile::kColumns, 0);
  }

 private:
  void stage_decay(const HeadRows& g, int64_t K, int64_t ld, int64_t t0) {
    const int64_t width = Decay::per_channel ? K : 1, padded = Decay::per_channel ? ld : 1;
    for (int t = 0; t < n; ++t) stage_row<Tile>(g, t0 + t, 0, width, a + t * padded, padded);
    fill<T>(a + n * padded, (C - n) * padded, 0);  // tokens that are not there do not decay
    if constexpr (Decay::per_channel)
      for (int64_t i = 0; i < C * ld; i += Tile::kWidth) Tile::store(a + i, Tile::exp(Tile::load(a + i)));
    else
      for (int t = 0; t < C; ++t) a[t] = Tile::exp(Tile::broadcast(a[t]))[0];
    resets = false;
    for (int64_t d = 0; d < width; ++d) resets |= is_reset<Tile>(g, t0, d);
    if (!resets) return;
    for (int64_t d = 0; d < ld; ++d) keep[d] = Decay::per_channel && (d >= K || !is_reset<Tile>(g, t0, d)) ? 1 : 0;
  }

  template <int t>
  void token(int64_t ld) {
    constexpr int sums = 2 * t + 1, room = (sums + Tile::kWidth - 1) / Tile::kWidth * Tile::kWidth;
    P x[room] = {};  // the dot products m[0..t), p[0..t]
    for (int64_t d = 0; d < ld; d += Tile::kWidth) {
      P kw[t + 1], kr, qr, A_t = Tile::broadcast(T(1));
      for (int i = 0; i < t; ++i) kw[i] = Tile::load(k_w + i * ld + d);
      if constexpr (Decay::decays && t > 0) A_t = Tile::load(A + d);
      decay_token_fwd<Decay, t>(Tile::load(kq + t * ld + d), Tile::load(kq + (C + t) * ld + d), decay(t, d, ld), A_t,
                                kr, qr, kw, x, x + t);
      if constexpr (Decay::decays) {
        Tile::store(A + d, A_t);
        Tile::store(kq_r + t * ld + d, kr);
        Tile::store(kq_r + (C + t) * ld + d, qr);
        for (int i = 0; i <= t; ++i) Tile::store(k_w + i * ld + d, kw[i]);
      }
    }
    T out[sums];
    Tile::template sums<sums>(x, out);
    for (int i = 0; i < t; ++i) M[t * C + i] = out[i];
    for (int i = 0; i <= t; ++i) P_[t * C + i] = out[t + i];
    if constexpr (t + 1 < C) token<t + 1>(ld);
  }
};

// Forward through one block on one tile: from v and the tile S the errors e, what is written u and, if it is asked for,
// the output o, all [C][columns]; then the tile after the block in S_out, which may be S. A reset clears S itself.
// RX [2C][columns] is scratch.
template <class Rule, bool output, class Tile, class Decay, int C, class T>
void advance(const Block<Tile, Decay, C>& b, const Problem& p, int64_t ld, const T* v, T* S, T* S_out, T* RX, T* e,
             T* u, T* o) {
  using P = typename Tile::P;
  constexpr int W = Tile::kWidth, cols = Tile::kColumns;
  b.reset(p, S);
  if constexpr (Rule::predicts && output)
    Tile::template read<2 * C>(b.kq_r, ld, p.K, S, RX);
  else if constexpr (Rule::predicts)
    Tile::template read<C>(b.kq_r, ld, p.K, S, RX);
  else if constexpr (output)
    Tile::template read<C>(b.kq_r + C * ld, ld, p.K, S, RX + C * cols);
  for (int j = 0; j < cols; j += W) {
    P R[C] = {}, X[C] = {}, vj[C], ej[C], uj[C], oj[C];
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      if constexpr (Rule::predicts) R[t] = Tile::load(RX + t * cols + j);
      if constexpr (output) X[t] = Tile::load(RX + (C + t) * cols + j);
      vj[t] = Tile::load(v + t * cols + j);
    }
    block_fwd<Rule, C>(R, X, b.M, b.P_, vj, b.beta, ej, uj, oj);
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      Tile::store(e + t * cols + j, ej[t]);
      Tile::store(u + t * cols + j, uj[t]);
      if constexpr (output) Tile::store(o + t * cols + j, oj[t]);
    }
  }
  Tile::template write_some<C, Decay::decays>(b.n, b.k_w, ld, p.K, b.A, u, S, S_out);
}

}  // namespace
}  // namespace fwp
