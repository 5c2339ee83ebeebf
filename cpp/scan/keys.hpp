// Rows of keys and queries on their way from the caller's memory to the recurrence, through the feature map and the
// normalisation, and their gradients on the way back. The rows of the recurrence never exist for more than a few
// tokens.
#pragma once

#include "rows.hpp"
//
#include "../features/maps.hpp"
#include "../features/norms.hpp"
//
#include "../features/row.hpp"

namespace fwp {
namespace {

template <class Tile>
struct Keys {
  using T = typename Tile::Scalar;
  int64_t size;  // of a row as it comes
  int64_t K;     // of its image
  FeatureRow<Tile> row;

  Keys(Arena& arena, const Problem& p) : size(p.key_size()), K(p.K), row(rooms(arena, p.features)) {}

  // Row t of keys or queries as the recurrence takes it, times a factor; zeros up to `padded`.
  void stage(const HeadRows& rows, int64_t t, T* to, int64_t padded, T factor = 1) const {
    if (!row.f.active()) return stage_row<Tile>(rows, t, 0, K, to, padded, factor);
    read(rows, t);
    row.forward(to);
    for (int64_t i = 0; i < K && factor != 1; ++i) to[i] *= factor;
    fill<T>(to + K, padded - K, 0);
  }

  // From the gradient dy of the image of row t, which is overwritten, that of the row; valid until the next call.
  const T* pull_back(const HeadRows& rows, int64_t t, T* dy) const {
    read(rows, t);
    row.backward(dy);
    return row.dx;
  }

 private:
  static FeatureRow<Tile> rooms(Arena& arena, const Features& f) {
    const int64_t n = f.active() ? Tile::up(f.inputs) : 0, image = f.active() ? Tile::up(f.outputs) : 0;
    T *const x = arena.take<T>(n), *const dx = arena.take<T>(n), *const y = arena.take<T>(image);
    return {
        f, x, dx, y, arena.take<T>(f.norm != Norm::none ? image : 0), arena.take<T>(FeatureRow<Tile>::work_size(f))};
  }
  void read(const HeadRows& rows, int64_t t) const { stage_row<Tile>(rows, t, 0, size, row.x, Tile::up(size)); }
};

// The map by itself, from rows to rows.
template <class Tile>
struct MapRows {
  using T = typename Tile::Scalar;
  Keys<Tile> keys;
  T* y;

  MapRows(Arena& arena, const Problem& p) : keys(arena, p), y(arena.take<T>(Tile::up(p.K))) {}

  void run(const Problem& p, int64_t begin, int64_t end) const {
    const Sequence all{0, 0, p.T};
    const HeadRows x = head_rows(p.q, all, 0), to = head_rows(p.o, all, 0);
    const HeadRows dy = head_rows(p.d_o, all, 0), dx = head_rows(p.dq, all, 0);
    for (int64_t t = begin; t < end; ++t) {
      if (dy.data) {
        stage_row<Tile>(dy, t, 0, p.K, y, p.K);
        store_row<Tile>(keys.pull_back(x, t, y), keys.size, dx, t, 0);
      } else {
        keys.stage(x, t, y, Tile::up(p.K));
        store_row<Tile>(y, p.K, to, t, 0);
      }
    }
  }
};

// Writes the sums of a segment of n tokens, from token t0 on, into the rows that were not added up in place: keys and
// queries through their map, all rounded.
template <class Tile, class T>
void deliver_keys(const Keys<Tile>& keys, const HeadRows& from, int64_t t0, int64_t n, const GradientRows& sums,
                  const GradientRows& to, int64_t skip, const Stop& stop) {
  if (!to.data) return;
  with_type<T>(to.dtype, [&](auto type) {
    auto* out = static_cast<decltype(type)*>(to.data) + skip * to.stride;
    for (int64_t t = 0; t < n && !stop.asked(stop.data); ++t)
      copy_out<Tile>(keys.pull_back(from, t0 + t, static_cast<T*>(sums.data) + t * sums.stride), keys.size,
                     out + t * to.stride);
  });
}
template <class Tile>
void deliver_segment(const Problem& p, const Geometry& g, const BackwardPart& part, const Keys<Tile>& keys,
                     const Head& head, int64_t t0, int64_t n, const HeadGradients& sums, const HeadGradients& to,
                     const Stop& stop) {
  using T = typename Tile::Scalar;
  const int64_t skip = t0 - part.begin;
  if (part.maps) {
    deliver_keys<Tile, T>(keys, head.q, t0, n, sums.dq, to.dq, skip, stop);
    deliver_keys<Tile, T>(keys, head.k, t0, n, sums.dk, to.dk, skip, stop);
  } else {
    round_rows<Tile>(sums.dq, n, p.K, to.dq, skip);
    round_rows<Tile>(sums.dk, n, p.K, to.dk, skip);
  }
  const int64_t left = p.V - part.tile_begin * g.columns, columns = (part.tile_end - part.tile_begin) * g.columns;
  round_rows<Tile>(sums.dv, n, left < columns ? left : columns, to.dv, skip);
  round_rows<Tile>(sums.dbeta, n, 1, to.dbeta, skip);
  round_rows<Tile>(sums.dg, n, p.decay == fwp::Decay::channel ? p.K : 1, to.dg, skip);
}

}  // namespace
}  // namespace fwp
