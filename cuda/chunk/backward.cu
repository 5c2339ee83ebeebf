// Windows of time, the last first: forward from the state before the window, saving what the gradients need, back
// through it, and then all its chunks at once.
#include <numeric>

#include "../flags.hpp"
#include "backward.cuh"
#include "chunk.hpp"
#include "windows.cuh"

namespace fwp::cuda::chunk {
namespace {

constexpr int kThreads = 128;

Backward take(Arena& arena, const Problem& p, const Window& window, int32_t* left) {
  Backward x;
  x.p = p;
  x.window = window;
  x.prepared = Prepared::take(arena, p, window);
  x.left = left;
  const int64_t n = places(p, window);
  const int columns = static_cast<int>((p.V + kColumns - 1) / kColumns * kColumns);
  with_size(p.K, [&](auto channels) {
    x.S = SavedStates::take(arena, n, columns, channels());
    x.D = SavedStates::take(arena, n, columns, channels());
    if (p.decay == Decay::channel) x.products = Products::take(arena, p, n, value_tiles(p), channels());
  });
  if (p.rule == Rule::delta) {
    x.E = SavedRows::take(arena, n, columns);
    x.dE = SavedRows::take(arena, n, columns);
  }
  x.dq = Parts::take(arena, p, window, p.q, p.dq, value_tiles(p), p.K);
  x.dk = Parts::take(arena, p, window, p.k, p.dk, value_tiles(p), p.K);
  x.dv = Parts::take(arena, p, window, p.v, p.dv, 1, p.V);
  x.dbeta = Parts::take(arena, p, window, p.beta, p.dbeta, value_tiles(p), 1);
  x.dg = Parts::take(arena, p, window, p.g, p.dg, value_tiles(p), p.decay == Decay::channel ? p.K : 1);
  return x;
}

// Adds up a chunk's parts of a gradient: those of the tiles of a head, head by head. Grid: slots of all axes, rows of
// heads.
FWP_KERNEL void add_parts(FWP_PARAMETER Problem p, Window window, Rows rows, Parts parts) {
  const int64_t first_head = block_index_y() * rows.group;
  const HeadChunk c = HeadChunk::at(p, window, block_index_x() * static_cast<unsigned>(p.H));
  const int64_t left = c.s.length - c.t0, count = left < kChunk ? left : kChunk;
  if (left <= 0) return;
  for (int64_t i = thread_index(); i < count * parts.size; i += kThreads) {
    const int64_t t = i / parts.size, column = i % parts.size;
    float sum = 0;
    for (int64_t h = first_head; h < first_head + rows.group; ++h) {
      for (int64_t tile = 0; tile < parts.tiles; ++tile)
        sum += load_global(parts.numbers + parts.row(p, window, c.s, c.slot, h, tile) * parts.size + i);
    }
    store_number(rows, row_at(rows, c.s, c.t0 + t, first_head) + column, sum);
  }
}

// Heads that share rows with one that is left are left as well: the sums of its gradients are not theirs alone. Grid:
// bundles of heads, of all sequences.
FWP_KERNEL void leave_bundles(int32_t* left, int64_t bundle) {
  int32_t* const heads = left + block_index_x() * bundle;
  int32_t any = 0;
  for (int64_t h = 0; h < bundle; ++h) any |= load_global(heads + h);
  sync_warp();
  for (int64_t h = lane(); h < bundle && any != 0; h += kWarpSize) store_global(heads + h, any);
}

void add_all_parts(const Backward& x, Queue& queue) {
  const Problem& p = x.p;
  const auto add = [&](const Rows& rows, const Parts& parts) {
    if (parts.numbers == nullptr) return;
    queue.run("chunk sums", add_parts, {axes(p) * x.window.count, p.H / rows.group}, kThreads, 0, p, x.window, rows,
              parts);
  };
  add(p.dq, x.dq);
  add(p.dk, x.dk);
  add(p.dv, x.dv);
  add(p.dbeta, x.dbeta);
  add(p.dg, x.dg);
}

int64_t slots_of_backward(const Problem& p, int64_t asked) {
  return slots_of_window(p, asked, [&](Arena& arena, const Window& window) { take(arena, p, window, nullptr); });
}

}  // namespace

size_t backward_workspace(const Problem& p, int64_t window) {
  Arena arena(nullptr);
  const int64_t slots = slots_of_axis(p), count = slots_of_backward(p, window);
  take(arena, p, {0, count}, nullptr);
  Carried(arena, p, (slots + count - 1) / count);
  return arena.used();
}

void backward(const Problem& problem, void* workspace, int32_t* left, Queue& queue, int64_t window) {
  Problem p = problem;
  p.hT = {};
  Arena arena(workspace);
  const int64_t slots = slots_of_axis(p), count = slots_of_backward(p, window), windows = (slots + count - 1) / count;
  Backward x = take(arena, p, {0, count}, left);
  const Carried carried(arena, p, windows);
  clear_flags(p, left, queue);

  const auto run_forward = [&](int64_t i, bool save) {
    x.window.begin = i * count;
    prepare(p, x.window, x.prepared, left, queue);
    Scan scan{p, x.window, x.prepared, left, carried.before(i)};
    if (save) {
      scan.S = x.S;
      scan.E = x.E;
    } else {
      scan.after = carried.after(i);
    }
    run_states_scan(scan, queue);
  };
  for (int64_t i = 0; i + 1 < windows; ++i) run_forward(i, false);
  for (int64_t i = windows - 1; i >= 0; --i) {
    run_forward(i, true);
    x.before = carried.before(i);
    x.after = carried.after(i);
    run_reverse_scan(x, queue);
    run_gradients(x, queue);
    add_all_parts(x, queue);
  }

  const int64_t bundle = std::lcm(std::lcm(p.q.group, p.k.group), p.v.group);
  if (bundle > 1) queue.run("chunk flags", leave_bundles, {p.N * (p.H / bundle)}, kWarpSize, 0, left, bundle);
}

// The memory of a scan forward: what is prepared for a window, and what goes on from one to the next.
size_t adjoint_workspace(const Problem& p) { return forward_workspace(p); }

void adjoint(const Problem& p, void* workspace, int32_t* left, Queue& queue) {
  Arena arena(workspace);
  const int64_t slots = slots_of_axis(p), count = slots_of_scan(p, 0), windows = (slots + count - 1) / count;
  Backward x;
  x.p = p;
  x.p.dv = {};
  x.window = {0, count};
  x.prepared = Prepared::take(arena, p, x.window);
  x.left = left;
  const Carried carried(arena, p, windows);
  clear_flags(p, left, queue);
  for (int64_t i = windows - 1; i >= 0; --i) {
    x.window.begin = i * count;
    x.before = carried.before(i);
    x.after = carried.after(i);
    prepare(p, x.window, x.prepared, left, queue);
    run_reverse_scan(x, queue);
  }
}

}  // namespace fwp::cuda::chunk
