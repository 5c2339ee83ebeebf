// Do two strided arrays share a byte? Exact for the layouts people use, and never wrong in the dangerous direction.
#pragma once

#include <cstdint>

namespace fwp::core {

constexpr int kMaxRank = 4;

// The bytes of an array: items at first + sum_i x_i stride[i], 0 <= x_i < shape[i]. Strides in bytes, positive; axes of
// size 1 are left out. An empty array has item 0.
struct Region {
  const char* name = "";
  uintptr_t first = 0;
  uintptr_t end = 0;  // one past the last byte
  int64_t item = 0;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};
};

bool overlap(const Region& a, const Region& b);

// Whether two elements of one array may share a byte (a broadcast output, a sliding window). True also for some
// unusual layouts without overlap, whose strides do not nest.
bool overlaps_itself(const Region& a);

}  // namespace fwp::core
