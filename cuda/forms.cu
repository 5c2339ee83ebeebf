#include <algorithm>

#include "../cpp/scan/arena.hpp"
#include "chunk/chunk.hpp"
#include "forms.hpp"
#include "recurrent/recurrent.hpp"

namespace fwp::cuda::forms {
namespace {

// One direction, in both forms.
struct Scan {
  size_t (*chunk_workspace)(const Problem&);
  void (*chunk)(const Problem&, void*, int32_t* left, Queue&);
  size_t (*recurrent_workspace)(const Problem&);
  void (*recurrent)(const Problem&, void*, const int32_t* only, Queue&);
};

constexpr Scan kForward = {chunk::forward_workspace, chunk::forward, recurrent::forward_workspace, recurrent::forward};
constexpr Scan kBackward = {
    [](const Problem& p) { return chunk::backward_workspace(p); },
    [](const Problem& p, void* memory, int32_t* left, Queue& queue) { chunk::backward(p, memory, left, queue); },
    recurrent::backward_workspace, recurrent::backward};
constexpr Scan kAdjoint = {chunk::adjoint_workspace, chunk::adjoint, recurrent::backward_workspace,
                           recurrent::backward};

// queue == nullptr only counts memory.
size_t run(const Scan& scan, const Problem& p, void* workspace, Queue* queue) {
  Arena arena(workspace);
  const bool chunks = chunk::serves(p);
  auto* const left = arena.take<int32_t>(chunks ? p.N * p.H : 0);
  const size_t bytes = std::max(chunks ? scan.chunk_workspace(p) : 0, scan.recurrent_workspace(p));
  void* const rest = arena.take<char>(static_cast<int64_t>(bytes));
  if (queue != nullptr && chunks) scan.chunk(p, rest, left, *queue);
  if (queue != nullptr) scan.recurrent(p, rest, chunks ? left : nullptr, *queue);
  return arena.used();
}

Problem without_rows(Problem p) {
  p.dq = p.dk = p.dv = p.dbeta = p.dg = {};
  return p;
}

}  // namespace

size_t forward_workspace(const Problem& p) { return run(kForward, p, nullptr, nullptr); }
void forward(const Problem& p, void* workspace, Queue& queue) { run(kForward, p, workspace, &queue); }
size_t backward_workspace(const Problem& p) { return run(kBackward, p, nullptr, nullptr); }
void backward(const Problem& p, void* workspace, Queue& queue) { run(kBackward, p, workspace, &queue); }
size_t adjoint_workspace(const Problem& p) { return run(kAdjoint, without_rows(p), nullptr, nullptr); }
void adjoint(const Problem& p, void* workspace, Queue& queue) { run(kAdjoint, without_rows(p), workspace, &queue); }

}  // namespace fwp::cuda::forms
