// The caller's memory, read and written row by row: everything behind these functions is staged in the accumulation
// type, padded to whole packs; halves are widened when they are read and rounded once when they are written.
//
// Tile is the machine (cpp/cpu/tiles.hpp): packs of T and the passes over a tile of the state.
#pragma once

#include "geometry.hpp"
#include "problem.hpp"

namespace fwp {
namespace {

// The rows of one head of one sequence, by token.
struct HeadRows {
  char* data = nullptr;  // nullptr: absent
  int64_t stride = 0;    // bytes
  DType dtype = DType::f32;
  char* at(int64_t t) const { return data + t * stride; }
};

inline HeadRows head_rows(const Rows& r, const Sequence& seq, int64_t h) {
  if (!r.data) return {};
  const int64_t item = item_size(r.dtype);
  return {static_cast<char*>(r.data) + item * (seq.b * r.b + seq.begin * r.t + h / r.group * r.h), item * r.t, r.dtype};
}

// One head of one sequence.
struct Head {
  HeadRows q, k, v, beta, g, o, d_o, dq, dk, dv, dg;

  bool same_keys(const Head& other) const {
    return q.data == other.q.data && k.data == other.k.data && g.data == other.g.data;
  }
  // What the state is made from, without what reads it.
  Head written() const {
    Head w;
    w.k = k;
    w.v = v;
    w.beta = beta;
    w.g = g;
    return w;
  }
};

inline Head head(const Problem& p, const Sequence& seq, int64_t h) {
  const auto rows = [&](const Rows& r) { return head_rows(r, seq, h); };
  return {rows(p.q),   rows(p.k),  rows(p.v),  rows(p.beta), rows(p.g), rows(p.o),
          rows(p.d_o), rows(p.dq), rows(p.dk), rows(p.dv),   rows(p.dg)};
}

// Asks for the rows of tokens [begin, end) of neighbouring heads, token by token, a little at every step. In a
// [B,T,H,K] array that walks through memory in order; left to themselves, heads would each stride through it at a
// fraction of the bandwidth. All at once would only fill the queues of the memory. So do checkpoints, a piece of memory
// of their own.
class Prefetch {
 public:
  struct Piece {
    const void* data;
    int64_t bytes;
  };
  Prefetch(const Problem& p, const Head* heads, int64_t count, int64_t begin, int64_t end, const Piece& checkpoints,
           int64_t steps)
      : heads_(heads),
        count_(count),
        token_(begin),
        end_(end),
        rows_per_step_(((end - begin) * count + steps - 1) / steps),
        piece_(static_cast<const char*>(checkpoints.data)),
        piece_left_(checkpoints.bytes),
        piece_per_step_((checkpoints.bytes / steps + 2 * kLine - 1) / kLine * kLine) {
    const int64_t item = item_size(p.dtype);
    keys_ = p.key_size() * item;
    values_ = p.V * item;
    gates_ = p.decay == Decay::channel ? p.K * item_size(p.g.dtype) : 0;
  }

  // Always inline: GCC takes a function that only prefetches for one without effect and drops the call.
  FWP_HD void step() {
    for (int64_t n = rows_per_step_; n > 0 && token_ < end_; --n) {
      const Head& head = heads_[head_];
      const int64_t t = token_;
      lines(head.q, t, keys_);
      lines(head.k, t, keys_);
      lines(head.v, t, values_);
      lines(head.o, t, values_);
      lines(head.d_o, t, values_);
      lines(head.dq, t, keys_);
      lines(head.dk, t, keys_);
      lines(head.dv, t, values_);
      lines(head.g, t, gates_);
      lines(head.dg, t, gates_);
      if (++head_ == count_) {
        head_ = 0;
        ++token_;
      }
    }
    const int64_t piece = piece_per_step_ < piece_left_ ? piece_per_step_ : piece_left_;
    lines(piece_, piece);
    piece_ += piece;
    piece_left_ -= piece;
  }

 private:
  FWP_HD static void lines(const char* from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at, 0, 2);
  }
  FWP_HD static void lines(const HeadRows& rows, int64_t t, int64_t bytes) {
    if (rows.data) lines(rows.at(t), bytes);
  }

  static constexpr int64_t kLine = 64;

  const Head* heads_;
  int64_t count_, token_, end_, rows_per_step_, keys_, values_, gates_, head_ = 0;
  const char* piece_;
  int64_t piece_left_, piece_per_step_;
};

template <class T>
void fill(T* to, int64_t n, T value) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

// Calls f with a number of the type that an array of this dtype stores; T is what is computed with. Always inline: what
// f refers to would go through memory, at every row.
template <class T, class F>
FWP_HD auto with_type(DType dtype, const F& f) {
  if (dtype == kDType<T>) return f(T());
  if constexpr (sizeof(T) == 8)
    return f(float());
  else
    return dtype == DType::bf16 ? f(Bfloat16()) : f(Float16());
}

// n numbers, widened to T, times a factor, and zeros up to padded.
template <class Tile, class U, class T>
void copy_in(const U* from, int64_t n, T* to, int64_t padded, T factor = 1) {
  int64_t i = 0;
  for (; i + Tile::kWidth <= n; i += Tile::kWidth)
    Tile::store(to + i, Tile::load_unaligned(from + i) * Tile::broadcast(factor));
  for (; i < n; ++i) to[i] = Tile::widen(from[i]) * factor;
  for (; i < padded; ++i) to[i] = 0;
}

// n numbers, rounded to U.
template <class Tile, class T, class U>
void copy_out(const T* from, int64_t n, U* to) {
  int64_t i = 0;
  for (; i + Tile::kWidth <= n; i += Tile::kWidth) Tile::store_unaligned(to + i, Tile::load(from + i));
  for (; i < n; ++i) to[i] = Tile::template round<U>(from[i]);
}

// n numbers of a row, from its column `first` on; padded with zeros.
template <class Tile, class T>
void stage_row(const HeadRows& rows, int64_t t, int64_t first, int64_t n, T* to, int64_t padded, T factor = 1) {
  with_type<T>(rows.dtype, [&](auto type) {
    copy_in<Tile>(reinterpret_cast<const decltype(type)*>(rows.at(t)) + first, n, to, padded, factor);
  });
}

template <class Tile, class T>
void store_row(const T* from, int64_t n, const HeadRows& rows, int64_t t, int64_t first) {
  with_type<T>(rows.dtype,
               [&](auto type) { copy_out<Tile>(from, n, reinterpret_cast<decltype(type)*>(rows.at(t)) + first); });
}

inline int64_t tile_width(const Problem& p, const Geometry& g, int64_t tile) {
  const int64_t left = p.V - tile * g.columns;
  return left < g.columns ? left : g.columns;
}

// The value columns of one tile for n tokens from t on, zero rows after them.
template <class Tile, int C, class T>
void stage_columns(const HeadRows& rows, int64_t t, int n, const Problem& p, const Geometry& g, int64_t tile, T* to) {
  const int64_t width = tile_width(p, g, tile);
  for (int i = 0; i < n; ++i)
    stage_row<Tile>(rows, t + i, tile * g.columns, width, to + i * Tile::kColumns, Tile::kColumns);
  fill<T>(to + n * Tile::kColumns, (C - n) * Tile::kColumns, 0);
}

// Where the tiles of a part add up the rows of a segment, which starts `skip` rows on: in place; or in scratch, because
// a sum of several tiles shall be rounded once only, or goes through a feature map.
template <class T>
GradientRows segment_rows(const GradientRows& rows, int64_t skip, const GradientRows& scratch, bool mapped = false) {
  if (!rows.data) return {};
  if (mapped || rows.dtype != kDType<T>) return scratch;
  return {static_cast<T*>(rows.data) + skip * rows.stride, rows.stride, rows.dtype};
}
template <class T>
HeadGradients segment_rows(const HeadGradients& to, int64_t skip, const HeadGradients& scratch, bool mapped) {
  return {segment_rows<T>(to.dq, skip, scratch.dq, mapped), segment_rows<T>(to.dk, skip, scratch.dk, mapped),
          segment_rows<T>(to.dv, skip, scratch.dv), segment_rows<T>(to.dbeta, skip, scratch.dbeta),
          segment_rows<T>(to.dg, skip, scratch.dg)};
}

// Rounds the sums of a segment of n tokens into the rows that are narrower.
template <class Tile>
void round_rows(const GradientRows& sums, int64_t n, int64_t width, const GradientRows& rows, int64_t skip) {
  using T = typename Tile::Scalar;
  if (!rows.data || rows.dtype == kDType<T>) return;
  with_type<T>(rows.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(rows.data) + skip * rows.stride;
    for (int64_t t = 0; t < n; ++t)
      copy_out<Tile>(static_cast<const T*>(sums.data) + t * sums.stride, width, to + t * rows.stride);
  });
}

// The caller's memory of one tile of a state, rows s.k apart.
template <class T>
T* tile_of(const States& s, int64_t slot, int64_t h, const Geometry& g, int64_t tile) {
  return static_cast<T*>(s.data) + slot * s.n + h * s.h + tile * g.columns;
}

// A tile of a state in scratch. Its rows K.. and its columns beyond V are padding: zero here, and never stored. Columns
// may turn into anything that a column of zero values may (NaN under infinite keys, say); rows are written by no pass.
template <class Tile, class T>
void load_tile(const States& s, int64_t slot, int64_t h, const Problem& p, const Geometry& g, int64_t tile, T* S) {
  if (!s.data) return fill<T>(S, g.ld * g.columns, 0);
  const T* from = tile_of<T>(s, slot, h, g, tile);
  for (int64_t d = 0; d < p.K; ++d) copy_in<Tile>(from + d * s.k, tile_width(p, g, tile), S + d * g.columns, g.columns);
  fill<T>(S + p.K * g.columns, (g.ld - p.K) * g.columns, 0);
}

template <class Tile, class T>
void store_tile(const T* S, const Problem& p, const Geometry& g, int64_t tile, const States& s, int64_t slot,
                int64_t h) {
  if (!s.data) return;
  T* to = tile_of<T>(s, slot, h, g, tile);
  for (int64_t d = 0; d < p.K; ++d) copy_out<Tile>(S + d * g.columns, tile_width(p, g, tile), to + d * s.k);
}

// z, the last column of a state.
template <class T>
T* z_of(const Problem& p, const States& s, int64_t slot, int64_t h) {
  return static_cast<T*>(s.data) + slot * s.n + h * s.h + p.V;
}
template <class T>
void load_z(const Problem& p, const Geometry& g, const States& s, int64_t slot, int64_t h, T* z) {
  fill<T>(z, g.ld, 0);
  for (int64_t d = 0; d < p.K && s.data; ++d) z[d] = z_of<T>(p, s, slot, h)[d * s.k];
}
template <class T>
void store_z(const T* z, const Problem& p, const States& s, int64_t slot, int64_t h) {
  for (int64_t d = 0; d < p.K && s.data; ++d) z_of<T>(p, s, slot, h)[d * s.k] = z[d];
}

}  // namespace
}  // namespace fwp
