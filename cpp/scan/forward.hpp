// Time, forward: some heads, or some tiles of a head, of one sequence, from the first token to the last.
#pragma once

#include "block.hpp"

namespace fwp {
namespace {

// Checkpoints hold whole tiles [slot][h][tile][ld][columns], each with z [ld] after it if there is one.
template <class T>
T* checkpoint(const Problem& p, const Geometry& g, int64_t slot, int64_t h, int64_t tile) {
  return static_cast<T*>(p.checkpoints) + ((slot * p.H + h) * g.tiles + tile) * g.tile;
}

// The checkpoints of a part, which has neighbouring heads or neighbouring tiles of one head; segment < 0: none.
template <class T>
Prefetch::Piece checkpoint_piece(const Problem& p, const Geometry& g, const Part& part, int64_t segment) {
  if (segment < 0) return {nullptr, 0};
  const int64_t tiles = (part.head_end - part.head_begin) * (part.tile_end - part.tile_begin);
  return {checkpoint<T>(p, g, part.slot + segment, part.head_begin, part.tile_begin),
          tiles * g.tile * static_cast<int64_t>(sizeof(T))};
}

template <class Tile, class Rule, class Decay, int C>
struct ForwardScratch {
  using T = typename Tile::Scalar;
  static constexpr int kMaxBlocks = 16;
  Block<Tile, Rule, Decay, C> blocks[kMaxBlocks];
  Keys<Tile> keys;
  Head* heads;
  T* z;  // [heads][ld], with attention_norm
  T *S, *v, *RX, *e, *u, *o;

  ForwardScratch(Arena& arena, const Problem& p, const Geometry& g, int64_t head_count, int64_t tiles)
      : keys(arena, p) {
    heads = arena.take<Head>(head_count);
    z = arena.take<T>(p.attention_norm ? head_count * g.ld : 0);
    for (int64_t i = 0; i < g.chunk / C; ++i) blocks[i] = Block<Tile, Rule, Decay, C>::take(arena, p, g.ld);
    S = arena.take<T>((in_place(p, g) ? 1 : head_count * tiles) * g.ld * g.columns);
    v = arena.take<T>(C * g.columns);
    RX = arena.take<T>(2 * C * g.columns);
    e = arena.take<T>(C * g.columns);
    u = arena.take<T>(C * g.columns);
    o = arena.take<T>(C * g.columns);
  }
};

// Whether heads with the same keys and queries can have the same staged blocks.
template <class Decay>
bool shares_staging(const Problem& p) {
  return !Decay::decays && !p.attention_norm;
}

// Stages blocks from token t on, `most` at the most; returns how many, and in t the token after them. Blocks end with
// chunks, so that they are the same whatever the segments. again: they are those that were staged for another head with
// the same keys. z: see Block::stage. Ends early if the call was stopped, but not before the first block.
template <class Tile, class Rule, class Decay, int C>
int64_t stage_blocks(Block<Tile, Rule, Decay, C>* blocks, int64_t most, const Problem& p, const Geometry& g,
                     const Keys<Tile>& keys, const Head& head, int64_t& t, int64_t end, bool again,
                     typename Tile::Scalar* z, const Stop& stop) {
  int64_t count = 0;
  while (count < most && t < end && (count == 0 || !p.features.active() || !stop.asked(stop.data))) {
    auto& block = blocks[count++];
    const int64_t chunk_end = (t / g.chunk + 1) * g.chunk;
    t += again ? block.stage_beta(head, t) : block.stage(p, g, keys, head, t, end < chunk_end ? end : chunk_end, z);
  }
  return count;
}

// The tiles of a part while it is scanned: in scratch, or in place, in the caller's memory. A last tile that is not
// whole passes through scratch all the same. Out of line, so that the scan around it stays small.
template <class Tile, class T>
struct ForwardTiles {
  struct Place {
    T* S;
    int64_t stride;  // from row to row
    int64_t ahead;   // to the tile of the next head in the caller's memory; 0: none
  };
  const Problem& p;
  const Geometry& g;
  const ForwardPart& part;
  T* scratch;
  int64_t slot = state_slot(p, part.n);
  bool direct = in_place(p, g);

  bool is_direct(int64_t j) const { return direct && tile_width(p, g, j) == g.columns; }
  FWP_PASS Place at(int64_t h, int64_t j) const {
    if (is_direct(j)) return {tile_of<T>(p.hT, slot, h, g, j), p.hT.k, h + 1 < part.head_end ? p.hT.h : 0};
    const int64_t tiles = part.tile_end - part.tile_begin;
    const int64_t i = direct ? 0 : (h - part.head_begin) * tiles + j - part.tile_begin;
    return {scratch + i * g.ld * g.columns, g.columns, 0};
  }
  FWP_PASS void load(int64_t h) const {
    int64_t whole = 0;
    for (int64_t j = part.tile_begin; j < part.tile_end; ++j)
      is_direct(j) ? void(++whole) : load_tile<Tile>(p.h0, slot, h, p, g, j, at(h, j).S);
    if (whole > 0 && p.h0.data != p.hT.data) move(h, whole);
  }
  FWP_PASS void store(int64_t h) const {
    for (int64_t j = part.tile_begin; j < part.tile_end; ++j)
      if (!is_direct(j)) store_tile<Tile>(at(h, j).S, p, g, j, p.hT, slot, h);
  }

 private:
  // The first `tiles` of a head from h0, or zeros: along rows, which memory is faster at than down a tile.
  void move(int64_t h, int64_t tiles) const {
    const int64_t n = tiles * g.columns;
    T* const to = tile_of<T>(p.hT, slot, h, g, part.tile_begin);
    if (!p.h0.data) {
      for (int64_t d = 0; d < p.K; ++d) fill<T>(to + d * p.hT.k, n, 0);
      return;
    }
    const T* const from = tile_of<T>(p.h0, slot, h, g, part.tile_begin);
    const int64_t rows = p.h0.k == n && p.hT.k == n ? p.K : 1;  // that lie end to end
    for (int64_t d = 0; d < p.K; d += rows)
      __builtin_memcpy(to + d * p.hT.k, from + d * p.h0.k, static_cast<size_t>(rows * n) * sizeof(T));
  }
};

// The staged blocks, from token t on, on one tile; false if the call was stopped.
template <class Tile, class Rule, class Decay, int C, class Place>
bool scan_blocks(const Problem& p, const Geometry& g, const ForwardPart& part, ForwardScratch<Tile, Rule, Decay, C>& s,
                 const Head& head, int64_t tile, int64_t t, int64_t count, const Place& at, Prefetch& ahead,
                 const Stop& stop) {
  const int64_t first = tile * g.columns, width = tile_width(p, g, tile);
  for (int64_t i = 0; i < count; t += s.blocks[i++].n) {
    if (stop.asked(stop.data)) return false;
    ahead.step();
    const auto& block = s.blocks[i];
    stage_columns<Tile, C>(head.v, t, block.n, p, g, tile, s.v);
    if (!part.output) {
      advance<false>(block, p, g.ld, s.v, at.S, at.S, s.RX, s.e, s.u, s.o, at.stride);
      continue;
    }
    advance<true>(block, p, g.ld, s.v, at.S, at.S, s.RX, s.e, s.u, s.o, at.stride, at.ahead);
    for (int r = 0; r < block.n; ++r) store_row<Tile>(s.o + r * g.columns, width, head.o, t + r, first);
  }
  return true;
}

// The output of a part whose sequence has no state.
inline void clear_output(const Problem& p, const Geometry& g, const ForwardPart& part, const Sequence& seq) {
  const int64_t item = item_size(p.dtype), first = part.tile_begin * g.columns, end = part.tile_end * g.columns;
  for (int64_t h = part.head_begin; h < part.head_end; ++h)
    for (int64_t t = 0; t < seq.length; ++t)
      fill<char>(head_rows(p.o, seq, h).at(t) + item * first, item * ((end < p.V ? end : p.V) - first), 0);
}

template <class Tile, class Rule, class Decay, int C>
void scan_forward(const Problem& p, const Geometry& g, const ForwardPart& part, void* scratch, const Stop& stop) {
  using T = typename Tile::Scalar;
  const Sequence seq = sequence(p, part.n);
  if (state_slot(p, part.n) == kNoSlot) return clear_output(p, g, part, seq);
  Arena arena(scratch);
  const int64_t heads = part.head_end - part.head_begin, tiles = part.tile_end - part.tile_begin;
  ForwardScratch<Tile, Rule, Decay, C> s(arena, p, g, heads, tiles);
  const ForwardTiles<Tile, T> state{p, g, part, s.S};

  for (int64_t h = 0; h < heads; ++h) {
    s.heads[h] = head(p, seq, part.head_begin + h);
    if (!part.output) s.heads[h] = s.heads[h].written();
  }

  for (int64_t t0 = 0; t0 == 0 || t0 < seq.length; t0 += g.chunk) {  // once at least: states pass through
    const int64_t end = seq.length - t0 < g.chunk ? seq.length : t0 + g.chunk;
    const bool saves = p.checkpoints && end < seq.length && end % g.segment == 0;
    Prefetch ahead(p, s.heads, heads, end, seq.length - end < g.chunk ? seq.length : end + g.chunk,
                   checkpoint_piece<T>(p, g, part, saves ? end / g.segment : -1), heads * tiles * (g.chunk / C));
    for (int64_t h = part.head_begin; h < part.head_end; ++h) {
      const Head& rows = s.heads[h - part.head_begin];
      T* const z = s.z + (p.attention_norm ? h - part.head_begin : 0) * g.ld;
      if (t0 == 0) state.load(h);
      if (p.attention_norm && t0 == 0) load_z(p, g, p.h0, state.slot, h, z);
      if (p.checkpoints && t0 % g.segment == 0 && t0 < end)
        for (int64_t j = part.tile_begin; j < part.tile_end; ++j) {
          T* const to = checkpoint<T>(p, g, part.slot + t0 / g.segment, h, j);
          copy_out<Tile>(state.at(h, j).S, g.ld * g.columns, to);
          copy_out<Tile>(z, g.tile - g.ld * g.columns, to + g.ld * g.columns);
        }
      const bool again = shares_staging<Decay>(p) && h > part.head_begin && rows.same_keys((&rows)[-1]);
      for (int64_t first = t0, t = t0; t < end; first = t) {
        const int64_t count = stage_blocks(s.blocks, g.chunk / C, p, g, s.keys, rows, t, end, again, z, stop);
        for (int64_t j = part.tile_begin; j < part.tile_end; ++j)
          if (!scan_blocks(p, g, part, s, rows, j, first, count, state.at(h, j), ahead, stop)) return;
      }
      if (!part.output || end < seq.length) continue;
      state.store(h);
      if (p.attention_norm && part.tile_begin == 0) store_z(z, p, p.hT, state.slot, h);
    }
  }
}

}  // namespace
}  // namespace fwp
