// Offsets and slots where kernels read them: int64 in the memory of the device.
#pragma once

#include "rows.cuh"

namespace fwp::cuda {

// Integers of the host that travel as a kernel's parameter: nothing waits, and a CUDA graph keeps them.
struct Handful {
  static constexpr int kMost = 384;
  int64_t x[kMost];
};

FWP_KERNEL void put_integers(FWP_PARAMETER Handful from, int count, int64_t* to) {
  for (int i = thread_index(); i < count; i += block_threads()) store_global(to + i, from.x[i]);
}

FWP_DEVICE int64_t integer_at(const DeviceIntegers& integers, int64_t i) {
  const int64_t at = i * integers.stride;
  return integers.wide ? load_global(static_cast<const int64_t*>(integers.data) + at)
                       : load_global(static_cast<const int32_t*>(integers.data) + at);
}

// Offsets that start with 0, never fall and end with T; where they do not they are made to, and the fault is noted, by
// its number. One block.
FWP_KERNEL void check_offsets(FWP_PARAMETER DeviceIntegers from, int64_t N, int64_t T, int64_t* to, int32_t* fault,
                              int32_t number) {
  auto* const bad_of_warp = static_cast<int*>(shared_memory());
  int bad = 0;
  for (int64_t i = thread_index(); i <= N; i += block_threads()) {
    const int64_t x = integer_at(from, i);
    if (i == 0 && x != 0) bad = 1;
    if (i == N ? x != T : x > integer_at(from, i + 1)) bad = 1;
  }
  for (int step = 16; step > 0; step /= 2) bad |= shuffle_xor(bad, step);
  if (lane() == 0) store_shared(bad_of_warp + warp(), bad);
  sync_block();
  for (int w = 0; w < block_threads() / kWarpSize; ++w) bad |= load_shared(bad_of_warp + w);
  if (bad == 0) {
    for (int64_t i = thread_index(); i <= N; i += block_threads()) store_global(to + i, integer_at(from, i));
  } else if (thread_index() == 0) {
    int64_t last = 0;
    store_global(to, last);
    for (int64_t i = 1; i < N; ++i) {
      const int64_t x = integer_at(from, i);
      if (x > last) last = x < T ? x : T;
      store_global(to + i, last);
    }
    store_global(to + N, T);
    store_global(fault, number);
  }
}

// Slots from 0 to S-1, or kNoSlot; others become kNoSlot, and the fault is noted. Whether one stands there twice is not
// looked at.
FWP_KERNEL void check_slots(FWP_PARAMETER DeviceIntegers from, int64_t N, int64_t S, int64_t* to, int32_t* fault,
                            int32_t number) {
  bool bad = false;
  for (int64_t i = thread_index(); i < N; i += block_threads()) {
    const int64_t x = integer_at(from, i), slot = x >= 0 && x < S ? x : kNoSlot;
    store_global(to + i, slot);
    bad = bad || slot != x;
  }
  auto* const bad_of_warp = static_cast<int*>(shared_memory());
  int any = bad ? 1 : 0;
  for (int step = 16; step > 0; step /= 2) any |= shuffle_xor(any, step);
  if (lane() == 0) store_shared(bad_of_warp + warp(), any);
  sync_block();
  for (int w = 0; w < block_threads() / kWarpSize; ++w) any |= load_shared(bad_of_warp + w);
  if (any != 0 && thread_index() == 0) store_global(fault, number);
}

}  // namespace fwp::cuda
