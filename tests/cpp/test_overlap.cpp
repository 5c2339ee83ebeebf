// The overlap checks against a search through every byte: never wrong in the dangerous direction, exact where they say
// so.
#include <doctest/doctest.h>

#include <random>
#include <set>

#include "core/overlap.hpp"

namespace {

using fwp::core::overlap;
using fwp::core::overlaps_itself;
using fwp::core::Region;

Region region(uintptr_t first, int64_t item, std::initializer_list<int64_t> shape,
              std::initializer_list<int64_t> strides) {
  Region r;
  r.first = first;
  r.item = item;
  int64_t last = 0;
  for (int i = 0; i < static_cast<int>(shape.size()); ++i) {
    if (shape.begin()[i] == 1) continue;
    r.shape[r.rank] = shape.begin()[i];
    r.stride[r.rank] = strides.begin()[i];
    last += (r.shape[r.rank] - 1) * r.stride[r.rank];
    ++r.rank;
  }
  r.end = first + static_cast<uintptr_t>(last + item);
  return r;
}

// Adds the bytes of a region to a set; false if one of them was there already.
bool add_bytes(const Region& r, std::set<uintptr_t>& bytes) {
  bool fresh = true;
  int64_t index[fwp::core::kMaxRank] = {};
  for (;;) {
    uintptr_t at = r.first;
    for (int i = 0; i < r.rank; ++i) at += static_cast<uintptr_t>(index[i] * r.stride[i]);
    for (int64_t byte = 0; byte < r.item; ++byte) fresh &= bytes.insert(at + static_cast<uintptr_t>(byte)).second;
    int axis = 0;
    while (axis < r.rank && ++index[axis] == r.shape[axis]) index[axis++] = 0;
    if (axis == r.rank) return fresh;
  }
}

bool share_bytes(const Region& a, const Region& b) {
  std::set<uintptr_t> of_a, of_b;
  add_bytes(a, of_a);
  add_bytes(b, of_b);
  for (uintptr_t byte : of_a)
    if (of_b.count(byte)) return true;
  return false;
}

class RandomRegion {
 public:
  Region draw() {
    const int64_t item = number(0, 1) ? 8 : 4;
    return region(static_cast<uintptr_t>(1000 + 4 * number(0, 40)), item, {number(1, 4), number(1, 4), number(1, 3)},
                  {4 * number(1, 30), 4 * number(1, 12), 4 * number(1, 4)});
  }

 private:
  int64_t number(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  std::mt19937 engine_{47};
};

TEST_CASE("overlap is exact on small regions") {
  RandomRegion random;
  int overlapping = 0;
  for (int round = 0; round < 20000; ++round) {
    const Region a = random.draw(), b = random.draw();
    const bool expected = share_bytes(a, b);
    overlapping += expected;
    REQUIRE(overlap(a, b) == expected);
    REQUIRE(overlap(b, a) == expected);
  }
  CHECK(overlapping > 1000);
  CHECK(overlapping < 19000);
}

TEST_CASE("a region that overlaps itself is always seen") {
  RandomRegion random;
  int overlapping = 0;
  for (int round = 0; round < 20000; ++round) {
    const Region a = random.draw();
    std::set<uintptr_t> bytes;
    if (!add_bytes(a, bytes)) {
      ++overlapping;
      REQUIRE(overlaps_itself(a));
    }
  }
  CHECK(overlapping > 1000);
}

TEST_CASE("contiguous and transposed arrays do not overlap themselves") {
  CHECK_FALSE(overlaps_itself(region(0, 4, {2, 3, 4}, {48, 16, 4})));
  CHECK_FALSE(overlaps_itself(region(0, 4, {4, 2, 3}, {4, 48, 16})));
  CHECK_FALSE(overlaps_itself(region(0, 4, {5}, {40})));
  CHECK(overlaps_itself(region(0, 4, {2, 3}, {4, 4})));
  CHECK(overlaps_itself(region(0, 8, {3}, {4})));
}

// One array [B,T,3,H,K] cut into q, k and v; and the even and odd columns of another.
TEST_CASE("interleaved views are told apart") {
  const auto part = [](uintptr_t i) { return region(96 * i, 4, {2, 5, 4, 6}, {5 * 288, 288, 24, 4}); };
  CHECK_FALSE(overlap(part(0), part(1)));
  CHECK_FALSE(overlap(part(2), part(0)));
  CHECK(overlap(part(1), part(1)));
  const Region even = region(0, 4, {100, 8}, {64, 8}), odd = region(4, 4, {100, 8}, {64, 8});
  CHECK_FALSE(overlap(even, odd));
  CHECK(overlap(even, region(4, 8, {100, 8}, {64, 8})));
}

TEST_CASE("huge strides stay within 64 bits") {
  constexpr int64_t far = int64_t{1} << 55;
  const Region a = region(0, 4, {2, 3}, {far, 4});
  CHECK_FALSE(overlap(a, region(64, 4, {2, 3}, {far, 4})));
  CHECK(overlap(a, region(static_cast<uintptr_t>(far) + 8, 4, {1, 1}, {4, 4})));
}

}  // namespace
