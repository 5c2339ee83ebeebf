// Runs a problem: hands its parts to the thread pool, and stops when the caller asks to.
#include "dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "isa.hpp"
#include "plan.hpp"
#include "threads.hpp"

namespace fwp::cpu {
namespace {

// Whether a call has been interrupted. The calling thread asks the caller every few milliseconds, the others look.
class Interruption {
 public:
  explicit Interruption(const Interrupt& interrupt)
      : interrupt_(interrupt), caller_(std::this_thread::get_id()), asked_(Clock::now()), looked_(asked_) {}

  Stop stop() {
    return {[](void* self) { return static_cast<Interruption*>(self)->asked(); }, this};
  }
  // The clock costs as much as thousands of flops, so it is not read at every block, but as often as blocks are long.
  bool asked() {
    if (std::this_thread::get_id() == caller_ && ++asks_ >= asks_per_look_) look();
    return stopped_.load(std::memory_order_relaxed);
  }
  // By the calling thread only.
  void ask() {
    const auto now = Clock::now();
    looked_ = now;
    if (!interrupt_.poll || now - asked_ < std::chrono::milliseconds(5)) return;
    asked_ = now;
    if (interrupt_.poll(interrupt_.data)) stopped_.store(true, std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr unsigned kMostAsks = 16;

  void look() {
    const auto before = looked_;
    ask();
    asks_ = 0;
    if (looked_ - before > std::chrono::milliseconds(1))
      asks_per_look_ = 1;
    else if (asks_per_look_ < kMostAsks)
      ++asks_per_look_;
  }

  const Interrupt interrupt_;
  const std::thread::id caller_;
  Clock::time_point asked_, looked_;
  unsigned asks_ = 0, asks_per_look_ = 1;
  std::atomic<bool> stopped_{false};
};

// Runs body(index, worker) for every index on the pool; false if the call was interrupted.
template <class Body>
bool for_each(int threads, int64_t count, Interruption& interruption, Body body) {
  struct Context {
    Body& body;
    Interruption& interruption;
  } context{body, interruption};
  parallel_for(threads, count,
               {[](void* c, int64_t index, int worker) {
                  auto& run = *static_cast<Context*>(c);
                  if (!run.interruption.asked()) run.body(index, worker);
                },
                [](void* c) { static_cast<Context*>(c)->interruption.ask(); }, &context});
  return !interruption.asked();
}

// Forward over sequences [begin, end).
bool scan_sequences(const Problem& p, const Kernels& k, const ForwardPlan& plan, void* workspace, int64_t begin,
                    int64_t end, bool output, Interruption& interruption) {
  const int64_t slot = first_slot(p, plan.g, begin);
  return for_each(plan.threads, (end - begin) * plan.shares.per_sequence, interruption, [&](int64_t i, int worker) {
    const ForwardPart part{plan.shares.part(p, plan.g, begin, slot, i), output};
    k.forward(p, plan.g, part, static_cast<char*>(workspace) + static_cast<size_t>(worker) * plan.scratch,
              interruption.stop());
  });
}

// Rows of a feature map are shared out in pieces, some for each thread where there is enough to do.
struct MapPlan {
  int64_t pieces;
  int threads;
  size_t scratch;

  MapPlan(const Problem& p, const Kernels& k) {
    const double numbers = static_cast<double>(p.T) * static_cast<double>(p.features.inputs + p.K);
    threads = numbers * 16 < kSerialFlops ? 1 : static_cast<int>(std::min<int64_t>(p.threads, p.T));
    pieces = threads > 1 ? 4 * threads : 1;
    scratch = k.map_scratch(p);
  }
};

// A diagnosis has a part for every head.
struct DiagnosePlan {
  Geometry g;
  int threads;
  size_t scratch;

  DiagnosePlan(const Problem& p, const Kernels& k)
      : g(k.geometry(p)), threads(useful_threads(p, p.N * p.H)), scratch(k.diagnose_scratch(p, g)) {}
};

// One backward call: groups of sequences, and in each the windows of tokens from the last to the first.
class Backward {
 public:
  Backward(const Problem& p, const Kernels& k, void* workspace)
      : p_(p),
        k_(k),
        plan_(p, k),
        forward_(p, k, plan_.g.together),
        memory_(p, plan_, forward_, workspace),
        interruption_(p.interrupt) {}

  bool run() {
    for (int64_t begin = 0; begin < p_.N; begin += plan_.g.together)
      if (!run_sequences(begin, std::min(begin + plan_.g.together, p_.N))) return false;
    return true;
  }

 private:
  bool run_sequences(int64_t begin, int64_t end) {
    if (memory_.checkpoints) {
      p_.checkpoints = memory_.checkpoints;
      if (!scan_sequences(p_, k_, forward_, memory_.scratch, begin, end, false, interruption_)) return false;
    }
    int64_t windows = 1;  // an empty sequence still hands its state's adjoint back
    for (int64_t n = begin; n < end; ++n)
      windows = std::max(windows, (sequence(p_, n).length + plan_.g.window - 1) / plan_.g.window);
    for (int64_t w = windows - 1; w >= 0; --w) {
      place_gradients(begin, end, w * plan_.g.window);
      if (!run_window(begin, end, w * plan_.g.window) || !reduce(begin, end, w * plan_.g.window)) return false;
    }
    for (int64_t n = begin; n < end && p_.attention_norm && p_.dh0.data; ++n)
      k_.sum_dz(p_, plan_.g, n, adjoints(n - begin));
    return true;
  }

  // Where each part writes each gradient: the caller's array, or partial rows of its own.
  void place_gradients(int64_t begin, int64_t end, int64_t first) {
    const DType sum = accumulation(p_.dtype);
    const int64_t shares = plan_.shares_per_head;
    for (int64_t i = 0; i < (end - begin) * p_.H * shares; ++i) {
      const Sequence seq = sequence(p_, begin + i / (p_.H * shares));
      const int64_t h = i / shares % p_.H, share = i % shares;
      char* partial = memory_.partial + i * plan_.partial_numbers * item_size(sum);
      for (const Field& f : plan_.fields) {
        const Rows& to = p_.*f.to;
        GradientRows& rows = memory_.gradients[i].*f.rows;
        rows = {};
        if (!to.data) continue;
        if (f.direct) {
          const int64_t at = seq.b * to.b + (seq.begin + first) * to.t + h * to.h + share * f.columns;
          rows = {static_cast<char*>(to.data) + at * item_size(to.dtype), to.t, to.dtype};
        } else {
          rows = {partial, f.partial, sum};
          partial += f.partial * plan_.g.window * item_size(sum);
        }
      }
    }
  }

  bool run_window(int64_t begin, int64_t end, int64_t first) {
    const Geometry& g = plan_.g;
    const Shares& shares = plan_.shares;
    const int64_t slot = memory_.checkpoints ? first_slot(p_, g, begin) : 0;  // the caller's hold all sequences
    return for_each(plan_.threads, (end - begin) * shares.per_sequence, interruption_, [&](int64_t i, int worker) {
      BackwardPart part{};
      static_cast<Part&>(part) = shares.part(p_, g, begin, slot, i);
      const int64_t length = sequence(p_, part.n).length, heads_before = (part.n - begin) * p_.H;
      if (first >= length && first > 0) return;
      part.begin = first;
      part.end = std::min(first + g.window, length);
      part.D = adjoints(part.n - begin);
      part.next_head = plan_.shares_per_head;
      part.maps = p_.features.active() && !plan_.maps_late(p_);
      part.gradients = memory_.gradients + (heads_before + part.head_begin) * part.next_head + shares.share(i);
      k_.backward(p_, g, part, memory_.scratch + static_cast<size_t>(worker) * plan_.scratch, interruption_.stop());
    });
  }

  // Of a sequence among those worked on.
  char* adjoints(int64_t index) const {
    return memory_.D + static_cast<size_t>(index * p_.H * plan_.g.tiles) * plan_.tile_bytes;
  }

  bool is_reduced(const Field& f) const { return (p_.*f.to).data && !f.direct && f.width > 0; }

  bool reduce(int64_t begin, int64_t end, int64_t first) {
    const Geometry& g = plan_.g;
    constexpr int64_t kTokens = 256;  // a piece is short, so that a call can be stopped
    const int64_t pieces = std::max<int64_t>(plan_.threads > 1 ? 2 * plan_.threads : 1, g.window / kTokens);
    bool needed = false;
    for (const Field& f : plan_.fields) needed = needed || is_reduced(f);
    if (!needed) return true;
    return for_each(plan_.threads, (end - begin) * pieces, interruption_, [&](int64_t i, int worker) {
      ReducePart part{};
      part.n = begin + i / pieces;
      const int64_t tokens = std::clamp<int64_t>(sequence(p_, part.n).length - first, 0, g.window);
      part.begin = first + tokens * (i % pieces) / pieces;
      part.end = first + tokens * (i % pieces + 1) / pieces;
      part.origin = first;
      part.shares = plan_.shares_per_head;
      part.gradients = memory_.gradients + i / pieces * p_.H * part.shares;
      for (const Field& f : plan_.fields) {
        part.from = p_.*f.from;
        part.to = p_.*f.to;
        if (!is_reduced(f)) continue;
        part.field = f.rows;
        part.width = f.width;
        part.columns = f.columns;
        part.maps = f.maps;
        k_.reduce(p_, part, memory_.scratch + static_cast<size_t>(worker) * plan_.scratch, interruption_.stop());
      }
    });
  }

  Problem p_;
  const Kernels& k_;
  const BackwardPlan plan_;
  const ForwardPlan forward_;
  BackwardMemory memory_;
  Interruption interruption_;
};

size_t forward_workspace(const Problem& p) {
  const ForwardPlan plan(p, kernels(p.level), p.N);
  return for_workers(plan.scratch, plan.threads);
}

size_t backward_workspace(const Problem& p) {
  const Kernels& k = kernels(p.level);
  return BackwardMemory(p, BackwardPlan(p, k), ForwardPlan(p, k, k.geometry(p).together), nullptr).used;
}

int64_t checkpoint_elements(const Problem& p) {
  const Geometry g = kernels(p.level).geometry(p);
  return first_slot(p, g, p.N) * p.H * g.tiles * g.tile;
}

Outcome outcome(bool finished) { return finished ? Outcome::done : Outcome::interrupted; }

Outcome forward(const Problem& p, void* workspace) {
  const Kernels& k = count_call(p.level);
  Interruption interruption(p.step ? Interrupt{} : p.interrupt);
  return outcome(scan_sequences(p, k, ForwardPlan(p, k, p.N), workspace, 0, p.N, true, interruption));
}

Outcome backward(const Problem& p, void* workspace) {
  return outcome(Backward(p, count_call(p.level), workspace).run());
}

size_t diagnose_workspace(const Problem& p) {
  const DiagnosePlan plan(p, kernels(p.level));
  return for_workers(plan.scratch, plan.threads);
}

Outcome diagnose(const Problem& p, void* workspace) {
  const Kernels& k = count_call(p.level);
  const DiagnosePlan plan(p, k);
  Interruption interruption(p.interrupt);
  return outcome(for_each(plan.threads, p.N * p.H, interruption, [&](int64_t i, int worker) {
    k.diagnose(p, plan.g, i / p.H, i % p.H, static_cast<char*>(workspace) + static_cast<size_t>(worker) * plan.scratch,
               interruption.stop());
  }));
}

size_t map_workspace(const Problem& p) {
  const MapPlan plan(p, kernels(p.level));
  return for_workers(plan.scratch, plan.threads);
}

Outcome map_rows(const Problem& p, void* workspace) {
  const Kernels& k = count_call(p.level);
  const MapPlan plan(p, k);
  Interruption none({});
  for_each(plan.threads, plan.pieces, none, [&](int64_t i, int worker) {
    k.map_rows(p, p.T * i / plan.pieces, p.T * (i + 1) / plan.pieces,
               static_cast<char*>(workspace) + static_cast<size_t>(worker) * plan.scratch);
  });
  return Outcome::done;
}

std::atomic<int> num_threads{0};

}  // namespace

const Backend& backend() {
  static constexpr Backend table{
      FWP_LAYOUT,
      sizeof(Backend),
      sizeof(Problem),
      [] { return "available"; },
      forward_workspace,
      backward_workspace,
      diagnose_workspace,
      map_workspace,
      checkpoint_elements,
      forward,
      backward,
      diagnose,
      map_rows,
      [](int) { return Outcome::done; },
      [] { return ""; },
      nullptr,  // its memory is cpp/core's own
      nullptr,
      nullptr,
      nullptr,
      nullptr,
  };
  return table;
}

void set_num_threads(int threads) { num_threads = std::clamp(threads, 1, 256); }

int get_num_threads() {
  int n = num_threads;
  if (n == 0) {
    n = default_num_threads();
    int none = 0;
    if (!num_threads.compare_exchange_strong(none, n)) n = none;
  }
  return n;
}

}  // namespace fwp::cpu
