// How a problem is cut: value columns into tiles, tokens into blocks, chunks, segments and windows. Only blocks, chunks
// and tiles touch a result, by rounding. Their sizes depend on V, the dtype and the ISA level: never on B, H or the
// number of threads. Where sequences are short, blocks and chunks have room for fewer tokens, which touches nothing.
#pragma once

#include "arena.hpp"
#include "problem.hpp"

namespace fwp {

struct Geometry {
  int64_t block = 1;    // tokens per pass over a state
  int64_t ld = 0;       // K rounded up to whole packs: length of a staged row of keys
  int64_t columns = 0;  // value columns of a tile
  int64_t tiles = 0;
  int64_t tile = 0;      // numbers that a tile takes among checkpoints and adjoints: its own, and z's if there is one
  int64_t chunk = 0;     // tokens staged together, a multiple of block
  bool once = false;     // no sequence is longer than a chunk: a forward scan takes up every tile of a state once
  int64_t segment = 0;   // tokens between checkpoints, a multiple of chunk
  int64_t window = 0;    // tokens that backward finishes between two barriers, a multiple of segment
  int64_t together = 0;  // sequences that backward works on between two barriers
  bool rounds = false;   // some gradients are stored in less than the accumulation type
};

// Whether a forward scan works where the last states will lie, which in a step is where the first ones do: if it takes
// up every tile only once, and nobody wants one in between. Not where their rows are whole pages: all rows of a tile
// would then compete for the same few places in the caches.
inline bool in_place(const Problem& p, const Geometry& g) {
  constexpr int64_t kPage = 4096;
  return (p.step || (p.hT.data && !p.checkpoints)) && g.once && p.V * item_size(accumulation(p.dtype)) % kPage != 0;
}

// What one worker does at a time. Neighbouring heads lie side by side in memory, so they are taken together, chunk by
// chunk of tokens.
struct Part {
  int64_t n;  // sequence
  int64_t head_begin, head_end;
  int64_t tile_begin, tile_end;  // tiles of value columns
  int64_t slot;                  // first checkpoint slot of this sequence
};

struct ForwardPart : Part {
  bool output;  // false: only checkpoints are wanted
};

// Rows of one gradient for one head, from the first token of a window on: the caller's array itself, or a partial sum.
struct GradientRows {
  void* data = nullptr;  // nullptr: not wanted
  int64_t stride = 0;
  DType dtype = DType::f32;  // of partial sums: the accumulation type
};
struct HeadGradients {
  GradientRows dq, dk, dv, dbeta, dg;
};

// A window of tokens.
struct BackwardPart : Part {
  int64_t begin, end;              // tokens of the sequence, begin a multiple of the window
  void* D;                         // of this sequence, [H][tiles][tile], kept from window to window
  const HeadGradients* gradients;  // of this sequence and these tiles, next_head entries from head to head
  int64_t next_head;
  bool maps;  // takes its dq and dk back through the feature map: it has all tiles of its heads
};

// The part of adding up partial gradients that one worker does at a time: tokens [begin, end) of one sequence. Every
// head has `shares` partial rows. Where value columns meet (columns == 0) each is a share of the whole row; else each
// has `columns` columns of its own. maps: what the shares of a head add up to goes through the gradient of the feature
// map at its rows in `from`; not before, so that results do not depend on how tiles are shared out.
struct ReducePart {
  int64_t n;
  int64_t begin, end, origin;      // the partial rows start at token origin
  const HeadGradients* gradients;  // of this sequence, [H][shares]
  GradientRows HeadGradients::* field;
  int64_t shares;
  Rows from, to;
  int64_t width, columns;
  bool maps;
};

// Asked between blocks of tokens; true ends the call as soon as possible.
struct Stop {
  bool (*asked)(void* data);
  void* data;
};

namespace {

// Where a sequence lies in the arrays.
struct Sequence {
  int64_t b, begin, length;
};
inline Sequence sequence(const Problem& p, int64_t n) {
  if (p.cu_seqlens) return {0, p.cu_seqlens[n], p.cu_seqlens[n + 1] - p.cu_seqlens[n]};
  return {n, 0, p.T};
}

// Which of the states belongs to sequence n.
inline int64_t state_slot(const Problem& p, int64_t n) { return p.state_indices ? p.state_indices[n] : n; }

inline int64_t longest_sequence(const Problem& p) {
  int64_t longest = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    const int64_t length = sequence(p, n).length;
    if (length > longest) longest = length;
    if (!p.cu_seqlens) break;
  }
  return longest;
}

// First checkpoint slot of sequence n; n = N gives the number of slots. Packed sequences need no prefix sum:
// ceil(length / segment) summed over sequences never exceeds offset / segment + their number.
inline int64_t first_slot(const Problem& p, const Geometry& g, int64_t n) {
  if (p.cu_seqlens) return p.cu_seqlens[n] / g.segment + n;
  return n * ((p.T + g.segment - 1) / g.segment);
}

}  // namespace
}  // namespace fwp
