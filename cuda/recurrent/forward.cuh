// Forward: a block of threads takes one tile of one head of one sequence from the first token to the last.
#pragma once

#include "plan.hpp"

namespace fwp::cuda::recurrent {

// Which heads to do: where `only` is there, those with a head that is not 0 in it among the `together` heads that they
// share rows of gradients with.
struct Wanted {
  const int32_t* only;
  int64_t together;

  FWP_DEVICE bool operator()(const Problem& p, int64_t n, int64_t h) const {
    bool wanted = only == nullptr;
    const int64_t first = n * p.H + h / together * together;
    for (int64_t i = 0; i < together && !wanted; ++i) wanted = load_global(only + first + i) != 0;
    return wanted;
  }
  // Whether any head of the sequence is among them; a whole warp asks.
  FWP_DEVICE bool any(const Problem& p, int64_t n) const {
    if (only == nullptr) return true;
    int32_t some = 0;
    for (int64_t h = lane(); h < p.H; h += kWarpSize) some |= load_global(only + n * p.H + h);
    FWP_UNROLL for (int mask = 1; mask < kWarpSize; mask *= 2) some |= shuffle_xor(some, mask);
    return some != 0;
  }
};

// The state before every `segment` tokens of a sequence but the first, as whole tiles. All tokens of the call lie one
// after the other, so that a slot is known without looking at other sequences (`first` is where this one begins).
template <class T>
struct Checkpoints {
  T* data;
  int64_t segment;

  // (first + t) / segment differs among all t > 0 that are multiples of it, of all sequences, and is 1 at least.
  FWP_DEVICE T* at(const Problem& p, int64_t first, int64_t t, int64_t h, int64_t tile, int64_t tile_count) const {
    return data + ((((first + t) / segment - 1) * p.H + h) * tile_count + tile) * p.K * kTileRow;
  }
  static int64_t slots(int64_t tokens, int64_t segment) { return tokens > 0 ? (tokens - 1) / segment : 0; }
};

// Where sequence n begins among all tokens of the call.
FWP_DEVICE int64_t first_token(const Problem& p, int64_t n) {
  return p.cu_seqlens != nullptr ? load_global(p.cu_seqlens + n) : n * p.T;
}

template <class T>
struct ForwardPlan {
  Wanted wanted;
  Checkpoints<T> checkpoints;
  int64_t tiles;
  Room<T> room;
  T* workspace;
  T* z;  // [N][H][K], of a step whose tiles all read z where it is to be updated; nullptr: it goes to the state at once

  ForwardPlan(const Problem& p, const int32_t* only, int64_t together)
      : wanted{only, together},
        checkpoints{},
        tiles(recurrent::tiles(p)),
        room(p, 1, 0),
        workspace(nullptr),
        z(nullptr) {}

  int64_t blocks(const Problem& p) const { return p.N * p.H * tiles; }
};

// What a block of threads works in, from its number. `more` bytes of shared memory come after Common.
template <class T, class Rule, class Decay, class Place>
FWP_DEVICE Block<T, Rule, Decay, Place> block_of(const Problem& p, const Sequence& s, int h, int tile, int64_t number,
                                                 const Room<T>& room, T* workspace) {
  auto* const shared = static_cast<char*>(shared_memory());
  auto* const common = reinterpret_cast<Common<T>*>(shared);
  auto* const sums = reinterpret_cast<T*>(shared + sizeof(Common<T>));
  T* rows;
  if constexpr (Place::shared)
    rows = reinterpret_cast<T*>(shared + room.fixed);
  else
    rows = workspace + number * room.numbers;
  return {p, s, h, tile, common, sums, rows + p.K * kRow<T>, rows};
}

// outputs: o; else checkpoints. Either way hT.
template <class T, class Rule, class Decay, class Place, bool outputs>
FWP_KERNEL void scan_forward(FWP_PARAMETER Problem p, FWP_PARAMETER ForwardPlan<T> plan) {
  constexpr int C = kBlock<T>;
  const int64_t number = block_index_x(), n = number / plan.tiles / p.H;
  const int h = static_cast<int>(number / plan.tiles % p.H), tile = static_cast<int>(number % plan.tiles);
  if (!plan.wanted(p, n, h)) return;
  const auto block = block_of<T, Rule, Decay, Place>(p, sequence(p, n), h, tile, number, plan.room, plan.workspace);
  const int64_t length = block.s.length;
  const int64_t slot = state_slot(p, n);
  if (slot == kNoSlot) return block.clear_output();
  block.load_state(p.h0, slot, block.S);
  for (int64_t t = 0; t < length;) {
    if (!outputs && t > 0 && t % plan.checkpoints.segment == 0)
      block.template copy<Place, InWorkspace>(block.S,
                                              plan.checkpoints.at(p, first_token(p, n), t, h, tile, plan.tiles));
    const int64_t end = length - t < C ? length : (t / C + 1) * C;
    int tokens = static_cast<int>(end - t);
    T v[C], beta[C], e[C], u[C], o[C];
    block.load_column(p.v, t, tokens, v);
    tokens = block.stage(t, tokens, outputs);
    block.load_beta(t, tokens, beta);
    FWP_UNROLL for (int i = 0; i < C; ++i) v[i] = i < tokens ? v[i] : T(0);
    block.template advance<outputs>(tokens, v, beta, e, u, o);
    if (outputs && block.there())
      store_tokens(p.o, block.at(p.o, t) + block.column(), p.o.t, tokens, o, warp(), warps());
    t += tokens;
  }
  block.store_state(block.S, p.hT, slot, tile == 0 && plan.z == nullptr);
  if constexpr (outputs) {
    if (tile == 0 && plan.z != nullptr) block.store_z(block.S, plan.z + (n * p.H + h) * p.K);
  }
}

// z [N][H][K] into the last column of the states that steps have updated.
template <class T>
FWP_KERNEL void put_z(FWP_PARAMETER Problem p, const T* from) {
  const int64_t h = block_index_x() % p.H, n = block_index_x() / p.H, slot = state_slot(p, n);
  if (slot == kNoSlot) return;
  T* const state = static_cast<T*>(p.hT.data) + state_at(p.hT, slot, h) + p.V;
  for (int64_t d = thread_index(); d < p.K; d += block_threads())
    store_global(state + d * p.hT.k, load_global(from + (n * p.H + h) * p.K + d));
}

template <bool outputs, class T>
void launch_forward(const Problem& p, const ForwardPlan<T>& plan, Queue& queue) {
  with_types(p, plan.room.in_shared, [&](auto rule, auto decay, auto place) {
    queue.run("scan_forward", scan_forward<T, decltype(rule), decltype(decay), decltype(place), outputs>,
              {plan.blocks(p)}, threads(p), plan.room.shared_bytes(), p, plan);
  });
}

}  // namespace fwp::cuda::recurrent
