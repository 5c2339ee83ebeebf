#include "recurrent.hpp"
#include "step.cuh"

namespace fwp::cuda::recurrent {
namespace {

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
  shape.tiles_of_block = p.attention_norm ? shape.tiles : 1;
  shape.wide = wide<T>(p);
  const size_t bytes = static_cast<size_t>(StepRoom<T>::numbers(p.K)) * sizeof(T);
  if (bytes > most_shared_bytes(p.device))
    throw Error("step: keys of " + std::to_string(p.K) + " numbers take " + std::to_string(bytes) +
                " bytes of shared memory, more than " + std::to_string(most_shared_bytes(p.device)));
  if (shape.tiles == 0) return;
  const int64_t blocks = shape.tiles / shape.tiles_of_block * p.H * p.N;
  const auto launch = [&](auto* kernel) {
    queue.run("step", kernel, {static_cast<unsigned>(blocks)}, kStepThreads, bytes, p, shape);
  };
  if (p.K <= 4 * kDown)
    launch(step_tokens<T, 4, true>);
  else if (p.K <= 8 * kDown)
    launch(step_tokens<T, 8, true>);
  else if (p.K <= 16 * kDown)
    launch(step_tokens<T, 16, true>);
  else
    launch(step_tokens<T, 8, false>);
}

}  // namespace

void step(const Problem& p, Queue& queue) {
  accumulation(p.dtype) == DType::f64 ? run<double>(p, queue) : run<float>(p, queue);
}

}  // namespace fwp::cuda::recurrent
