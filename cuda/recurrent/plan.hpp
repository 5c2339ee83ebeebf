// How a call is cut among blocks of threads, and what memory it takes: functions of the problem, and, as for where
// things lie, of the device.
#pragma once

#include <algorithm>

#include "../../cpp/scan/arena.hpp"
#include "../launch.hpp"
#include "block.cuh"

namespace fwp::cuda::recurrent {

inline int64_t tiles(const Problem& p) { return std::max<int64_t>(1, (p.V + kColumns - 1) / kColumns); }
inline int64_t warps(const Problem& p) {
  return std::min<int64_t>(std::max<int64_t>((p.K + kWarpSize - 1) / kWarpSize, 1), kMostWarps);
}
inline int threads(const Problem& p) { return kWarpSize * static_cast<int>(warps(p)); }

// What a block of threads works in: what it has whatever K, which is in shared memory, and after that, or in the
// workspace, what grows with K.
template <class T>
struct Room {
  int64_t numbers;  // that grow with K
  size_t fixed;     // bytes
  bool in_shared;

  // `states` tiles at once, and bytes of what threads share beside Common.
  Room(const Problem& p, int states, size_t more)
      : numbers(whole_quads(p.K * (kRow<T> + states * kTileRow))),
        fixed(sizeof(Common<T>) + static_cast<size_t>(warps(p)) * sizeof(T[2 * kBlock<T> * kColumns]) + more),
        in_shared(fixed + static_cast<size_t>(numbers) * sizeof(T) <= most_shared_bytes(p.device)) {}

  size_t shared_bytes() const { return fixed + (in_shared ? static_cast<size_t>(numbers) * sizeof(T) : 0); }
  int64_t workspace(int64_t blocks) const { return in_shared ? 0 : blocks * numbers; }
  static int64_t whole_quads(int64_t n) { return (n + kQuad<T> - 1) / kQuad<T> * kQuad<T>; }
};

// f(Rule, Decay, Place) with values of the types. In the workspace one kernel serves all decays.
template <class F>
void with_types(const Problem& p, bool in_shared, const F& f) {
  const auto with_decay = [&](auto rule) {
    if (!in_shared) return f(rule, ChannelDecay(), InWorkspace());
    if (p.decay == fwp::Decay::none) return f(rule, NoDecay(), InShared());
    if (p.decay == fwp::Decay::scalar) return f(rule, ScalarDecay(), InShared());
    f(rule, ChannelDecay(), InShared());
  };
  p.rule == fwp::Rule::delta ? with_decay(Delta()) : with_decay(Linear());
}
// f(number) with one of the type that is computed with.
template <class F>
auto with_number(const Problem& p, const F& f) {
  return accumulation(p.dtype) == DType::f64 ? f(double()) : f(float());
}

}  // namespace fwp::cuda::recurrent
