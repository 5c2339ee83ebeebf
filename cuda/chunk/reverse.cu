#include "reverse.cuh"

namespace fwp::cuda::chunk {

void run_reverse_scan(const Backward& x, Queue& queue) {
  const Problem& p = x.p;
  const Grid grid{(p.V + kValueTile - 1) / kValueTile * p.H * p.N};
  with_variant(p, [&](auto size, auto predicts, auto decays) {
    queue.run("chunk reverse scan", reverse_scan<size(), predicts(), decays()>, grid, kScanThreads,
              shared_of<ScanShared<size(), decays()>, 2>(), x);
  });
}

}  // namespace fwp::cuda::chunk
