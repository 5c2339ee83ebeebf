// Chooses the instruction set level and cuts a problem into parts for the thread pool.
#include "dispatch.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "../scan/geometry.hpp"
#include "kernels.hpp"
#include "threads.hpp"

namespace fwp {

#if defined(FWP_HAS_base)
extern const Kernels kernels_base;
#endif
#if defined(FWP_HAS_v3)
extern const Kernels kernels_v3;
#endif
#if defined(FWP_HAS_v4)
extern const Kernels kernels_v4;
#endif
#if defined(FWP_HAS_neon)
extern const Kernels kernels_neon;
#endif

namespace cpu {
namespace {

struct Level {
  const Kernels* kernels;
  std::atomic<uint64_t> calls;
};

#if defined(FWP_HAS_v3) || defined(FWP_HAS_v4)
// By features: not every compiler knows the names of the x86-64 levels.
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Every level that is built and that this machine has, best last.
struct Levels {
  static constexpr int kMost = 4;
  Level level[kMost] = {};
  const char* names[kMost + 1] = {};
  int count = 0;
  std::atomic<int> current{-1};  // -1: FWP_ISA names no level of this list

  Levels() {
#if defined(FWP_HAS_base)
    add(kernels_base);
#endif
#if defined(FWP_HAS_v3)
    if (has_v3()) add(kernels_v3);
#endif
#if defined(FWP_HAS_v4)
    if (has_v3() && has_v4()) add(kernels_v4);
#endif
#if defined(FWP_HAS_neon)
    add(kernels_neon);
#endif
    const char* wanted = std::getenv("FWP_ISA");
    current = wanted && *wanted ? find(wanted) : count - 1;
  }

  void add(const Kernels& kernels) {
    level[count].kernels = &kernels;
    names[count++] = kernels.name;
  }

  int find(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (std::strcmp(names[i], name) == 0) return i;
    return -1;
  }
};

Levels& levels() {
  static Levels all;
  return all;
}

const Kernels& kernels(int level) { return *levels().level[level].kernels; }

// Whether a call has been interrupted. The calling thread asks the caller every few milliseconds, the others look.
class Interruption {
 public:
  explicit Interruption(const Interrupt& interrupt)
      : interrupt_(interrupt), caller_(std::this_thread::get_id()), asked_(Clock::now()) {}

  Stop stop() {
    return {[](void* self) { return static_cast<Interruption*>(self)->asked(); }, this};
  }
  // The clock costs as much as thousands of flops, so it is not read at every block.
  bool asked() {
    if (std::this_thread::get_id() == caller_ && ++asks_ % 16 == 0) ask();
    return stopped_.load(std::memory_order_relaxed);
  }
  // By the calling thread only.
  void ask() {
    const auto now = Clock::now();
    if (!interrupt_.poll || now - asked_ < std::chrono::milliseconds(5)) return;
    asked_ = now;
    if (interrupt_.poll(interrupt_.data)) stopped_.store(true, std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;

  const Interrupt interrupt_;
  const std::thread::id caller_;
  Clock::time_point asked_;
  unsigned asks_ = 0;
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

// A pool round trip costs about as much as this many flops.
constexpr double kSerialFlops = 1e6;

int useful_threads(const Problem& p, int64_t parts) {
  const double flops = 6.0 * static_cast<double>(p.H) * static_cast<double>(p.K) * static_cast<double>(p.V) *
                       static_cast<double>(p.cu_seqlens ? p.T : p.N * p.T);
  return flops < kSerialFlops ? 1 : static_cast<int>(std::min<int64_t>(p.threads, std::max<int64_t>(parts, 1)));
}

class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  void* take(size_t bytes) {
    void* at = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + 63) / 64 * 64;
    return at;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

const Kernels& count_call(int level) {
  levels().level[level].calls.fetch_add(1, std::memory_order_relaxed);
  return kernels(level);
}

size_t item_size(const Problem& p) { return p.dtype == DType::f64 ? 8 : 4; }

// How heads and tiles are shared out: neighbouring heads together, as many as leave every thread a part and fit into
// the second-level cache; the tiles of a head apart only where there are few heads, since they share the staged keys.
// Sums over the tiles of a head must not depend on that, so they are cut in one way only, into single tiles (added one
// by one), or, to bound the partial sums of very many tiles, always into kMostShares groups.
struct Shares {
  int64_t heads, tiles;                      // of a part
  int64_t parts_per_tile_row, per_sequence;  // parts

  Shares(const Problem& p, const Geometry& g, int64_t sequences) {
    const int64_t threads = p.threads, all = sequences * p.H;
    const int64_t cached = std::max<int64_t>(1, kCachedStates / std::max<int64_t>(1, g.tiles * g.ld * g.columns));
    const bool few = all < 2 * threads;
    const int64_t group = (g.tiles + kMostShares - 1) / kMostShares;
    tiles = few || group > 1 ? group : g.tiles;
    heads = few ? 1 : std::max<int64_t>(1, std::min({(all + threads - 1) / threads, cached, p.H}));
    parts_per_tile_row = tiles ? (g.tiles + tiles - 1) / tiles : 0;
    per_sequence = (p.H + heads - 1) / heads * parts_per_tile_row;
  }

  static constexpr int64_t kCachedStates = 64 * 1024;  // numbers
  static constexpr int64_t kMostShares = 16;
};

struct ForwardPlan {
  Geometry g;
  Shares shares;
  int threads;
  size_t scratch;

  ForwardPlan(const Problem& p, const Kernels& k, int64_t sequences)
      : g(k.geometry(p)),
        shares(p, g, sequences),
        threads(useful_threads(p, sequences * shares.per_sequence)),
        scratch((k.forward_scratch(p, g, shares.heads, shares.tiles) + 63) / 64 * 64) {}

  // Sequences [begin, end).
  bool run(const Problem& p, const Kernels& k, void* workspace, int64_t begin, int64_t end, bool output,
           Interruption& interruption) const {
    const int64_t slot = output ? 0 : first_slot(p, g, begin);
    return for_each(threads, (end - begin) * shares.per_sequence, interruption, [&](int64_t index, int worker) {
      const int64_t in_sequence = index % shares.per_sequence;
      ForwardPart part{};
      part.n = begin + index / shares.per_sequence;
      part.head_begin = in_sequence / shares.parts_per_tile_row * shares.heads;
      part.head_end = std::min(part.head_begin + shares.heads, p.H);
      part.tile_begin = in_sequence % shares.parts_per_tile_row * shares.tiles;
      part.tile_end = std::min(part.tile_begin + shares.tiles, g.tiles);
      part.slot = first_slot(p, g, part.n) - slot;
      part.output = output;
      k.forward(p, g, part, static_cast<char*>(workspace) + static_cast<size_t>(worker) * scratch, interruption.stop());
    });
  }
};

// The gradients a backward pass has to deliver, in one order.
struct Field {
  Rows Problem::* from;  // the input
  Rows Problem::* to;
  GradientRows HeadGradients::* rows;
  int64_t width;    // numbers per row
  int64_t columns;  // of a part, where each part of a head has its own; 0: each has a share of the whole row
  bool direct;      // one part alone makes each row, in its final type: no partial sums
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

  BackwardPlan(const Problem& p, const Kernels& k) : g(k.geometry(p)), shares(p, g, g.together) {
    shares_per_head = shares.parts_per_tile_row;
    const int64_t dg_width = p.decay == Decay::channel ? p.K : 1;
    fields[0] = {&Problem::q, &Problem::dq, &HeadGradients::dq, p.K, 0, false};
    fields[1] = {&Problem::k, &Problem::dk, &HeadGradients::dk, p.K, 0, false};
    fields[2] = {&Problem::v, &Problem::dv, &HeadGradients::dv, p.V, shares.tiles * g.columns, false};
    fields[3] = {&Problem::beta, &Problem::dbeta, &HeadGradients::dbeta, 1, 0, false};
    fields[4] = {&Problem::g, &Problem::dg, &HeadGradients::dg, dg_width, 0, false};
    partial_numbers = 0;
    for (Field& f : fields) {  // by the inputs, so that a query for the workspace needs no gradients
      const Rows& from = p.*f.from;
      f.direct = from.group == 1 && from.dtype == p.dtype && (f.columns || shares_per_head == 1);
      if (from.data && !f.direct) partial_numbers += partial_width(f) * g.window;
    }
    threads = useful_threads(p, g.together * shares.per_sequence);
    scratch = (k.backward_scratch(p, g, shares.heads) + 63) / 64 * 64;
    tile_bytes = static_cast<size_t>(g.ld * g.columns) * item_size(p);
    slots = 0;
    for (int64_t n = 0; n < p.N; n += g.together)
      slots = std::max(slots, first_slot(p, g, std::min(n + g.together, p.N)) - first_slot(p, g, n));
  }

  static int64_t partial_width(const Field& f) { return f.columns ? f.columns : f.width; }
};

// Where things lie in the workspace of a backward call.
struct BackwardMemory {
  char *checkpoints, *D, *partial, *scratch;
  HeadGradients* gradients;  // [sequences together][H][shares]
  size_t used;

  BackwardMemory(const Problem& p, const BackwardPlan& plan, const ForwardPlan& forward, void* base) {
    Workspace w(base);
    const auto take = [&](size_t bytes) { return static_cast<char*>(w.take(bytes)); };
    const size_t heads = static_cast<size_t>(plan.g.together * p.H), shares = static_cast<size_t>(plan.shares_per_head);
    checkpoints =
        p.checkpoints ? nullptr : take(static_cast<size_t>(plan.slots * p.H * plan.g.tiles) * plan.tile_bytes);
    D = take(heads * static_cast<size_t>(plan.g.tiles) * plan.tile_bytes);
    partial = take(heads * shares * static_cast<size_t>(plan.partial_numbers) * item_size(p));
    gradients = static_cast<HeadGradients*>(w.take(heads * shares * sizeof(HeadGradients)));
    const size_t worker = std::max(plan.scratch, p.checkpoints ? 0 : forward.scratch);
    scratch = take(worker * static_cast<size_t>(std::max(plan.threads, forward.threads)));
    used = w.used();
  }
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
    slot_ = 0;
    if (memory_.checkpoints) {
      p_.checkpoints = memory_.checkpoints;
      slot_ = first_slot(p_, plan_.g, begin);
      if (!forward_.run(p_, k_, memory_.scratch, begin, end, false, interruption_)) return false;
    }
    int64_t windows = 1;  // an empty sequence still hands its state's adjoint back
    for (int64_t n = begin; n < end; ++n)
      windows = std::max(windows, (sequence(p_, n).length + plan_.g.window - 1) / plan_.g.window);
    for (int64_t w = windows - 1; w >= 0; --w) {
      place_gradients(begin, end, w * plan_.g.window);
      if (!run_window(begin, end, w * plan_.g.window) || !reduce(begin, end, w * plan_.g.window)) return false;
    }
    return true;
  }

  // Where each part writes each gradient: the caller's array, or partial rows of its own.
  void place_gradients(int64_t begin, int64_t end, int64_t first) {
    const int64_t item = static_cast<int64_t>(item_size(p_)), shares = plan_.shares_per_head;
    for (int64_t i = 0; i < (end - begin) * p_.H * shares; ++i) {
      const Sequence seq = sequence(p_, begin + i / (p_.H * shares));
      const int64_t h = i / shares % p_.H, share = i % shares;
      char* partial = memory_.partial + i * plan_.partial_numbers * item;
      for (const Field& f : plan_.fields) {
        const Rows& to = p_.*f.to;
        GradientRows& rows = memory_.gradients[i].*f.rows;
        rows = {nullptr, 0};
        if (!to.data) continue;
        if (f.direct) {
          const int64_t at = seq.b * to.b + (seq.begin + first) * to.t + h * to.h + share * f.columns;
          rows = {static_cast<char*>(to.data) + at * item, to.t};
        } else {
          rows = {partial, plan_.partial_width(f)};
          partial += plan_.partial_width(f) * plan_.g.window * item;
        }
      }
    }
  }

  bool run_window(int64_t begin, int64_t end, int64_t first) {
    const Geometry& g = plan_.g;
    const Shares& shares = plan_.shares;
    return for_each(plan_.threads, (end - begin) * shares.per_sequence, interruption_, [&](int64_t i, int worker) {
      const int64_t in_group = i / shares.per_sequence, share = i % shares.parts_per_tile_row;
      BackwardPart part{};
      part.n = begin + in_group;
      const int64_t length = sequence(p_, part.n).length;
      if (first >= length && first > 0) return;
      part.head_begin = i % shares.per_sequence / shares.parts_per_tile_row * shares.heads;
      part.head_end = std::min(part.head_begin + shares.heads, p_.H);
      part.tile_begin = share * shares.tiles;
      part.tile_end = std::min(part.tile_begin + shares.tiles, g.tiles);
      part.slot = first_slot(p_, g, part.n) - slot_;
      part.begin = first;
      part.end = std::min(first + g.window, length);
      part.D = memory_.D + static_cast<size_t>(in_group * p_.H * g.tiles) * plan_.tile_bytes;
      part.next_head = plan_.shares_per_head;
      part.gradients = memory_.gradients + (in_group * p_.H + part.head_begin) * part.next_head + share;
      k_.backward(p_, g, part, memory_.scratch + static_cast<size_t>(worker) * plan_.scratch, interruption_.stop());
    });
  }

  bool is_reduced(const Field& f) const { return (p_.*f.to).data && !f.direct && f.width > 0; }

  bool reduce(int64_t begin, int64_t end, int64_t first) {
    const Geometry& g = plan_.g;
    const int64_t pieces = plan_.threads > 1 ? 2 * plan_.threads : 1;
    bool needed = false;
    for (const Field& f : plan_.fields) needed = needed || is_reduced(f);
    if (!needed) return true;
    return for_each(plan_.threads, (end - begin) * pieces, interruption_, [&](int64_t i, int) {
      ReducePart part{};
      part.n = begin + i / pieces;
      const int64_t tokens = std::clamp<int64_t>(sequence(p_, part.n).length - first, 0, g.window);
      part.begin = first + tokens * (i % pieces) / pieces;
      part.end = first + tokens * (i % pieces + 1) / pieces;
      part.origin = first;
      part.shares = plan_.shares_per_head;
      part.gradients = memory_.gradients + i / pieces * p_.H * part.shares;
      for (const Field& f : plan_.fields) {
        part.to = p_.*f.to;
        if (!is_reduced(f)) continue;
        part.field = f.rows;
        part.width = f.width;
        part.columns = f.columns;
        k_.reduce(p_, part);
      }
    });
  }

  Problem p_;
  const Kernels& k_;
  const BackwardPlan plan_;
  const ForwardPlan forward_;
  BackwardMemory memory_;
  Interruption interruption_;
  int64_t slot_ = 0;
};

std::atomic<int> num_threads{0};

}  // namespace

size_t forward_workspace(const Problem& p) {
  const ForwardPlan plan(p, kernels(p.level), p.N);
  return plan.scratch * static_cast<size_t>(plan.threads);
}

size_t backward_workspace(const Problem& p) {
  const Kernels& k = kernels(p.level);
  return BackwardMemory(p, BackwardPlan(p, k), ForwardPlan(p, k, k.geometry(p).together), nullptr).used;
}

int64_t checkpoint_elements(const Problem& p) {
  const Geometry g = kernels(p.level).geometry(p);
  return first_slot(p, g, p.N) * p.H * g.tiles * g.ld * g.columns;
}

bool forward(const Problem& p, void* workspace) {
  const Kernels& k = count_call(p.level);
  Interruption interruption(p.step ? Interrupt{} : p.interrupt);
  return ForwardPlan(p, k, p.N).run(p, k, workspace, 0, p.N, true, interruption);
}

bool backward(const Problem& p, void* workspace) { return Backward(p, count_call(p.level), workspace).run(); }

double fma_peak(DType dtype, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Kernels& k = kernels(level());
  double best = 0;
  const auto begin = Clock::now();
  for (double elapsed = 0; elapsed < seconds;) {
    const auto start = Clock::now();
    const double flops = k.fma(dtype == DType::f64, 20000);
    const auto now = Clock::now();
    best = std::max(best, flops / std::chrono::duration<double>(now - start).count());
    elapsed = std::chrono::duration<double>(now - begin).count();
  }
  return best;
}

const char* const* available_isas() { return levels().names; }

const char* isa() {
  const int i = levels().current;
  return i < 0 ? nullptr : levels().names[i];
}

int level() { return std::max(0, levels().current.load()); }

bool use_isa(const char* name) {
  const int i = levels().find(name);
  if (i >= 0) levels().current = i;
  return i >= 0;
}

uint64_t isa_calls(const char* name) {
  const int i = levels().find(name);
  return i < 0 ? 0 : levels().level[i].calls.load();
}

int block_size() {
  Problem p;
  return static_cast<int>(kernels(level()).geometry(p).block);
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

}  // namespace cpu
}  // namespace fwp
