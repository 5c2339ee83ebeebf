// The kernels of one instruction set level. CMake compiles this file once per level with FWP_ISA set to its name and
// the level's flags; the one symbol it exports is the table. Nothing here may be inline code shared with other objects
// (no standard containers): the linker would be free to keep the copy that only newer machines can run.
#define FWP_JOIN_(a, b) a##b
#define FWP_JOIN(a, b) FWP_JOIN_(a, b)
#define FWP_STRING_(a) #a
#define FWP_STRING(a) FWP_STRING_(a)

#define FWP_IS_base 1
#define FWP_IS_v3 2
#define FWP_IS_v4 3
#define FWP_IS_neon 4
#define FWP_LEVEL FWP_JOIN(FWP_IS_, FWP_ISA)
#if FWP_LEVEL == FWP_IS_v3
#include "pack_v3.hpp"
#elif FWP_LEVEL == FWP_IS_v4
#include "pack_v4.hpp"
#elif FWP_LEVEL == FWP_IS_neon
#include "pack_neon.hpp"
#else
#include "pack_base.hpp"
#endif

#include "tiles.hpp"
//
#include "../scan/backward.hpp"
#include "../scan/diagnose.hpp"
#include "kernels.hpp"

namespace fwp {
namespace {

// Tokens per pass over the state. The keys and queries of a block by two packs fill 16 of 32 registers, or 12 of 16.
// Longer blocks spend more on the dot products inside them than they save (benchmarks/NOTES.md).
constexpr int kBlock = kVectorRegisters >= 32 ? 4 : 3;
constexpr int kChunkBlocks = 24 / kBlock;

template <int n>
struct Constant {
  static constexpr int value = n;
};

// Calls f with the tile that a problem asks for, or with the tile, rule and decay.
template <class F>
auto with_tile(const Problem& p, F f) {
  return p.dtype == DType::f64 ? f(Tiles<double>()) : f(Tiles<float>());
}
template <class Tile, class Rule, class F>
auto with_decay(const Problem& p, F f) {
  if (p.decay == Decay::none) return f(Tile(), Rule(), NoDecay());
  if (p.decay == Decay::scalar) return f(Tile(), Rule(), ScalarDecay());
  return f(Tile(), Rule(), ChannelDecay());
}
template <class Tile, class F>
auto with_rule(const Problem& p, F f) {
  return p.rule == Rule::linear ? with_decay<Tile, Linear>(p, f) : with_decay<Tile, Delta>(p, f);
}
template <class F>
auto with_types(const Problem& p, F f) {
  return with_tile(p, [&](auto tile) { return with_rule<decltype(tile)>(p, f); });
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
int64_t at_least(int64_t n, int64_t least) { return n < least ? least : n; }
int64_t at_most(int64_t n, int64_t most) { return n > most ? most : n; }

template <class Tile>
Geometry cut(const Problem& p) {
  Geometry g;
  const int64_t tokens = at_least(longest_sequence(p), 1);
  g.block = tokens == 1 ? 1 : kBlock;
  g.ld = round_up(p.K, Tile::kWidth);
  g.columns = Tile::kColumns;
  g.tiles =
      at_least((p.V + g.columns - 1) / g.columns, p.attention_norm ? 1 : 0);  // z takes a tile, if only of padding
  g.tile = g.ld * g.columns + (p.attention_norm ? g.ld : 0);
  g.chunk = at_most(round_up(tokens, kBlock), kChunkBlocks * kBlock);
  g.once = tokens <= g.chunk;
  const int64_t longest = round_up(tokens, g.chunk);
  // A checkpoint is K V numbers: one every K tokens costs V per token, whatever K and V. Longer segments would take
  // less memory, but backward slows down when the states and rows of one do not fit into the second-level cache. Rows
  // of halves take half the room, and a checkpoint weighs twice as much beside them. Where time is short, so are
  // segments: the states inside one then take no more than all checkpoints.
  const int64_t by_keys = item_size(p.dtype) == 2 ? 2 * g.ld : g.ld;
  const int64_t by_time = static_cast<int64_t>(__builtin_sqrt(static_cast<double>(longest * g.tiles * g.block)));
  g.segment = at_most(round_up(at_least(at_most(by_keys, by_time), 2 * g.chunk), g.chunk), longest);
  // Enough work between two barriers, but partial gradients of usual sizes that fit into the caches.
  constexpr int64_t kParts = 32, kTokens = 4096;
  const int64_t parts = at_least(p.H * g.tiles, 1);
  g.together = at_least(at_most(kParts / parts, p.N), 1);
  g.window = at_most(round_up(at_least(kTokens / (g.together * parts), 1), g.segment), round_up(longest, g.segment));
  if (g.tiles == 0) g.window = round_up(longest, g.segment);  // nothing to do but zeros
  const auto narrow = [&p](const Rows& rows) { return rows.data && rows.dtype != accumulation(p.dtype); };
  g.rounds = narrow(p.q) || narrow(p.beta) || narrow(p.g);
  return g;
}

Geometry geometry(const Problem& p) {
  return with_tile(p, [&](auto tile) { return cut<decltype(tile)>(p); });
}

size_t forward_scratch(const Problem& p, const Geometry& g, int64_t heads, int64_t tiles) {
  return with_types(p, [&](auto tile, auto rule, auto decay) {
    Arena arena(nullptr);
    if (g.block == 1)
      (void)ForwardScratch<decltype(tile), decltype(rule), decltype(decay), 1>(arena, p, g, heads, tiles);
    else
      (void)ForwardScratch<decltype(tile), decltype(rule), decltype(decay), kBlock>(arena, p, g, heads, tiles);
    return arena.used();
  });
}

size_t backward_scratch(const Problem& p, const Geometry& g, int64_t heads) {
  return with_types(p, [&](auto tile, auto rule, auto decay) {
    Arena arena(nullptr);
    (void)BackwardScratch<decltype(tile), decltype(rule), decltype(decay), kBlock>(arena, p, g, heads);
    Arena reducing(nullptr);
    (void)ReduceScratch<decltype(tile)>(reducing, p);
    return arena.used() > reducing.used() ? arena.used() : reducing.used();
  });
}

void forward(const Problem& p, const Geometry& g, const ForwardPart& part, void* scratch, const Stop& stop) {
  with_types(p, [&](auto tile, auto rule, auto decay) {
    if (g.block == 1)
      scan_forward<decltype(tile), decltype(rule), decltype(decay), 1>(p, g, part, scratch, stop);
    else
      scan_forward<decltype(tile), decltype(rule), decltype(decay), kBlock>(p, g, part, scratch, stop);
  });
}

void backward(const Problem& p, const Geometry& g, const BackwardPart& part, void* scratch, const Stop& stop) {
  with_types(p, [&](auto tile, auto rule, auto decay) {
    scan_backward<decltype(tile), decltype(rule), decltype(decay), kBlock>(p, g, part, scratch, stop);
  });
}

void reduce_gradient(const Problem& p, const ReducePart& part, void* scratch, const Stop& stop) {
  with_tile(p, [&](auto tile) { reduce<decltype(tile)>(p, part, scratch, stop); });
}

void sum_dz(const Problem& p, const Geometry& g, int64_t n, void* D) {
  with_tile(p, [&](auto tile) { sum_z<decltype(tile)>(p, g, n, D); });
}

size_t diagnose_scratch(const Problem& p, const Geometry& g) {
  return with_tile(p, [&](auto tile) {
    Arena arena(nullptr);
    (void)DiagnoseScratch<decltype(tile)>(arena, p, g);
    return arena.used();
  });
}

void diagnose(const Problem& p, const Geometry& g, int64_t n, int64_t h, void* scratch, const Stop& stop) {
  with_tile(p, [&](auto tile) { scan_diagnose<decltype(tile)>(p, g, n, h, scratch, stop); });
}

size_t map_scratch(const Problem& p) {
  return with_tile(p, [&](auto tile) {
    Arena arena(nullptr);
    (void)MapRows<decltype(tile)>(arena, p);
    return arena.used();
  });
}

void map_rows(const Problem& p, int64_t begin, int64_t end, void* scratch) {
  with_tile(p, [&](auto tile) {
    Arena arena(scratch);
    MapRows<decltype(tile)>(arena, p).run(p, begin, end);
  });
}

template <class T>
double multiply_add(int64_t rounds) {
  using P = Pack<T>;
  constexpr int kChains = kVectorRegisters >= 32 ? 16 : 12;
  P x[kChains];
  FWP_UNROLL for (int j = 0; j < kChains; ++j) x[j] = broadcast(static_cast<T>(j));  // all different: none can be saved
  const P factor = broadcast(T(0.999)), addend = broadcast(T(0.001));
  for (int64_t i = 0; i < rounds; ++i) {
    FWP_UNROLL for (int j = 0; j < kChains; ++j) x[j] = x[j] * factor + addend;
    __asm__ volatile("" : : "r"(i) : "memory");
  }
  P sum = x[0];
  FWP_UNROLL for (int j = 1; j < kChains; ++j) sum += x[j];
  T out[kLanes<T>];
  store_unaligned(out, sum);
  volatile T keep = out[0];
  (void)keep;
  return 2.0 * static_cast<double>(rounds) * kChains * kLanes<T>;
}

double fma(bool f64, int64_t rounds) { return f64 ? multiply_add<double>(rounds) : multiply_add<float>(rounds); }

}  // namespace

extern const Kernels FWP_JOIN(kernels_, FWP_ISA);
const Kernels FWP_JOIN(kernels_, FWP_ISA) = {
    FWP_STRING(FWP_ISA), geometry, forward_scratch, backward_scratch, forward, backward, reduce_gradient, sum_dz,
    diagnose_scratch,    diagnose, map_scratch,     map_rows,         fma,
};

}  // namespace fwp
