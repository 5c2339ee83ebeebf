// The host's version of each primitive against its definition.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "primitives/primitives.cuh"

using namespace fwp::cuda;
namespace simt = fwp::simt;

namespace {

template <class Kernel>
simt::Report one_warp(const Kernel& kernel, size_t shared_bytes = 4096) {
  return simt::launch({}, 32, shared_bytes, {}, kernel);
}

double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                           : exponent == 31 ? (mantissa != 0 ? std::nan("") : HUGE_VAL)
                                            : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

float between(double a, double b) { return static_cast<float>((a + b) / 2); }

bool same(float x, double y) {
  return (std::isnan(x) && std::isnan(y)) || (static_cast<double>(x) == y && std::signbit(x) == std::signbit(y));
}

}  // namespace

TEST_CASE("every half becomes its value, and its value the half") {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const Half x{static_cast<uint16_t>(bits)};
    const float y = to_float(x);
    REQUIRE(same(y, value_of_half(x.bits)));
    if (!std::isnan(y)) REQUIRE(to_half(y).bits == x.bits);
  }
  CHECK(std::isnan(to_float(to_half(std::nanf("")))));
}

TEST_CASE("halves round to nearest, ties to even") {
  for (uint16_t bits = 0; bits < 0x7bff; ++bits) {
    const uint16_t up = static_cast<uint16_t>(bits + 1);
    const float middle = between(value_of_half(bits), value_of_half(up));
    const uint16_t even = bits % 2 == 0 ? bits : up;
    REQUIRE(to_half(middle).bits == even);
    REQUIRE(to_half(-middle).bits == even + 0x8000);
    REQUIRE(to_half(std::nextafter(middle, 0.0f)).bits == bits);
    REQUIRE(to_half(std::nextafter(middle, 1e30f)).bits == up);
  }
  CHECK(to_half(std::nextafter(65520.0f, 0.0f)).bits == 0x7bff);
  CHECK(to_half(65520.0f).bits == 0x7c00);
  CHECK(to_half(-std::numeric_limits<float>::infinity()).bits == 0xfc00);
  CHECK(to_half(1e-30f).bits == 0);
}

TEST_CASE("bfloats round to nearest, ties to even") {
  for (uint32_t bits = 0; bits < 0x7f80; ++bits) {
    const auto value = [](uint32_t b) { return to_float(BFloat{static_cast<uint16_t>(b)}); };
    REQUIRE(to_bfloat(value(bits)).bits == bits);
    if (bits == 0x7f7f) break;
    uint32_t middle_bits = bits << 16 | 0x8000u;
    float middle;
    std::memcpy(&middle, &middle_bits, 4);
    REQUIRE(to_bfloat(middle).bits == (bits % 2 == 0 ? bits : bits + 1));
    REQUIRE(to_bfloat(std::nextafter(middle, 0.0f)).bits == bits);
    REQUIRE(to_bfloat(std::nextafter(middle, HUGE_VALF)).bits == bits + 1);
  }
  CHECK(to_bfloat(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(std::isnan(to_float(to_bfloat(std::nanf("")))));
}

TEST_CASE("two numbers in a word") {
  CHECK(unpack_half(pack_half(1.5f, -2.0f), 0) == 1.5f);
  CHECK(unpack_half(pack_half(1.5f, -2.0f), 1) == -2.0f);
  CHECK(unpack_bfloat(pack_bfloat(1.5f, -2.0f), 0) == 1.5f);
  CHECK(unpack_bfloat(pack_bfloat(1.5f, -2.0f), 1) == -2.0f);
  CHECK(pack_half(0.0f, 1.0f) == 0x3c000000u);
}

TEST_CASE("tf32 keeps ten bits") {
  const auto rounded = [](float x) {
    const uint32_t bits = to_tf32(x);
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
  };
  CHECK(rounded(1.0f + 0x1p-10f) == 1.0f + 0x1p-10f);
  CHECK(rounded(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f);
  CHECK(rounded(1.0f + 0x1p-12f) == 1.0f);
  CHECK(rounded(-3.0f) == -3.0f);
}

TEST_CASE("shuffles") {
  one_warp([] {
    CHECK(shuffle(10 * lane(), (lane() + 1) % 32) == 10 * ((lane() + 1) % 32));
    CHECK(shuffle_xor(static_cast<double>(lane()), 5) == static_cast<double>(lane() ^ 5));
    float sum = static_cast<float>(lane());
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    CHECK(sum == 496.0f);
  });
}

TEST_CASE("matrices are loaded as fragments") {
  one_warp([] {
    auto* const x = static_cast<uint16_t*>(shared_memory());  // row i of matrix m: 100 m + 8 i + column
    for (int i = lane(); i < 256; i += 32) store_shared(x + i, static_cast<uint16_t>(100 * (i / 64) + i % 64));
    sync_warp();
    uint32_t r[4], t[4];
    load_matrices(r, x + 8 * lane());
    load_matrices_transposed(t, x + 8 * lane());
    const int g = lane() / 4, c = 2 * (lane() % 4);
    for (int m = 0; m < 4; ++m) {
      CHECK((r[m] & 0xffff) == static_cast<uint32_t>(100 * m + 8 * g + c));
      CHECK((r[m] >> 16) == static_cast<uint32_t>(100 * m + 8 * g + c + 1));
      CHECK((t[m] & 0xffff) == static_cast<uint32_t>(100 * m + 8 * c + g));
      CHECK((t[m] >> 16) == static_cast<uint32_t>(100 * m + 8 * (c + 1) + g));
    }
  });
}

TEST_CASE("rows of a matrix that share banks conflict") {
  const auto passes = [](int stride) {
    const simt::Report report = one_warp(
        [stride] {
          uint32_t r[4];
          load_matrices(r, static_cast<uint16_t*>(shared_memory()) + stride * lane());
        },
        32 * 128 + 64);
    const simt::Traffic& traffic = report.shared.begin()->second;
    CHECK(traffic.ideal == 4);
    return traffic.actual;
  };
  CHECK(passes(8) == 4);
  CHECK(passes(64) == 32);
  CHECK(passes(16) == 8);
}

namespace {

enum class Number { f16, bf16, tf32 };

// One warp's product of random matrices through fragments, against double.
template <Number number>
void check_mma() {
  constexpr int k = number == Number::tf32 ? 8 : 16;
  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  float A[16][k], B[k][8], D[16][8], result[16][8];
  const auto representable = [](float x) {
    if (number == Number::f16) return to_float(to_half(x));
    if (number == Number::bf16) return to_float(to_bfloat(x));
    const uint32_t bits = to_tf32(x);
    std::memcpy(&x, &bits, 4);
    return x;
  };
  for (auto& row : A)
    for (float& x : row) x = representable(normal(rng));
  for (auto& row : B)
    for (float& x : row) x = representable(normal(rng));
  for (auto& row : D)
    for (float& x : row) x = normal(rng);
  const simt::Report report = one_warp([&] {
    const int g = lane() / 4, t = lane() % 4;
    uint32_t a[4], b[2];
    float d[4];
    for (int r = 0; r < 4; ++r) {
      d[r] = D[g + 8 * (r / 2)][2 * t + r % 2];
      if constexpr (number == Number::tf32) {
        a[r] = to_tf32(A[g + 8 * (r % 2)][t + 4 * (r / 2)]);
      } else {
        const float* const pair = &A[g + 8 * (r % 2)][2 * t + 8 * (r / 2)];
        a[r] = number == Number::f16 ? pack_half(pair[0], pair[1]) : pack_bfloat(pair[0], pair[1]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      if constexpr (number == Number::tf32) {
        b[r] = to_tf32(B[t + 4 * r][g]);
      } else {
        const float lo = B[2 * t + 8 * r][g], hi = B[2 * t + 8 * r + 1][g];
        b[r] = number == Number::f16 ? pack_half(lo, hi) : pack_bfloat(lo, hi);
      }
    }
    if constexpr (number == Number::f16) mma_f16(d, a, b);
    if constexpr (number == Number::bf16) mma_bf16(d, a, b);
    if constexpr (number == Number::tf32) mma_tf32(d, a, b);
    for (int r = 0; r < 4; ++r) result[g + 8 * (r / 2)][2 * t + r % 2] = d[r];
  });
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      double sum = static_cast<double>(D[i][j]);
      for (int c = 0; c < k; ++c) sum += static_cast<double>(A[i][c]) * static_cast<double>(B[c][j]);
      CHECK(static_cast<double>(result[i][j]) == doctest::Approx(sum).epsilon(1e-6));
    }
  CHECK(report.collectives.size() == 1);
}

}  // namespace

TEST_CASE("a warp multiplies float16 matrices") { check_mma<Number::f16>(); }
TEST_CASE("a warp multiplies bfloat16 matrices") { check_mma<Number::bf16>(); }
TEST_CASE("a warp multiplies tf32 matrices") { check_mma<Number::tf32>(); }
