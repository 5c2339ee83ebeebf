// Windows of time: memory grows with the window, not with time, and no bit depends on it.
#pragma once

#include <algorithm>
#include <cmath>

#include "prep.cuh"

namespace fwp::cuda::chunk {

constexpr size_t kWindowBytes = size_t{256} << 20;

// The slots of the longest window that fits, or of those that are asked for; take(arena, window) takes its memory.
// Where not even those fit that are as long as there are windows, these: then states carried between windows take about
// as much as what a window holds.
template <class Take>
int64_t slots_of_window(const Problem& p, int64_t asked, const Take& take) {
  if (asked > 0) return std::min(slots_of_axis(p), asked);
  Arena one(nullptr);
  take(one, Window{0, 1});
  const auto fit = static_cast<int64_t>(kWindowBytes / std::max(one.used(), size_t{1}));
  const auto even = static_cast<int64_t>(std::sqrt(static_cast<double>(slots_of_axis(p)))) + 1;
  return std::min(slots_of_axis(p), std::max(fit, even));
}
// Those of a scan. Without a decay of channels a chunk's memory is small, and time is not cut.
inline int64_t slots_of_scan(const Problem& p, int64_t asked) {
  if (p.decay != Decay::channel && asked == 0) return slots_of_axis(p);
  return slots_of_window(p, asked, [&](Arena& arena, const Window& window) { Prepared::take(arena, p, window); });
}

// What goes on from window to window, [windows - 1][axis][H][K][V]: states at first, adjoints of states at last.
class Carried {
 public:
  Carried(Arena& arena, const Problem& p, int64_t windows)
      : windows_(windows), view_{nullptr, p.H * p.K * p.V, p.K * p.V, p.V}, size_(axes(p) * view_.n) {
    numbers_ = arena.take<float>((windows - 1) * size_);
  }
  States before(int64_t window) const { return window > 0 ? at(window - 1) : States{}; }
  States after(int64_t window) const { return window + 1 < windows_ ? at(window) : States{}; }

 private:
  States at(int64_t i) const {
    States states = view_;
    states.data = numbers_ + i * size_;
    return states;
  }
  int64_t windows_;
  States view_;
  int64_t size_;
  float* numbers_;
};

}  // namespace fwp::cuda::chunk
