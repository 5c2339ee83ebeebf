#include <cmath>
#include <numeric>

#include "backward.cuh"

namespace fwp::cuda::recurrent {
namespace {

// Heads that share rows of some gradient with each other.
int64_t heads_together(const Problem& p) {
  int64_t heads = 1;
  for (const Rows* rows : {&p.q, &p.k, &p.v, &p.beta, &p.g}) heads = std::lcm(heads, std::max<int64_t>(rows->group, 1));
  return heads;
}

int64_t gate_numbers(const Problem& p) {
  return p.decay == fwp::Decay::none ? 0 : p.decay == fwp::Decay::channel ? p.K : 1;
}

}  // namespace

Cut cut(const Problem& p) {
  constexpr int64_t kEnoughBlocks = 512;  // to keep any device busy
  constexpr int64_t kPartialBytes = 256 << 20;
  const int64_t block = accumulation(p.dtype) == DType::f64 ? kBlock<double> : kBlock<float>, blocks = p.H * tiles(p);
  Cut cut;
  cut.strips = std::max<int64_t>(1, std::min(p.N, (kEnoughBlocks + blocks - 1) / std::max<int64_t>(blocks, 1)));
  // As many checkpoints as states kept in the segments that are worked on; none for short sequences.
  const double even = std::sqrt(static_cast<double>(block * (tokens_of_call(p) / cut.strips)));
  const auto blocks_of_segment = static_cast<int64_t>(even) / block + 1;
  cut.segment = block * std::max<int64_t>(16, blocks_of_segment);
  const int64_t row_bytes = blocks * (2 * p.K + kColumns + 1 + gate_numbers(p)) * item_size(accumulation(p.dtype));
  const int64_t rows = kPartialBytes / std::max<int64_t>(row_bytes, 1);
  cut.window = rows >= tokens_of_call(p) ? tokens_of_call(p) : std::max(rows / cut.strips - cut.segment, cut.segment);
  return cut;
}

template <class T>
BackwardPlan<T>::BackwardPlan(const Problem& p, const Cut& of, const int32_t* only, Arena& arena)
    : forward(p, only, heads_together(p)),
      wanted(forward.wanted),
      checkpoints{},
      cut(of),
      tiles(forward.tiles),
      room(p, 2, sizeof(Adjoints<T>)),
      rows(of.window + of.segment),
      whole(of.window >= tokens_of_call(p)) {
  gradients[kQ] = {p.dq, nullptr, p.K, p.K, true};
  gradients[kK] = {p.dk, nullptr, p.K, p.K, true};
  gradients[kV] = {p.dv, nullptr, kColumns, p.V, false};
  gradients[kBeta] = {p.dbeta, nullptr, 1, 1, true};
  gradients[kG] = {p.dg, nullptr, gate_numbers(p), gate_numbers(p), true};
  // By the inputs, so that a query for the workspace needs no gradients.
  const int64_t groups[] = {p.q.group, p.k.group, p.v.group, p.beta.group, p.g.group};
  bool direct = true;
  for (int f = 0; f < kFields; ++f) direct = direct && groups[f] == 1 && (tiles == 1 || !gradients[f].tiles_share);
  if (direct) {  // nothing to add up: one window
    cut.window = tokens_of_call(p);
    whole = true;
  }
  const int64_t size = p.K * kTileRow, all = blocks(p), partial_rows = whole ? tokens_of_call(p) : cut.strips * rows;
  for (int f = 0; f < kFields; ++f) {
    Gradient<T>& gradient = gradients[f];
    if ((f == kBeta && p.beta.data == nullptr) || (groups[f] == 1 && (tiles == 1 || !gradient.tiles_share))) continue;
    gradient.partial = arena.take<T>(partial_rows * p.H * tiles * gradient.width);
  }
  const int64_t slots = p.T > cut.segment ? Checkpoints<T>::slots(tokens_of_call(p), cut.segment) : 0;
  checkpoints = {arena.take<T>(slots * p.H * tiles * size), cut.segment};
  forward.checkpoints = checkpoints;
  adjoints = arena.take<T>(whole ? 0 : all * size);
  states = arena.take<T>(all * (cut.segment / kBlock<T>)*size);
  errors = arena.take<T>(p.rule == fwp::Rule::delta ? all * cut.segment * kColumns : 0);
  dz = arena.take<T>(p.attention_norm ? p.N * p.H * tiles * p.K : 0);
  // The forward scan is over before the backward scan begins.
  const int64_t both = std::max(room.workspace(all), slots > 0 ? forward.room.workspace(forward.blocks(p)) : 0);
  workspace = forward.workspace = arena.take<T>(both);
}

size_t backward_workspace(const Problem& p, const Cut& cut) {
  return with_number(p, [&](auto number) {
    Arena arena(nullptr);
    BackwardPlan<decltype(number)>(p, cut, nullptr, arena);
    return arena.used();
  });
}
size_t backward_workspace(const Problem& p) { return backward_workspace(p, cut(p)); }

void backward(const Problem& p, const Cut& cut, void* workspace, const int32_t* only, Queue& queue) {
  with_number(p, [&](auto number) {
    using T = decltype(number);
    Arena arena(workspace);
    const BackwardPlan<T> plan(p, cut, only, arena);
    Problem states = p;
    states.hT = {};
    if (p.T > plan.cut.segment) launch_forward<false>(states, plan.forward, queue);

    bool adds = false;
    for (const Gradient<T>& gradient : plan.gradients)
      adds = adds || (gradient.to.data != nullptr && gradient.partial != nullptr);
    // Empty sequences may stand after the last token.
    const int64_t longest = packed(p) ? p.T : (p.N + plan.cut.strips - 1) / plan.cut.strips * p.T;
    const int64_t windows = plan.whole ? 1 : longest / plan.cut.window + 1;
    for (int64_t window = windows - 1; window >= 0; --window) {
      with_types(p, plan.room.in_shared, [&](auto rule, auto decay, auto place) {
        queue.run("scan_backward", scan_backward<T, decltype(rule), decltype(decay), decltype(place)>, {plan.blocks(p)},
                  threads(p), plan.room.shared_bytes(), p, plan, window);
      });
      if (adds)
        queue.run("add_rows", add_rows<T>, {plan.whole ? tokens_of_call(p) : plan.cut.strips * plan.rows}, 128, 0, p,
                  plan, window);
    }
    if (p.attention_norm && p.dh0.data != nullptr) queue.run("add_z", add_z<T>, {p.N * p.H}, threads(p), 0, p, plan);
  });
}
void backward(const Problem& p, void* workspace, const int32_t* only, Queue& queue) {
  backward(p, cut(p), workspace, only, queue);
}

}  // namespace fwp::cuda::recurrent
