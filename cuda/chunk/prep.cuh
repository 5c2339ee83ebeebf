// The token-parallel part of the chunk form: for each chunk and head the decays G and, for the delta rule, the inverse
//
//   T' = (I + M diag(beta))^-1      M_ij = k_i . (k_j decayed from j to i), j < i
//
// with which the errors of a chunk follow from what its first state leaves unpredicted, E = T' R (scan.cuh). M stands
// where diag(beta) M has stood since Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over
// Sequence Length": so E itself comes out, beta = 0 or not, and the gradient through the inverse is one product.
//
// A decay of channels stands inside of M and of the rows that meet the state, so all in which it appears is made here
// and the scans read it (channels.cu).
#pragma once

#include "../../cpp/scan/arena.hpp"
#include "../launch.hpp"
#include "tile.cuh"

namespace fwp::cuda::chunk {

// Each chunk has a slot on its time axis: a sequence's own, or the one that packed sequences share, on which they are
// counted without a table of the sequences before, so that some slots stay empty.
inline int64_t slots_of_axis(const Problem& p) {
  if (p.cu_seqlens != nullptr) return p.T / kChunk + p.N;
  return p.T > 0 ? (p.T + kChunk - 1) / kChunk : 1;
}
FWP_DEVICE int64_t first_slot(const Problem& p, int64_t n) {
  return p.cu_seqlens != nullptr ? load_global(p.cu_seqlens + n) / kChunk + n : 0;
}

// The slots of every axis that a launch is about. What kernels leave for each other is [axis][count][H]: by place.
struct Window {
  int64_t begin, count;
};
inline Window all_slots(const Problem& p) { return {0, slots_of_axis(p)}; }
inline int64_t axes(const Problem& p) { return p.cu_seqlens != nullptr ? 1 : p.N; }
inline int64_t places(const Problem& p, const Window& w) { return axes(p) * w.count * p.H; }

// The chunks of a sequence that are in a window.
struct Span {
  int64_t axis, slot;  // of its first chunk
  int chunks;          // of the sequence
  int begin, end;
  bool here;  // whether any is in the window, or a sequence without any stands there

  FWP_DEVICE static Span of(const Problem& p, const Window& w, int64_t n, const Sequence& s) {
    const int64_t slot = first_slot(p, n), chunks = (s.length + kChunk - 1) / kChunk, last = w.begin + w.count - slot;
    const int64_t begin = w.begin > slot ? w.begin - slot : 0, end = chunks < last ? chunks : last;
    return {p.cu_seqlens != nullptr ? 0 : s.b,
            slot,
            static_cast<int>(chunks),
            static_cast<int>(begin),
            static_cast<int>(end),
            begin < end || (chunks == 0 && slot >= w.begin && last > 0)};
  }
  // Of the sequence's first chunk, in the window or not; from chunk to chunk it is H more.
  FWP_DEVICE int place(const Problem& p, const Window& w, int64_t h) const {
    return static_cast<int>((axis * w.count + slot - w.begin) * p.H + h);
  }
};

// A chunk and head of a window, by place. Where t0 is not in the sequence there is none.
struct HeadChunk {
  int64_t n, h, t0, slot;
  Sequence s;

  FWP_DEVICE int tokens() const { return tokens_of_chunk(s, t0 / kChunk); }
  FWP_DEVICE static HeadChunk at(const Problem& p, const Window& w, unsigned place) {
    const auto heads = static_cast<unsigned>(p.H), count = static_cast<unsigned>(w.count);
    const int64_t slot = w.begin + place / heads % count;
    int64_t n = place / heads / count;
    if (p.cu_seqlens != nullptr) {  // the last sequence that begins there or before
      int64_t high = p.N;
      for (n = 0; high - n > 1;) {
        const int64_t middle = (n + high) / 2;
        (first_slot(p, middle) <= slot ? n : high) = middle;
      }
    }
    return {n, place % heads, (slot - first_slot(p, n)) * kChunk, slot, sequence(p, n)};
  }
};

// Rows of float16 numbers, each divided by its scale: [places][64][columns].
struct PreparedRows {
  Half* numbers = nullptr;
  float* up = nullptr;

  static PreparedRows take(Arena& arena, int64_t tokens, int columns) {
    return {arena.take<Half>(tokens * columns), arena.take<float>(tokens)};
  }
};

// What is left for the scans, by place.
struct Prepared {
  double* G = nullptr;  // [64]  log2 of the decay from before the chunk to after the token, with one for all channels
  PreparedRows T;       // T', for the delta rule
  // With a decay of channels, where C is what is left of the chunk after a token:
  PreparedRows reads_q, reads_k, writes;  // e^G q, e^G k for the delta rule, e^C k
  PreparedRows P;                         // P_ij = q_i . (k_j decayed from j to i), j <= i
  float* decay = nullptr;                 // [channels] of the chunk

  static Prepared take(Arena& arena, const Problem& p, const Window& w);
};

// Growth, as the sum of a chunk's gates above 0, up to which float16 operands are good enough.
constexpr float kMostGrowth = 8;

// Raises the flags of heads that this form is not for: keys or gates that are not finite, growth.
void prepare(const Problem& p, const Window& window, const Prepared& out, int32_t* left, Queue& queue);
void prepare_channels(const Problem& p, const Window& window, const Prepared& out, int32_t* left, Queue& queue);

// Whether a head was given up. One answer for all threads of a block, where others raise the flag meanwhile; the word
// in shared memory has no other use.
FWP_DEVICE bool given_up(const int32_t* flag, int32_t* word) {
  if (thread_index() == 0) store_shared(word, load_global(flag));
  sync_block();
  return load_shared(word) != 0;
}

// Calls f with the number of columns of tiles that hold keys.
template <class F>
void with_size(int64_t K, const F& f) {
  if (K <= 32) return f(std::integral_constant<int, 32>());
  if (K <= 64) return f(std::integral_constant<int, 64>());
  f(std::integral_constant<int, 128>());
}
constexpr int64_t kMostKeys = 128;

inline Prepared Prepared::take(Arena& arena, const Problem& p, const Window& w) {
  const int64_t tokens = places(p, w) * kChunk;
  Prepared x;
  if (p.decay == Decay::scalar) x.G = arena.take<double>(tokens);
  if (p.rule == Rule::delta) x.T = PreparedRows::take(arena, tokens, kChunk);
  if (p.decay != Decay::channel) return x;
  x.P = PreparedRows::take(arena, tokens, kChunk);
  with_size(p.K, [&](auto channels) {
    x.reads_q = PreparedRows::take(arena, tokens, channels());
    if (p.rule == Rule::delta) x.reads_k = PreparedRows::take(arena, tokens, channels());
    x.writes = PreparedRows::take(arena, tokens, channels());
    x.decay = arena.take<float>(places(p, w) * channels());
  });
  return x;
}

}  // namespace fwp::cuda::chunk
