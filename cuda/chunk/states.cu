#include "backward.cuh"

namespace fwp::cuda::chunk {

void run_states_scan(const Scan& x, Queue& queue) { run_scan<false>(x, queue); }

}  // namespace fwp::cuda::chunk
