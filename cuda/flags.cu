#include "flags.hpp"

namespace fwp::cuda {
namespace {

constexpr int kThreads = 128;

FWP_KERNEL void clear(int32_t* flags, int64_t count) {
  const int64_t i = static_cast<int64_t>(block_index_x()) * kThreads + thread_index();
  if (i < count) store_global(flags + i, int32_t{0});
}

}  // namespace

void clear_flags(const Problem& p, int32_t* flags, Queue& queue) {
  const int64_t count = p.N * p.H;
  queue.run("clear flags", clear, {(count + kThreads - 1) / kThreads}, kThreads, 0, flags, count);
}

}  // namespace fwp::cuda
