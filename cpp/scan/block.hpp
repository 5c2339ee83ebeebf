// A block of C tokens of one head, staged: rows widened to the accumulation type, padded to whole packs and decayed
// (rules/decay.hpp). Staging does not depend on the value columns; all tiles of a head share it.
#pragma once

#include "../rules/block.hpp"
#include "../rules/decay.hpp"
#include "../rules/delta.hpp"
#include "../rules/linear.hpp"
//
#include "../features/attention_norm.hpp"
#include "keys.hpp"

namespace fwp {
namespace {

template <class Tile, class Rule, class Decay, int C>
struct Block {
  using T = typename Tile::Scalar;
  using P = typename Tile::P;
  T* kq;        // [2C][ld]  k_t, then scale * q_t (with attention_norm q_t); zero rows from token n on
  T* kq_r;      // [2C][ld]  kr_t, then qr_t: as they read the block's first state
  T* k_w;       // [C][ld]   kw_i: as it is written into the block's last state
  T* a;         // [C][ld] per channel, [C] per head: decays
  T* A;         // [ld]
  T* MP;        // [C][C], rules/block.hpp
  T* beta;      // [C]
  T* keep;      // [ld]  where the first token resets: 0 for the channels it clears, 1 for the others
  T* z;         // [ld]  with attention_norm: the keys gathered before the block, and
  T* divisor;   // [2C]  what reads are divided by, where they are not
  bool* blind;  // [2C]
  bool resets;
  int n;  // tokens

  static Block take(Arena& arena, const Problem& p, int64_t ld) {
    Block b;
    b.kq = arena.take<T>(2 * C * ld);
    b.kq_r = Decay::decays || p.attention_norm ? arena.take<T>(2 * C * ld) : b.kq;
    b.k_w = Decay::decays ? arena.take<T>(C * ld) : b.kq;
    b.a = arena.take<T>(Decay::per_channel ? C * ld : Tile::template room<C>);
    b.A = Decay::decays ? arena.take<T>(ld) : nullptr;
    b.MP = arena.take<T>(Tile::template room<C * C>);
    b.beta = arena.take<T>(C);
    b.keep = Decay::decays ? arena.take<T>(ld) : nullptr;
    b.z = p.attention_norm ? arena.take<T>(ld) : nullptr;
    b.divisor = p.attention_norm ? arena.take<T>(2 * C) : nullptr;
    b.blind = p.attention_norm ? arena.take<bool>(2 * C) : nullptr;
    b.resets = false;
    b.n = 0;
    return b;
  }

  P decay(int t, int64_t d, int64_t ld) const {
    if constexpr (Decay::per_channel) return Tile::load(a + t * ld + d);
    return Tile::broadcast(a[t]);
  }

  // Stages the tokens from t0 on, at most C and none from `end` on; returns how many. With attention_norm z [ld], the
  // keys gathered so far, moves on with them.
  int stage(const Problem& p, const Geometry& g, const Keys<Tile>& keys, const Head& head, int64_t t0, int64_t end,
            T* running_z) {
    const int64_t ld = g.ld;
    const T factor = p.attention_norm ? 1 : static_cast<T>(p.scale);
    n = end - t0 < C ? static_cast<int>(end - t0) : C;
    if constexpr (Decay::decays) stage_decay(head.g, p.K, ld, t0);
    for (int t = 0; t < n; ++t) {
      keys.stage(head.k, t0 + t, kq + t * ld, ld);
      if (head.q.data) keys.stage(head.q, t0 + t, kq + (C + t) * ld, ld, factor);
    }
    const int queries = head.q.data ? n : 0;
    fill<T>(kq + n * ld, (C - n) * ld, 0);
    fill<T>(kq + (C + queries) * ld, (C - queries) * ld, 0);
    multiply(ld);
    if (p.attention_norm) {
      const int seen = divide(p, ld, running_z);
      if (seen < n) return stage(p, g, keys, head, t0, t0 + seen, running_z);
      attention_norm_fwd<Tile, Decay, Rule::predicts, C>(unread(), k_w, A, ld, divisor, blind, static_cast<T>(p.scale),
                                                         running_z, kq_r, MP);
    }
    return stage_beta(head, t0);
  }

  // What is left to do for a head with the same keys and queries (and no gates) as the one staged.
  int stage_beta(const Head& head, int64_t t0) {
    fill<T>(beta, n, 1);
    for (int t = 0; t < n && head.beta.data; ++t) stage_row<Tile>(head.beta, t0 + t, 0, 1, beta + t, 1);
    fill<T>(beta + n, C - n, 0);
    return n;
  }

  // Clears the rows of a tile that the first token resets.
  void reset(const Problem& p, T* S, ptrdiff_t stride = Tile::kColumns) const {
    if (!resets) return;
    for (int64_t d = 0; d < p.K; ++d)
      if (keep[d] == 0) fill<T>(S + d * stride, Tile::kColumns, 0);
  }
  // The same for z, or its adjoint; with the padding, which a gate that is NaN has reached.
  void reset_z(int64_t ld, T* numbers) const {
    for (int64_t d = 0; d < ld && resets; ++d) numbers[d] = keep[d] == 0 ? 0 : numbers[d];
  }

  // Clears the rows [C][columns] of reads that attention_norm makes 0: predictions (first = 0), outputs (first = C).
  void clear_blind(T* rows, int first) const {
    for (int t = 0; t < n && z; ++t)
      if (blind[first + t]) fill<T>(rows + t * Tile::kColumns, Tile::kColumns, 0);
  }

 private:
  // Where the block ends: before any token whose gate, with those of the block so far, might take a product of decays
  // out of the range of T. So products inside a block are as good as the recurrence's own steps, whatever the gates,
  // and a gate that is not finite stands first: there a reset (g = -inf) clears the state by selection, and nothing of
  // the past survives it, not even NaN. The past alone decides: the rule is causal.
  void stage_decay(const HeadRows& g, int64_t K, int64_t ld, int64_t t0) {
    const int64_t width = Decay::per_channel ? K : 1, padded = Decay::per_channel ? ld : 1;
    const int64_t size = Decay::per_channel ? C * ld : Tile::template room<C>;
    for (int t = 0; t < n; ++t) stage_row<Tile>(g, t0 + t, 0, width, a + t * padded, padded);
    bool fits = in_range(n, padded);
    while (!fits && n > 1) fits = in_range(--n, padded);
    resets = false;
    for (int64_t d = 0; d < width && !fits; ++d) resets |= a[d] == -kInfinity;
    for (int64_t d = 0; d < ld && resets; ++d) keep[d] = a[Decay::per_channel ? d : 0] == -kInfinity ? 0 : 1;
    fill<T>(a + n * padded, size - n * padded, 0);  // tokens that are not there do not decay
    for (int64_t i = 0; i < size; i += Tile::kWidth) Tile::store(a + i, Tile::exp(Tile::load(a + i)));
  }

  // Whether the gates of the first tokens, summed in magnitude, leave room for the data in every channel: float data
  // between 1e-12 and 1e12 in size.
  bool in_range(int tokens, int64_t padded) const {
    constexpr T kRange = sizeof(T) == 8 ? 600 : 60;
    if constexpr (!Decay::per_channel) {
      T sum = 0;
      for (int t = 0; t < tokens; ++t) sum += a[t] < 0 ? -a[t] : a[t];
      return sum <= kRange;
    }
    P outside = {};  // above 0 or NaN in a lane that is out of range
    for (int64_t d = 0; d < padded; d += Tile::kWidth) {
      P sum = {};
      for (int t = 0; t < tokens; ++t) {
        const P x = Tile::load(a + t * padded + d);
        sum += x < 0 ? -x : x;
      }
      outside += sum <= kRange ? P{} : sum;
    }
    T total = 0;
    for (int l = 0; l < Tile::kWidth; ++l) total += outside[l];
    return total == 0;
  }
  static constexpr T kInfinity = static_cast<T>(__builtin_inf());

  // The decayed rows, and the dot products inside the block.
  void multiply(int64_t ld) {
    P x[Tile::template room<C * C>] = {};
    for (int64_t d = 0; d < ld; d += Tile::kWidth) {
      P k[C], q[C], at[C] = {}, A_d = {}, kr[C], qr[C], kw[C];
      FWP_UNROLL for (int t = 0; t < C; ++t) {
        k[t] = Tile::load(kq + t * ld + d);
        q[t] = Tile::load(kq + (C + t) * ld + d);
        if constexpr (Decay::decays) at[t] = decay(t, d, ld);
      }
      decay_block_fwd<Decay, Rule::predicts, C>(k, q, at, A_d, kr, qr, kw, x);
      if constexpr (Decay::decays) {
        Tile::store(A + d, A_d);
        FWP_UNROLL for (int t = 0; t < C; ++t) {
          Tile::store(kq_r + t * ld + d, kr[t]);
          Tile::store(kq_r + (C + t) * ld + d, qr[t]);
          Tile::store(k_w + t * ld + d, kw[t]);
        }
      }
    }
    Tile::template sums<C * C>(x, MP);
  }

  // kr and qr before attention_norm divides them.
  const T* unread() const { return Decay::decays ? kq_r : kq; }

  // The divisors of attention_norm. Returns where the block has to end: before any token whose prediction is 0 because
  // it shares nothing with z. Such a token stands first, where no NaN of the block can reach it.
  int divide(const Problem& p, int64_t ld, T* running_z) {
    reset_z(ld, running_z);
    copy_in<Tile>(running_z, ld, z, ld);
    attention_norm_divisors<Tile, Rule::predicts, C>(unread(), z, ld, MP, n, static_cast<T>(p.eps), divisor, blind);
    for (int t = 1; t < n && Rule::predicts; ++t)
      if (blind[t]) return t;
    return n;
  }
};

// Forward through one block on one tile: from v and the tile S the errors e, what is written u and, if it is asked for,
// the output o, all [C][columns]; then the tile after the block in S_out, which may be S. A reset clears S itself.
// RX [2C][columns] is scratch. Rows of the tile are `stride` apart; the memory `ahead` numbers after it is asked for.
template <bool output, class Tile, class Rule, class Decay, int C, class T>
void advance(const Block<Tile, Rule, Decay, C>& b, const Problem& p, int64_t ld, const T* v, T* S, T* S_out, T* RX,
             T* e, T* u, T* o, ptrdiff_t stride = Tile::kColumns, ptrdiff_t ahead = 0) {
  using P = typename Tile::P;
  constexpr int W = Tile::kWidth, cols = Tile::kColumns;
  constexpr int first = Rule::predicts ? 0 : C, end = output ? 2 * C : C;  // rows of keys, then of queries
  b.reset(p, S, stride);
  if (output && ahead != 0)
    Tile::template read<end - first, true>(b.kq_r + first * ld, ld, p.K, S, RX + first * cols, stride, ahead);
  else if constexpr (end > first)
    Tile::template read<end - first>(b.kq_r + first * ld, ld, p.K, S, RX + first * cols, stride);
  if constexpr (Rule::predicts) b.clear_blind(RX, 0);
  for (int j = 0; j < cols; j += W) {
    P R[C] = {}, X[C] = {}, vj[C], ej[C], uj[C], oj[C];
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      if constexpr (Rule::predicts) R[t] = Tile::load(RX + t * cols + j);
      if constexpr (output) X[t] = Tile::load(RX + (C + t) * cols + j);
      vj[t] = Tile::load(v + t * cols + j);
    }
    block_fwd<Rule, C>(R, X, b.MP, vj, b.beta, ej, uj, oj);
    FWP_UNROLL for (int t = 0; t < C; ++t) {
      Tile::store(e + t * cols + j, ej[t]);
      Tile::store(u + t * cols + j, uj[t]);
      if constexpr (output) Tile::store(o + t * cols + j, oj[t]);
    }
  }
  if constexpr (output) b.clear_blind(o, C);
  Tile::template write_some<C, Decay::decays>(b.n, b.k_w, ld, p.K, b.A, u, S, S_out, stride);
}

}  // namespace
}  // namespace fwp
