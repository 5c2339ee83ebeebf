// The thread pool: run a body for every index, on a few threads, and wait.
#pragma once

#include <cstdint>

namespace fwp::cpu {

// Calls body(context, index, worker) once for each index in [0, count), worker in [0, threads); worker 0 is the calling
// thread. While it has to wait for the others it calls idle(context) every few milliseconds. Bodies must not throw.
// If the pool is in use by another caller, or threads cannot be started, fewer workers do all the work. Safe in a child
// process after fork.
struct Loop {
  void (*body)(void* context, int64_t index, int worker);
  void (*idle)(void* context);
  void* context;
};
void parallel_for(int threads, int64_t count, const Loop& loop);

// FWP_NUM_THREADS, then OMP_NUM_THREADS, then the affinity mask capped by the cgroup quota.
int default_num_threads();

}  // namespace fwp::cpu
