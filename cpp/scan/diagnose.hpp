// Probes of a fast weight at work: what it retrieves before a write, how far the write goes, how its accumulators grow.
// The recurrence token by token, all tiles of a head together; it has no output but the probes.
#pragma once

#include "block.hpp"

namespace fwp {
namespace {

// One head's numbers in scratch; k, q, v, S', z as in the recurrence, without scale.
template <class Tile>
struct DiagnoseScratch {
  using T = typename Tile::Scalar;
  Keys<Tile> keys;
  T *k, *q, *a, *z;      // [ld]
  T *v, *retrieved, *u;  // [tiles][columns]
  T* S;                  // [tiles][ld][columns]

  DiagnoseScratch(Arena& arena, const Problem& p, const Geometry& g)
      : keys(arena, p),
        k(arena.take<T>(g.ld)),
        q(arena.take<T>(g.ld)),
        a(arena.take<T>(g.ld)),
        z(arena.take<T>(g.ld)),
        v(arena.take<T>(g.tiles * g.columns)),
        retrieved(arena.take<T>(g.tiles * g.columns)),
        u(arena.take<T>(g.tiles * g.columns)),
        S(arena.take<T>(g.tiles * g.ld * g.columns)) {}
};

// a_t of the token, one number per channel; where the gate is -inf the state and z are cleared here.
template <class Tile>
void stage_decay(const Problem& p, const Geometry& g, const HeadRows& gates, int64_t t, DiagnoseScratch<Tile>& s) {
  using T = typename Tile::Scalar;
  constexpr T kReset = static_cast<T>(-__builtin_inf());
  fill<T>(s.a, g.ld, 0);
  if (p.decay != Decay::none) stage_row<Tile>(gates, t, 0, p.decay == Decay::channel ? p.K : 1, s.a, g.ld);
  if (p.decay == Decay::scalar) fill<T>(s.a, p.K, s.a[0]);
  for (int64_t d = 0; d < p.K; ++d) {
    if (s.a[d] != kReset) continue;
    s.z[d] = 0;
    for (int64_t j = 0; j < g.tiles; ++j) fill<T>(s.S + (j * g.ld + d) * g.columns, g.columns, 0);
  }
  for (int64_t d = 0; d < g.ld; d += Tile::kWidth) Tile::store(s.a + d, Tile::exp(Tile::load(s.a + d)));
}

// The probes of one token, which is written.
template <class Tile, class T>
void probe(const Problem& p, const Geometry& g, T beta, DiagnoseScratch<Tile>& s, T* out, const Stop& stop) {
  const int64_t tile = g.ld * g.columns;
  int64_t stalled = 0;
  T sum = 0, most = 0;
  for (int64_t d = 0; d < p.K; ++d) s.z[d] *= s.a[d];
  const T before = Tile::dot(s.z, s.k, p.K), keys = Tile::dot(s.k, s.k, p.K);
  for (int64_t d = 0; d < p.K; ++d) {
    const T z = s.z[d] + s.k[d];
    stalled += s.k[d] != 0 && z == s.z[d];
    s.z[d] = z;
    sum += z < 0 ? -z : z;
    most = d == 0 || z > most ? z : most;
  }
  const T after = Tile::dot(s.z, s.q, p.K);

  // What a read of the key is divided by, before and after the write.
  const auto divided = [&](T read, T by) {
    if (!p.attention_norm) return read;
    return by == 0 ? 0 : read / (by + static_cast<T>(p.eps));
  };
  for (int64_t d = 0; d < g.ld; ++d) s.q[d] = s.a[d] * s.k[d];  // how the key reads the state before its decay
  T error = 0, residual = 0, norm = 0;
  for (int64_t j = 0; j < g.tiles && !stop.asked(stop.data); ++j) {
    const int64_t width = tile_width(p, g, j);  // columns beyond it are padding, and may be anything
    T *const S = s.S + j * tile, *const read = s.retrieved + j * g.columns, *const u = s.u + j * g.columns;
    const T* const v = s.v + j * g.columns;
    Tile::template read<1>(s.q, g.ld, p.K, S, read);
    for (int64_t i = 0; i < g.columns; ++i) {
      const T raw = read[i];
      read[i] = divided(raw, before);
      u[i] = beta * (p.rule == Rule::delta ? v[i] - read[i] : v[i]);
      if (i >= width) continue;
      const T e = v[i] - read[i], left = v[i] - divided(raw + keys * u[i], before + keys);
      error += e * e;
      residual += left * left;
    }
    Tile::template write<1, true>(s.k, g.ld, p.K, s.a, u, S, S);
    for (int64_t d = 0; d < p.K; ++d) norm += Tile::dot(S + d * g.columns, S + d * g.columns, width);
  }
  const T numbers[kProbes] = {Tile::dot(s.v, s.v, p.V),
                              Tile::dot(s.retrieved, s.retrieved, p.V),
                              Tile::dot(s.v, s.retrieved, p.V),
                              error,
                              residual,
                              norm,
                              keys,
                              Tile::sum(s.k, p.K),
                              before,
                              after,
                              sum,
                              most,
                              static_cast<T>(stalled)};
  for (int i = 0; i < kProbes; ++i) out[i] = numbers[i];
}

// One head of one sequence; the probes of a token lie together in `o`.
template <class Tile>
void scan_diagnose(const Problem& p, const Geometry& g, int64_t n, int64_t h, void* scratch, const Stop& stop) {
  using T = typename Tile::Scalar;
  Arena arena(scratch);
  DiagnoseScratch<Tile> s(arena, p, g);
  const Sequence seq = sequence(p, n);
  const Head rows = head(p, seq, h);
  for (int64_t j = 0; j < g.tiles; ++j) load_tile<Tile>(p.h0, n, h, p, g, j, s.S + j * g.ld * g.columns);
  load_z(p, g, p.attention_norm ? p.h0 : States{}, n, h, s.z);
  for (int64_t t = 0; t < seq.length; ++t) {
    if (stop.asked(stop.data)) return;
    s.keys.stage(rows.k, t, s.k, g.ld);
    s.keys.stage(rows.q, t, s.q, g.ld);
    stage_row<Tile>(rows.v, t, 0, p.V, s.v, g.tiles * g.columns);
    T beta = 1;
    if (rows.beta.data) stage_row<Tile>(rows.beta, t, 0, 1, &beta, 1);
    stage_decay(p, g, rows.g, t, s);
    probe(p, g, beta, s, reinterpret_cast<T*>(rows.o.at(t)), stop);
  }
}

}  // namespace
}  // namespace fwp
