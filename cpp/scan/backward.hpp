// Time, backward: some heads, or some tiles of a head, of one sequence, a window of tokens, from the last to the first.
//
// Forward left a checkpoint of the state every `segment` tokens. Each segment is run forward once more, keeping the
// state before every block, and then backward block by block with the adjoint D of the state. So every gradient,
// dg = <dS', S'> among them, sees the state and its adjoint side by side. Memory: the checkpoints, V numbers per
// token, and what a segment and a window need, whatever T.
#pragma once

#include "forward.hpp"

namespace fwp {
namespace {

template <class Tile, class Rule, class Decay, int C>
struct BackwardScratch {
  using T = typename Tile::Scalar;
  Keys<Tile> keys;
  Head* heads;
  Block<Tile, Rule, Decay, C>* blocks;
  T* z;               // [ld], with attention_norm: the keys gathered before the blocks to be staged
  T* S;               // the state before each block, and after the last
  T *e, *u;           // [segment][columns]
  T *v, *RX;          // as in forward
  T *minus_de, *d_o;  // [C][columns], one after the other
  T *Z, *p, *de;
  T *dkr, *dqr, *dkw, *H;  // [C][ld], H [ld]
  T *dk, *dq, *dg;
  HeadGradients sums;  // of one segment, for gradients that are not added up where they shall be

  BackwardScratch(Arena& arena, const Problem& problem, const Geometry& g, int64_t head_count) : keys(arena, problem) {
    heads = arena.take<Head>(head_count);
    const int64_t count = g.segment / C, cols = g.columns;
    blocks = arena.take<Block<Tile, Rule, Decay, C>>(count);
    const bool counting = blocks == nullptr;
    for (int64_t i = 0; i < count; ++i) {
      const auto block = Block<Tile, Rule, Decay, C>::take(arena, problem, g.ld);
      if (!counting) blocks[i] = block;
    }
    z = arena.take<T>(problem.attention_norm ? g.ld : 0);
    S = arena.take<T>((count + 1) * g.ld * cols);
    e = arena.take<T>(g.segment * cols);
    u = arena.take<T>(g.segment * cols);
    v = arena.take<T>(C * cols);
    RX = arena.take<T>(2 * C * cols);
    minus_de = arena.take<T>(2 * C * cols);
    d_o = counting ? nullptr : minus_de + C * cols;
    Z = arena.take<T>(C * cols);
    p = arena.take<T>(C * cols);
    de = arena.take<T>(C * cols);
    dkr = arena.take<T>(C * g.ld);
    dqr = arena.take<T>(C * g.ld);
    dkw = arena.take<T>(C * g.ld);
    H = arena.take<T>(g.ld);
    dk = arena.take<T>(C * g.ld);
    dq = arena.take<T>(C * g.ld);
    dg = arena.take<T>(C * g.ld);
    const auto rows = [&](int64_t width, bool apart) {
      return GradientRows{arena.take<T>(apart ? g.segment * width : 0), width, kDType<T>};
    };
    const bool mapped = g.rounds || problem.features.active();
    sums = {rows(g.ld, mapped), rows(g.ld, mapped), rows(g.tiles * cols, g.rounds), rows(1, g.rounds),
            rows(g.ld, g.rounds)};
  }
};

// Columns from `first` of row t; `add`: on top of what an earlier tile left there.
template <class Tile, class T>
void put_row(const GradientRows& rows, int64_t t, int64_t first, const T* from, int64_t n, bool add) {
  if (!rows.data) return;
  T* to = static_cast<T*>(rows.data) + t * rows.stride + first;  // of dtype T: see segment_rows
  if (!add) return copy_out<Tile>(from, n, to);
  int64_t i = 0;
  for (; i + Tile::kWidth <= n; i += Tile::kWidth)
    Tile::store_unaligned(to + i, Tile::load_unaligned(to + i) + Tile::load(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// dP_ti = do_t . u_i for i <= t and dM_ti = -de_t . u_i for i < t in the square dMP, after it dbeta_t = p_t . e_t: sums
// over the columns.
template <class Rule, class Tile, int C, class T>
void column_sums(const T* d_o, const T* minus_de, const T* p, const T* u, const T* e, T* out) {
  using P = typename Tile::P;
  constexpr int W = Tile::kWidth, cols = Tile::kColumns, sums = C * C + C;
  const auto dot = [](const T* a, const T* b) {
    return Tile::load(a) * Tile::load(b) + Tile::load(a + W) * Tile::load(b + W);
  };
  P x[Tile::template room<sums>] = {};
  FWP_UNROLL for (int t = 0; t < C; ++t) {
    FWP_UNROLL for (int i = 0; i < C; ++i) if (i <= t) x[P_at<C>(t, i)] = dot(d_o + t * cols, u + i * cols);
    if constexpr (Rule::predicts)
      FWP_UNROLL for (int i = 0; i < C; ++i) if (i < t) x[M_at<C>(t, i)] = dot(minus_de + t * cols, u + i * cols);
    x[C * C + t] = dot(p + t * cols, e + t * cols);
  }
  Tile::template sums<sums>(x, out);
}

// p, de and -de of the block from Z and do.
template <class Tile, class Rule, class Decay, int C>
void error_adjoints(const Block<Tile, Rule, Decay, C>& b, BackwardScratch<Tile, Rule, Decay, C>& s) {
  using P = typename Tile::P;
  constexpr int W = Tile::kWidth, cols = Tile::kColumns;
  for (int j = 0; j < cols; j += W) {
    P Z[C], d_o[C], p[C], de[C];
    FWP_UNROLL for (int i = 0; i < C; ++i) {
      Z[i] = Tile::load(s.Z + i * cols + j);
      d_o[i] = Tile::load(s.d_o + i * cols + j);
    }
    block_bwd<Rule, C>(Z, b.MP, d_o, b.beta, p, de);
    FWP_UNROLL for (int i = 0; i < C; ++i) {
      const P there = i < b.n ? de[i] : P{};  // rows beyond the last token must not reach D
      Tile::store(s.p + i * cols + j, p[i]);
      Tile::store(s.de + i * cols + j, there);
      Tile::store(s.minus_de + i * cols + j, -there);
    }
  }
}

// dk, dq and dg of every token from the sums over the columns. dg of a scalar gate stands first in its row.
template <class Tile, class Rule, class Decay, int C, class T>
void key_gradients(const Problem& p, const Geometry& g, const Block<Tile, Rule, Decay, C>& b,
                   BackwardScratch<Tile, Rule, Decay, C>& s, const T* dMP) {
  using P = typename Tile::P;
  const int64_t ld = g.ld;
  const P scale = Tile::broadcast(p.attention_norm ? 1 : static_cast<T>(p.scale));
  P dg_sum[Tile::template room<C>] = {};
  for (int64_t d = 0; d < ld; d += Tile::kWidth) {
    P k[C], q[C], a[C] = {}, dkr[C] = {}, dqr[C] = {}, dkw[C] = {}, dk[C], dq[C], dg[C] = {}, H = {};
    for (int i = 0; i < C; ++i) {
      k[i] = Tile::load(b.kq + i * ld + d);
      q[i] = Tile::load(b.kq + (C + i) * ld + d);
      if constexpr (Decay::decays) a[i] = b.decay(i, d, ld);
      if (i >= b.n) continue;
      dqr[i] = Tile::load(s.dqr + i * ld + d);
      dkw[i] = Tile::load(s.dkw + i * ld + d);
      if constexpr (Rule::predicts) dkr[i] = Tile::load(s.dkr + i * ld + d);
    }
    if constexpr (Decay::decays) H = Tile::load(s.H + d);
    decay_block_bwd<Decay, Rule::predicts, C>(k, q, a, dkr, dqr, dkw, dMP, H, dk, dq, dg);
    if (b.resets) dg[0] = Tile::load(b.keep + d) != P{} ? dg[0] : P{};
    for (int i = 0; i < C; ++i) {
      Tile::store(s.dk + i * ld + d, dk[i]);
      Tile::store(s.dq + i * ld + d, dq[i] * scale);
      if constexpr (Decay::per_channel)
        Tile::store(s.dg + i * ld + d, dg[i]);
      else
        dg_sum[i] += dg[i];
    }
  }
  if constexpr (Decay::decays && !Decay::per_channel) {
    alignas(P) T sums[Tile::template room<C>];
    Tile::template sums<C>(dg_sum, sums);
    for (int i = 0; i < C; ++i) s.dg[i * ld] = sums[i];
  }
}

// The adjoint of a tile, and after it the tile's part in the adjoint of z, which every tile takes back by itself: what
// the tiles read of z adds up.
template <class T>
T* adjoint_of(const BackwardPart& part, const Geometry& g, int64_t h, int64_t tile) {
  return static_cast<T*>(part.D) + (h * g.tiles + tile) * g.tile;
}

// One block backward on one tile: S is the state before it, D the adjoint of the state after it, in place that before.
template <class Tile, class Rule, class Decay, int C, class T>
void retreat(const Problem& p, const Geometry& g, const Block<Tile, Rule, Decay, C>& b,
             BackwardScratch<Tile, Rule, Decay, C>& s, const T* S, const T* e, const T* u, T* D, int64_t t,
             const BackwardPart& part, int64_t tile, const HeadGradients& out) {
  constexpr int cols = Tile::kColumns;
  const int64_t ld = g.ld;
  Tile::template read<C>(b.k_w, ld, p.K, D, s.Z);
  error_adjoints(b, s);
  if constexpr (Rule::predicts) b.clear_blind(s.minus_de, 0);

  alignas(typename Tile::P) T dMP[Tile::template room<C * C + C>];
  column_sums<Rule, Tile, C>(s.d_o, s.minus_de, s.p, u, e, dMP);
  for (int i = 0; i < b.n; ++i) {
    Tile::read_columns(S, ld, s.d_o + i * cols, s.dqr + i * ld);
    Tile::read_columns(D, ld, u + i * cols, s.dkw + i * ld);
    if constexpr (Rule::predicts) Tile::read_columns(S, ld, s.minus_de + i * cols, s.dkr + i * ld);
  }
  if constexpr (Decay::decays) Tile::dot_rows(S, D, ld, s.H);
  if (p.attention_norm) {
    T* const dz = D + ld * cols;
    const auto a = [&](int i, int64_t d) { return b.decay(i, d, ld); };
    attention_norm_bwd<Tile, Decay, Rule::predicts, C>(b.kq, a, b.kq_r, b.MP, b.divisor, b.blind, b.z, ld, b.n,
                                                       static_cast<T>(p.scale), s.dkr, s.dqr, s.dkw, dMP, s.H, dz);
    b.reset_z(ld, dz);
  }
  key_gradients(p, g, b, s, dMP);

  const int64_t width = tile_width(p, g, tile), gates = Decay::per_channel ? p.K : 1;
  const bool add = tile > part.tile_begin;
  for (int i = 0; i < b.n; ++i) {
    put_row<Tile>(out.dq, t + i, 0, s.dq + i * ld, p.K, add);
    put_row<Tile>(out.dk, t + i, 0, s.dk + i * ld, p.K, add);
    put_row<Tile>(out.dv, t + i, (tile - part.tile_begin) * cols, s.de + i * cols, width, false);
    put_row<Tile>(out.dbeta, t + i, 0, dMP + C * C + i, 1, add);
    if constexpr (Decay::decays) put_row<Tile>(out.dg, t + i, 0, s.dg + i * ld, gates, add);
  }

  if constexpr (Rule::predicts)
    Tile::template write<2 * C, Decay::decays>(b.kq_r, ld, p.K, b.A, s.minus_de, D, D);
  else
    Tile::template write<C, Decay::decays>(b.kq_r + C * ld, ld, p.K, b.A, s.d_o, D, D);
  b.reset(p, D);
}

// Tokens [t0, end) of one head: forward from the checkpoint, then backward. The scratch holds as many blocks as a
// segment has where all are whole; where gates cut them shorter, the segment is taken in several runs, the last first,
// each from the checkpoint on. again: the blocks are still staged, from a head with the same keys and no gates.
template <class Tile, class Rule, class Decay, int C>
bool segment_backward(const Problem& p, const Geometry& g, const BackwardPart& part,
                      BackwardScratch<Tile, Rule, Decay, C>& s, const Head& head, bool again, int64_t h, int64_t t0,
                      int64_t end, const HeadGradients& out, Prefetch& ahead, const Stop& stop) {
  using T = typename Tile::Scalar;
  const int64_t most = g.segment / C, size = g.ld * g.columns, block_size = C * g.columns;
  const auto stage = [&](int64_t& t, bool shared) {
    if (p.attention_norm && t == t0)
      copy_in<Tile>(checkpoint<T>(p, g, part.slot + t0 / g.segment, h, part.tile_begin) + size, g.ld, s.z, g.ld);
    return stage_blocks(s.blocks, most, p, g, s.keys, head, t, end, shared, s.z, stop);
  };
  int64_t starts[C + 1] = {t0}, runs = 0, count = 0;  // a block has at least one token: at most C runs, then the end
  for (int64_t t = t0; t < end; starts[++runs] = t) {
    count = stage(t, again);
    if (stop.asked(stop.data)) return false;
  }
  int64_t staged = runs - 1;
  for (int64_t last = runs - 1; last >= 0; --last)
    for (int64_t j = part.tile_begin; j < part.tile_end; ++j) {
      T* const D = adjoint_of<T>(part, g, h, j);
      copy_in<Tile>(checkpoint<T>(p, g, part.slot + t0 / g.segment, h, j), size, s.S, size);
      for (int64_t run = 0; run <= last; ++run) {
        int64_t t = starts[run];
        if (staged != run) count = stage(t, false);
        staged = run;
        t = starts[run];
        for (int64_t b = 0; b < count; t += s.blocks[b++].n) {
          if (stop.asked(stop.data)) return false;
          ahead.step();
          T* S = s.S + b * size;
          stage_columns<Tile, C>(head.v, t, s.blocks[b].n, p, g, j, s.v);
          advance<false>(s.blocks[b], p, g.ld, s.v, S, S + size, s.RX, s.e + b * block_size, s.u + b * block_size,
                         static_cast<T*>(nullptr));
        }
        if (run < last) copy_in<Tile>(s.S + count * size, size, s.S, size);
      }
      int64_t t = starts[last + 1];
      for (int64_t b = count - 1; b >= 0; --b) {
        if (stop.asked(stop.data)) return false;
        ahead.step();
        t -= s.blocks[b].n;
        stage_columns<Tile, C>(head.d_o, t, s.blocks[b].n, p, g, j, s.d_o);
        s.blocks[b].clear_blind(s.d_o, C);
        retreat(p, g, s.blocks[b], s, s.S + b * size, s.e + b * block_size, s.u + b * block_size, D, t - t0, part, j,
                out);
      }
    }
  return true;
}

template <class Tile, class Rule, class Decay, int C>
void scan_backward(const Problem& p, const Geometry& g, const BackwardPart& part, void* scratch, const Stop& stop) {
  using T = typename Tile::Scalar;
  Arena arena(scratch);
  const int64_t heads = part.head_end - part.head_begin;
  BackwardScratch<Tile, Rule, Decay, C> s(arena, p, g, heads);
  const Sequence seq = sequence(p, part.n);
  const int64_t size = g.ld * g.columns;
  const auto adjoint = [&](int64_t h, int64_t j) { return adjoint_of<T>(part, g, h, j); };

  // Rows K.. of the tiles: passes over K never write them, sums over ld read them.
  for (int64_t b = 0; b <= g.segment / C; ++b) fill<T>(s.S + b * size + p.K * g.columns, (g.ld - p.K) * g.columns, 0);
  for (int64_t h = 0; h < heads; ++h) s.heads[h] = head(p, seq, part.head_begin + h);
  if (part.end == seq.length)
    for (int64_t h = part.head_begin; h < part.head_end; ++h)
      for (int64_t j = part.tile_begin; j < part.tile_end; ++j) {
        load_tile<Tile>(p.d_hT, part.n, h, p, g, j, adjoint(h, j));
        if (p.attention_norm) load_z(p, g, j == 0 ? p.d_hT : States{}, part.n, h, adjoint(h, j) + size);
      }

  const int64_t segments = (part.end - part.begin + g.segment - 1) / g.segment;
  for (int64_t i = segments - 1; i >= 0; --i) {
    const int64_t t0 = part.begin + i * g.segment;
    const int64_t end = part.end - t0 < g.segment ? part.end : t0 + g.segment;
    Prefetch ahead(p, s.heads, heads, t0 < g.segment ? 0 : t0 - g.segment, t0,
                   checkpoint_piece<T>(p, g, part, t0 / g.segment - 1),
                   2 * heads * (part.tile_end - part.tile_begin) * (g.segment / C));
    for (int64_t h = 0; h < heads; ++h) {
      const bool again = shares_staging<Decay>(p) && h > 0 && s.heads[h].same_keys(s.heads[h - 1]);
      const HeadGradients& to = part.gradients[h * part.next_head];
      const HeadGradients sums = segment_rows<T>(to, t0 - part.begin, s.sums, part.maps);
      if (!segment_backward(p, g, part, s, s.heads[h], again, part.head_begin + h, t0, end, sums, ahead, stop)) return;
      deliver_segment<Tile>(p, g, part, s.keys, s.heads[h], t0, end - t0, sums, to, stop);
    }
  }

  if (part.begin > 0) return;
  for (int64_t h = part.head_begin; h < part.head_end; ++h)
    for (int64_t j = part.tile_begin; j < part.tile_end; ++j)
      store_tile<Tile>(adjoint(h, j), p, g, j, p.dh0, part.n, h);
}

// The last column of dh0, of all heads of sequence n: what the tiles, whose adjoints D are, have of it.
template <class Tile>
void sum_z(const Problem& p, const Geometry& g, int64_t n, void* D) {
  using T = typename Tile::Scalar;
  for (int64_t h = 0; h < p.H; ++h) {
    T* const first = static_cast<T*>(D) + h * g.tiles * g.tile + g.ld * g.columns;
    for (int64_t j = 1; j < g.tiles; ++j)
      for (int64_t d = 0; d < p.K; ++d) first[d] += first[j * g.tile + d];
    store_z(first, p, p.dh0, n, h);
  }
}

// The shares of one head added up: n numbers of row t, from number `first` on.
template <class T>
void sum_shares(const HeadGradients* head, GradientRows HeadGradients::* field, int64_t shares, int64_t t,
                int64_t first, int64_t n, T* sum) {
  for (int64_t j = 0; j < shares; ++j) {
    const GradientRows& rows = head[j].*field;
    const T* from = static_cast<const T*>(rows.data) + t * rows.stride + first;
    for (int64_t i = 0; i < n; ++i) sum[i] = j == 0 ? from[i] : sum[i] + from[i];
  }
}

// One row of a gradient: the partial rows of `heads` heads, `shares` each, rounded into `out`. First the shares of a
// head are added, then the heads, so that it does not matter how many shares a head was cut into.
template <class Tile>
void sum_row(const HeadGradients* gradients, GradientRows HeadGradients::* field, int64_t heads, int64_t next_head,
             int64_t shares, int64_t t, int64_t width, DType dtype, char* out) {
  using T = typename Tile::Scalar;
  constexpr int64_t kPiece = 64;
  alignas(64) T sum[kPiece];
  T head[kPiece];
  for (int64_t first = 0; first < width; first += kPiece) {
    const int64_t n = width - first < kPiece ? width - first : kPiece;
    if (heads * shares == 0) fill<T>(sum, n, 0);
    for (int64_t h = 0; h < heads; ++h) {
      sum_shares(gradients + h * next_head, field, shares, t, first, n, head);
      for (int64_t i = 0; i < n && shares > 0; ++i) sum[i] = h == 0 ? head[i] : sum[i] + head[i];
    }
    with_type<T>(dtype, [&](auto type) { copy_out<Tile>(sum, n, reinterpret_cast<decltype(type)*>(out) + first); });
  }
}

// What adding up gradients of keys takes.
template <class Tile>
struct ReduceScratch {
  Keys<Tile> keys;
  typename Tile::Scalar *head, *sum;

  ReduceScratch(Arena& arena, const Problem& p)
      : keys(arena, p),
        head(arena.take<typename Tile::Scalar>(Tile::up(p.K))),
        sum(arena.take<typename Tile::Scalar>(Tile::up(p.key_size()))) {}
};

// Adds up the partial rows of dq or dk that have yet to go through the feature map.
template <class Tile>
void reduce_keys(const Problem& p, const ReducePart& part, void* scratch, const Stop& stop) {
  using T = typename Tile::Scalar;
  Arena arena(scratch);
  const ReduceScratch<Tile> s(arena, p);
  const Sequence seq = sequence(p, part.n);
  for (int64_t h0 = 0; h0 < p.H; h0 += part.to.group)
    for (int64_t t = part.begin; t < part.end && !stop.asked(stop.data); ++t) {
      for (int64_t h = h0; h < h0 + part.to.group; ++h) {
        sum_shares(part.gradients + h * part.shares, part.field, part.shares, t - part.origin, 0, p.K, s.head);
        const T* dx = s.keys.pull_back(head_rows(part.from, seq, h), t, s.head);
        for (int64_t i = 0; i < part.width; ++i) s.sum[i] = h == h0 ? dx[i] : s.sum[i] + dx[i];
      }
      store_row<Tile>(s.sum, part.width, head_rows(part.to, seq, h0), t, 0);
    }
}

// Adds up the partial rows of one gradient.
template <class Tile>
void reduce(const Problem& p, const ReducePart& part, void* scratch, const Stop& stop) {
  if (part.maps) return reduce_keys<Tile>(p, part, scratch, stop);
  const Rows& to = part.to;
  const Sequence seq = sequence(p, part.n);
  for (int64_t h = 0; h < p.H; h += to.group) {
    const HeadRows rows = head_rows(to, seq, h);
    const HeadGradients* own = part.gradients + h * part.shares;
    for (int64_t t = part.begin; t < part.end; ++t) {
      char* out = rows.at(t);
      if (part.columns == 0) {
        sum_row<Tile>(own, part.field, to.group, part.shares, part.shares, t - part.origin, part.width, to.dtype, out);
        continue;
      }
      for (int64_t j = 0; j < part.shares; ++j) {
        const int64_t first = j * part.columns;
        const int64_t n = part.width - first < part.columns ? part.width - first : part.columns;
        sum_row<Tile>(own + j, part.field, to.group, part.shares, 1, t - part.origin, n, to.dtype,
                      out + first * item_size(to.dtype));
      }
    }
  }
}

}  // namespace
}  // namespace fwp
