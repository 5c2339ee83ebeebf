#include "step.cuh"
#include "step.hpp"

namespace fwp::cuda::recurrent {
namespace {

constexpr int64_t kMostChannels = 16;  // of a thread

// Whether rows of states can be read and written 16 bytes at a time.
template <class T>
bool wide(const Problem& p) {
  const States& s = p.hT;
  return p.V % kQuad<T> == 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0 && s.n % kQuad<T> == 0 &&
         s.h % kQuad<T> == 0 && s.k % kQuad<T> == 0;
}

template <class T>
void run(const Problem& p, Queue& queue) {
  StepShape shape;
  shape.tiles = (p.V + kStepColumns<T> - 1) / kStepColumns<T>;
  if (p.attention_norm && shape.tiles == 0) shape.tiles = 1;  // z moves on
  if (shape.tiles == 0) return;
  shape.tiles_of_block = p.attention_norm ? shape.tiles : 1;
  shape.wide = wide<T>(p);
  const auto launch = [&](auto* kernel) {
    const int64_t blocks = shape.tiles / shape.tiles_of_block * p.H * p.N;
    queue.run("step", kernel, {blocks}, kStepThreads, static_cast<size_t>(StepRoom<T>::numbers(p.K)) * sizeof(T), p,
              shape);
  };
  if (p.K <= 4 * kDown) return launch(step_tokens<T, 4>);
  if (p.K <= 8 * kDown) return launch(step_tokens<T, 8>);
  launch(step_tokens<T, kMostChannels>);
}

}  // namespace

bool fits_registers(const Problem& p) { return p.K <= kMostChannels * kDown; }

void step_in_registers(const Problem& p, Queue& queue) {
  accumulation(p.dtype) == DType::f64 ? run<double>(p, queue) : run<float>(p, queue);
}

}  // namespace fwp::cuda::recurrent
