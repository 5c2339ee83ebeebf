#include "diagnose.cuh"
#include "recurrent.hpp"

namespace fwp::cuda::recurrent {
namespace {

template <class T>
void run(const Problem& p, Queue& queue) {
  const auto bytes = [&p](int columns) { return static_cast<size_t>(Diagnosis<T>::numbers(p.K, columns)) * sizeof(T); };
  const size_t most = most_shared_bytes(p.device);
  int columns = kWarpSize;
  while (columns > 1 && bytes(columns) > most) columns /= 2;
  if (bytes(columns) > most)
    throw Error("diagnose: keys of " + std::to_string(p.K) + " numbers take " + std::to_string(bytes(columns)) +
                " bytes of shared memory, more than " + std::to_string(most));
  queue.run("diagnose", probe_tokens<T>, {p.N * p.H}, kDiagnoseThreads, bytes(columns), p, columns);
}

}  // namespace

void diagnose(const Problem& p, Queue& queue) {
  accumulation(p.dtype) == DType::f64 ? run<double>(p, queue) : run<float>(p, queue);
}

}  // namespace fwp::cuda::recurrent
