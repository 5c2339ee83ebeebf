// How a call is shared out among workers, and what memory it takes: functions of the problem alone, so that a query for
// the workspace and the call itself agree.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../scan/geometry.hpp"
#include "kernels.hpp"

namespace fwp::cpu {

// A pool round trip costs about as much as this many flops.
inline constexpr double kSerialFlops = 1e6;

inline int useful_threads(const Problem& p, int64_t parts) {
  const double flops = 6.0 * static_cast<double>(p.H) * static_cast<double>(p.K) * static_cast<double>(p.V) *
                       static_cast<double>(p.cu_seqlens ? p.T : p.N * p.T);
  return flops < kSerialFlops ? 1 : static_cast<int>(std::min<int64_t>(p.threads, std::max<int64_t>(parts, 1)));
}

// Bytes of a number in the accumulation type.
inline int64_t sum_size(const Problem& p) { return item_size(accumulation(p.dtype)); }

// Scratch of all workers.
inline size_t for_workers(size_t scratch, int workers) {
  const size_t count = static_cast<size_t>(std::max(workers, 1));
  return scratch > Arena::kTooMuch / count ? Arena::kTooMuch : scratch * count;
}

// How heads and tiles are shared out: neighbouring heads together, as many as leave every thread a part and what is in
// use of them (`cached` numbers of each) fits into the second-level cache; the tiles of a head apart only where there
// are few heads, since they share the staged keys. Sums over the tiles of a head must not depend on that, so they are
// cut in one way only, into single tiles (added one by one), or, to bound the partial sums of very many tiles, always
// into kMostShares groups.
struct Shares {
  int64_t heads, tiles;                      // of a part
  int64_t parts_per_tile_row, per_sequence;  // parts

  Shares(const Problem& p, const Geometry& g, int64_t sequences, int64_t cached) {
    const int64_t threads = p.threads, all = sequences * p.H;
    const int64_t fitting = kCachedNumbers / std::max<int64_t>(1, cached);
    const bool few = threads > 1 && all < 2 * threads;
    const int64_t group = (g.tiles + kMostShares - 1) / kMostShares;
    // A step takes z from the caller's state and leaves it there: one part has all of a head.
    tiles = (few || group > 1) && !(p.step && p.attention_norm) ? group : g.tiles;
    heads = few ? 1 : std::max<int64_t>(1, std::min({(all + threads - 1) / threads, fitting, p.H}));
    parts_per_tile_row = tiles ? (g.tiles + tiles - 1) / tiles : 0;
    per_sequence = (p.H + heads - 1) / heads * parts_per_tile_row;
  }

  // Which of the parts of a head: the one whose partial sums these are.
  int64_t share(int64_t index) const { return index % parts_per_tile_row; }

  // The index-th part of sequences `begin` and on; slots are counted from `slot`.
  Part part(const Problem& p, const Geometry& g, int64_t begin, int64_t slot, int64_t index) const {
    Part part;
    part.n = begin + index / per_sequence;
    part.head_begin = index % per_sequence / parts_per_tile_row * heads;
    part.head_end = std::min(part.head_begin + heads, p.H);
    part.tile_begin = share(index) * tiles;
    part.tile_end = std::min(part.tile_begin + tiles, g.tiles);
    part.slot = first_slot(p, g, part.n) - slot;
    return part;
  }

  static constexpr int64_t kCachedNumbers = 128 * 1024;
  static constexpr int64_t kMostShares = 16;
};

struct ForwardPlan {
  Geometry g;
  Shares shares;
  int threads;
  size_t scratch;

  ForwardPlan(const Problem& p, const Kernels& k, int64_t sequences)
      : g(k.geometry(p)),
        shares(p, g, sequences, g.tiles * g.ld * g.columns + 2 * g.chunk * (p.K + p.V)),
        threads(useful_threads(p, sequences * shares.per_sequence)),
        scratch(k.forward_scratch(p, g, shares.heads, shares.tiles)) {}
};

// The gradients a backward pass has to deliver, in one order.
struct Field {
  Rows Problem::* from;  // the input
  Rows Problem::* to;
  GradientRows HeadGradients::* rows;
  int64_t width;    // numbers per row
  int64_t columns;  // of a part, where each part of a head has its own; 0: each has a share of the whole row
  bool direct;      // one part alone makes each row: no partial sums
  int64_t partial;  // numbers per partial row
  bool maps;        // goes through the feature map after its partial rows were added up
};

struct BackwardPlan {
  static constexpr int kFields = 5;
  Geometry g;
  Shares shares;
  Field fields[kFields];
  int64_t shares_per_head;
  int64_t partial_numbers;  // partial sums per head and share
  int64_t slots;            // checkpoints at once
  int threads;
  size_t scratch, tile_bytes;

  BackwardPlan(const Problem& p, const Kernels& k)
      : g(k.geometry(p)), shares(p, g, g.together, 2 * g.segment * (4 * p.K + 3 * p.V)) {
    shares_per_head = shares.parts_per_tile_row;
    const int64_t dg_width = p.decay == Decay::channel ? p.K : 1;
    const int64_t key_width = p.key_size(), key_partial = maps_late(p) ? p.K : key_width;
    const int64_t columns = shares.tiles * g.columns;
    fields[0] = {&Problem::q, &Problem::dq, &HeadGradients::dq, key_width, 0, false, key_partial, maps_late(p)};
    fields[1] = {&Problem::k, &Problem::dk, &HeadGradients::dk, key_width, 0, false, key_partial, maps_late(p)};
    fields[2] = {&Problem::v, &Problem::dv, &HeadGradients::dv, p.V, columns, false, columns, false};
    fields[3] = {&Problem::beta, &Problem::dbeta, &HeadGradients::dbeta, 1, 0, false, 1, false};
    fields[4] = {&Problem::g, &Problem::dg, &HeadGradients::dg, dg_width, 0, false, dg_width, false};
    partial_numbers = 0;
    for (Field& f : fields) {  // by the inputs, so that a query for the workspace needs no gradients
      const Rows& from = p.*f.from;
      f.direct = from.group == 1 && (f.columns || shares_per_head == 1);
      if (from.data && !f.direct) partial_numbers += f.partial * g.window;
    }
    if (partial_numbers == 0)  // nothing to add up between windows: one window, no barriers
      g.window = std::max<int64_t>(1, (longest_sequence(p) + g.segment - 1) / g.segment) * g.segment;
    threads = useful_threads(p, g.together * shares.per_sequence);
    scratch = k.backward_scratch(p, g, shares.heads);
    tile_bytes = static_cast<size_t>(g.tile * sum_size(p));
    slots = 0;
    for (int64_t n = 0; n < p.N; n += g.together)
      slots = std::max(slots, first_slot(p, g, std::min(n + g.together, p.N)) - first_slot(p, g, n));
  }

  // Whether gradients of keys go through the feature map only after the shares of a head were added up.
  bool maps_late(const Problem& p) const { return p.features.active() && shares_per_head > 1; }
};

// Where things lie in the workspace of a backward call.
struct BackwardMemory {
  char *checkpoints, *D, *partial, *scratch;
  HeadGradients* gradients;  // [sequences together][H][shares]
  size_t used;

  BackwardMemory(const Problem& p, const BackwardPlan& plan, const ForwardPlan& forward, void* base) {
    Arena arena(base);
    const int64_t heads = plan.g.together * p.H, shares = plan.shares_per_head;
    const int64_t tile = static_cast<int64_t>(plan.tile_bytes), item = sum_size(p);
    checkpoints = p.checkpoints ? nullptr : arena.take<char>(plan.slots * p.H * plan.g.tiles * tile);
    D = arena.take<char>(heads * plan.g.tiles * tile);
    partial = arena.take<char>(heads * shares * plan.partial_numbers * item);
    gradients = arena.take<HeadGradients>(heads * shares);
    const size_t worker = std::max(plan.scratch, p.checkpoints ? 0 : forward.scratch);
    scratch = arena.take<char>(static_cast<int64_t>(for_workers(worker, std::max(plan.threads, forward.threads))));
    used = arena.used();
  }
};

}  // namespace fwp::cpu
