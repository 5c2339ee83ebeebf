#include <algorithm>
#include <cmath>

#include "../cpp/scan/arena.hpp"
#include "chunk/chunk.hpp"
#include "flags.hpp"
#include "forms.hpp"
#include "recurrent/recurrent.hpp"
#include "segments.cuh"
#include "segments.hpp"

namespace fwp::cuda::segments {
namespace {

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t columns(const Problem& p) { return p.V + (p.attention_norm ? 1 : 0); }  // of a state
int64_t row(const Problem& p) { return over(columns(p), kPassColumns) * kPassColumns; }
int64_t gates(const Problem& p) { return p.decay == Decay::none ? 0 : p.decay == Decay::channel ? p.K : 1; }
bool has_matrices(const Problem& p) { return p.rule == Rule::delta; }
int64_t numbers_of_A(const Problem& p) { return has_matrices(p) ? p.K * p.K : gates(p); }

}  // namespace

int64_t length(const Problem& p) {
  constexpr int64_t kEnoughBlocks = 128;  // to keep a device busy
  constexpr int64_t kFewestSegments = 4;  // of a sequence, so that several passes are shorter than one
  constexpr int64_t kMostBytes = 256 << 20;
  const bool delta = p.rule == Rule::delta, chunks = chunk::serves(p);
  // What a segment of the delta rule with attention_norm does is no such map: z divides what it reads.
  if (p.step || (delta && p.attention_norm)) return 0;
  constexpr int64_t kMostNumbers = 256;              // of keys and values: states of more take too much memory
  constexpr int64_t kMostTokens = int64_t{1} << 50;  // or products might be too large
  const auto within = [](int64_t n, int64_t most) { return n > 0 && n <= most; };
  if (!within(p.N, kEnoughBlocks) || !within(p.H, kEnoughBlocks) || !within(p.V, kMostNumbers) ||
      !within(p.K, kMostNumbers) || !within(p.T, kMostTokens))
    return 0;
  const int64_t blocks = p.H * over(p.V, chunks ? 64 : 32), passes = delta ? 4 : 2;
  if (p.N * blocks * passes > kEnoughBlocks) return 0;
  // Long enough for the scan of a segment to take more time than the step over it; not so many that the steps do.
  const int64_t shortest = !chunks ? 256 : delta ? 2048 : 512;
  const int64_t state_bytes = p.H * (2 * p.K * row(p) + numbers_of_A(p)) * 2 * item_size(accumulation(p.dtype));
  const int64_t most = std::min((delta ? 64 : 128) * p.N, (chunks ? kMostBytes : kMostBytes / 4) / state_bytes);
  int64_t length = shortest;
  while (tokens_of_call(p) / length > most) length *= 2;
  return tokens_of_call(p) / length >= kFewestSegments * p.N ? length : 0;
}

namespace {

// What the passes over the segments of a call leave for each other; without memory it only counts.
template <class T>
struct Segments {
  const Problem& p;
  Table table;
  int32_t* again;       // [N][H]
  T *identity, *zeros;  // [K][K] and [K]
  T *A, *turned;        // [segments][H] matrices or diagonals
  T *b, *before;        // [segments][H][K][row]: b, the states before each segment,
  T *c{}, *after{};     // and for the backward c and the adjoints after it

  Segments(const Problem& of, int64_t length, bool backward, Arena& arena) : p(of) {
    const int64_t count = packed(p) ? p.T / length + p.N : p.N * std::max<int64_t>(over(p.T, length), 1);
    table = {p.N, length, count, arena.take<int64_t>(2 * count + 1), arena.take<int64_t>(p.N + 1)};
    again = arena.take<int32_t>(p.N * p.H);
    identity = arena.take<T>(has_matrices(p) ? p.K * p.K : 0);
    zeros = arena.take<T>(has_matrices(p) ? p.K : 0);
    A = arena.take<T>(count * p.H * numbers_of_A(p));
    turned = arena.take<T>(has_matrices(p) ? count * p.H * numbers_of_A(p) : 0);
    b = arena.take<T>(count * p.H * p.K * row(p));
    before = arena.take<T>(count * p.H * p.K * row(p));
    if (!backward) return;
    c = arena.take<T>(count * p.H * p.K * row(p));
    after = arena.take<T>(count * p.H * p.K * row(p));
  }

  States states(T* data) const { return {data, p.H * p.K * row(p), p.K * row(p), row(p)}; }

  // The call with its segments for sequences, and no states.
  Problem all() const {
    static constexpr int64_t kNowhere = 0;  // counting memory is about packed sequences, too
    Problem x = p;
    x.batch_tokens = packed(p) ? 0 : p.T;
    x.T = tokens_of_call(p);
    x.N = table.count;
    x.cu_seqlens = table.offsets != nullptr ? table.offsets : &kNowhere;
    x.h0 = x.hT = x.d_hT = x.dh0 = {};
    return x;
  }
  // Where nothing is read and the first state is zero, the last one is b.
  Problem of_b() const {
    Problem x = all();
    x.o = {};
    x.hT = states(b);
    return x;
  }
  Problem of_A() const {
    Problem x = of_b();
    x.V = p.K;
    x.v = {zeros, p.v.dtype, 0, 0, 0, 1};
    x.h0 = {identity, 0, 0, p.K};
    x.hT = {A, p.H * p.K * p.K, p.K * p.K, p.K};
    return x;
  }
  Problem of_c() const {
    Problem x = all();
    x.h0 = states(before);
    x.dh0 = states(c);
    return x;
  }
  Problem forward() const {
    Problem x = all();
    x.h0 = states(before);
    x.hT = p.hT.data != nullptr ? states(b) : States{};  // b is no longer needed
    return x;
  }
  Problem backward() const {
    Problem x = of_c();
    x.d_hT = states(after);
    if (p.dh0.data == nullptr) x.dh0 = {};
    return x;
  }

  size_t maps_workspace() const {
    return std::max(forms::forward_workspace(of_b()), has_matrices(p) ? forms::forward_workspace(of_A()) : 0);
  }
  // The segments, A and b, and the states before each.
  void map(void* rest, Queue& queue) const {
    queue.run("cut", cut, {1}, 128, 0, p, table);
    clear_flags(p, again, queue);
    if (has_matrices(p)) {
      queue.run("make_identity", make_identity<T>, {p.K}, 128, 0, p.K, identity, zeros);
      forms::forward(of_A(), rest, queue);
      const int64_t tiles = over(p.K, kTurn);
      queue.run("turn", turn<T>, {table.count * p.H, tiles, tiles}, kWarpSize, kTurn * (kTurn + 1) * sizeof(T), p.K,
                static_cast<const T*>(A), turned);
    } else if (gates(p) > 0) {
      queue.run("multiply_decays", multiply_decays<T>,
                {table.count * p.H, gates(p) > 1 ? over(gates(p), kWarpSize) : 1}, kDecayThreads,
                kDecayThreads * sizeof(double), all(), gates(p), A);
    }
    forms::forward(of_b(), rest, queue);
    pass(false, has_matrices(p) ? turned : A, b, p.h0, before, queue);
  }
  void pass(bool backward, const T* matrices, const T* add, const States& from, T* to, Queue& queue) const {
    const int64_t V = columns(p);
    const Pass<T> x{table, backward, p.H, p.K, V, row(p), gates(p), matrices, add, from, to, again};
    if (has_matrices(p))
      queue.run("pass_matrices", pass_matrices<T>, {p.N * p.H, over(V, kPassColumns)}, MatrixThreads::of(p.K).threads(),
                static_cast<size_t>(kPassColumns * MatrixThreads::of(p.K).sums()) * sizeof(T), x);
    else
      queue.run("pass_diagonals", pass_diagonals<T>, {p.N * p.H, over(p.K * V, kPassThreads)}, kPassThreads, 0, x);
  }
  void give(bool of_last, const T* from, const States& to, Queue& queue) const {
    if (to.data == nullptr) return;
    queue.run("hand_over", hand_over<T>, {p.N * p.H, over(p.K * columns(p), kPassThreads)}, kPassThreads, 0, table,
              of_last, p.H, p.K, columns(p), row(p), from, to);
  }
};

// queue == nullptr only counts memory.
template <class T>
size_t run_forward(const Problem& p, int64_t length, void* workspace, Queue* queue) {
  Arena arena(workspace);
  const Segments<T> segments(p, length, false, arena);
  void* const rest = arena.take<char>(static_cast<int64_t>(std::max(
      {segments.maps_workspace(), forms::forward_workspace(segments.forward()), recurrent::forward_workspace(p)})));
  if (queue == nullptr) return arena.used();
  segments.map(rest, *queue);
  forms::forward(segments.forward(), rest, *queue);
  segments.give(true, segments.b, p.hT, *queue);
  recurrent::forward(p, rest, segments.again, *queue);
  return arena.used();
}

template <class T>
size_t run_backward(const Problem& p, int64_t length, void* workspace, Queue* queue) {
  Arena arena(workspace);
  const Segments<T> segments(p, length, true, arena);
  void* const rest = arena.take<char>(static_cast<int64_t>(
      std::max({segments.maps_workspace(), forms::adjoint_workspace(segments.of_c()),
                forms::backward_workspace(segments.backward()), recurrent::backward_workspace(p)})));
  if (queue == nullptr) return arena.used();
  segments.map(rest, *queue);
  forms::adjoint(segments.of_c(), rest, *queue);
  segments.pass(true, segments.A, segments.c, p.d_hT, segments.after, *queue);
  forms::backward(segments.backward(), rest, *queue);
  segments.give(false, segments.c, p.dh0, *queue);
  recurrent::backward(p, rest, segments.again, *queue);
  return arena.used();
}

bool is_double(const Problem& p) { return accumulation(p.dtype) == DType::f64; }
size_t run_forward(const Problem& p, int64_t length, void* workspace, Queue* queue) {
  return is_double(p) ? run_forward<double>(p, length, workspace, queue)
                      : run_forward<float>(p, length, workspace, queue);
}
size_t run_backward(const Problem& p, int64_t length, void* workspace, Queue* queue) {
  return is_double(p) ? run_backward<double>(p, length, workspace, queue)
                      : run_backward<float>(p, length, workspace, queue);
}

}  // namespace

size_t forward_workspace(const Problem& p, int64_t length) {
  return length == 0 ? forms::forward_workspace(p) : run_forward(p, length, nullptr, nullptr);
}
void forward(const Problem& p, int64_t length, void* workspace, Queue& queue) {
  if (length == 0) return forms::forward(p, workspace, queue);
  run_forward(p, length, workspace, &queue);
}
size_t backward_workspace(const Problem& p, int64_t length) {
  return length == 0 ? forms::backward_workspace(p) : run_backward(p, length, nullptr, nullptr);
}
void backward(const Problem& p, int64_t length, void* workspace, Queue& queue) {
  if (length == 0) return forms::backward(p, workspace, queue);
  run_backward(p, length, workspace, &queue);
}

}  // namespace fwp::cuda::segments
