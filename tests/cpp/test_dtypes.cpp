// How half precisions are read and written at one instruction set level, bit by bit: against a reference in double that
// knows nothing but the formats. Compiled once per level.
#include <doctest/doctest.h>

#include FWP_PACK

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/tiles.hpp"

namespace fwp {
namespace {

// 1 sign, the exponent, the mantissa.
template <class U>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int mantissa = 10, bias = 15, infinity = 0x7c00;
};
template <>
struct Format<Bfloat16> {
  static constexpr int mantissa = 7, bias = 127, infinity = 0x7f80;
};

template <class U>
double value(uint16_t bits) {
  using F = Format<U>;
  const int size = bits & 0x7fff, exponent = size >> F::mantissa, fraction = size & ((1 << F::mantissa) - 1);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (size > F::infinity) return std::numeric_limits<double>::quiet_NaN();
  if (size == F::infinity) return sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - F::bias - F::mantissa);
  return sign * std::ldexp(fraction + (1 << F::mantissa), exponent - F::bias - F::mantissa);
}

// The bits of a float that is no NaN, rounded to nearest even: in units of the last place, a whole number of which is
// what the format can say.
template <class U>
uint16_t rounded(float x) {
  using F = Format<U>;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::abs(static_cast<double>(x));
  if (size == 0) return static_cast<uint16_t>(sign);
  if (std::isinf(size)) return static_cast<uint16_t>(sign | F::infinity);
  int exponent = std::ilogb(size) + F::bias;
  if (exponent < 1) exponent = 1;  // subnormal
  const double units = std::nearbyint(std::ldexp(size, F::mantissa + F::bias - exponent));
  // A mantissa that is rounded up to 2 carries into the exponent, and from the largest number into infinity.
  const double bits = units + std::ldexp(exponent - 1, F::mantissa);
  return static_cast<uint16_t>(sign | static_cast<int>(std::fmin(bits, F::infinity)));
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

constexpr int W = kLanes<float>;

// What the reference says of all 65536 numbers, counted, so that a failure is one line.
template <class U>
int wrong_when_widened() {
  int wrong = 0;
  for (int first = 0; first < 65536; first += W) {
    U stored[W];
    for (int i = 0; i < W; ++i) stored[i].bits = static_cast<uint16_t>(first + i);
    const FloatPack pack = load_as<float>(stored);
    for (int i = 0; i < W; ++i) {
      const double expected = value<U>(stored[i].bits);
      for (const float x : {pack[i], Stored<float, U>::widen(stored[i])}) {
        const bool sign = std::signbit(x) == (stored[i].bits >= 0x8000);
        wrong += !sign || (std::isnan(expected) ? !std::isnan(x) : x != expected);
      }
    }
  }
  return wrong;
}

TEST_CASE_TEMPLATE("every half is widened exactly", U, Float16, Bfloat16) { CHECK(wrong_when_widened<U>() == 0); }

// Writes the numbers by packs and one by one, and counts those that do not have the expected bits.
template <class U, class F>
int wrong_when_rounded(const std::vector<float>& numbers, F expected) {
  int wrong = 0;
  for (size_t first = 0; first < numbers.size(); first += static_cast<size_t>(W)) {
    FloatPack pack = {};
    for (int i = 0; i < W; ++i) pack[i] = numbers[(first + static_cast<size_t>(i)) % numbers.size()];
    U stored[W];
    store_as<float>(stored, pack);
    for (int i = 0; i < W; ++i) {
      wrong += stored[i].bits != expected(pack[i]);
      wrong += Stored<float, U>::round(static_cast<float>(pack[i])).bits != expected(pack[i]);
    }
  }
  return wrong;
}

// Every half; every middle between two neighbours, which are the ties; and the floats next to all of these.
template <class U>
std::vector<float> around_every_half() {
  std::vector<float> numbers;
  for (int size = 0; size < Format<U>::infinity; ++size) {
    const double low = value<U>(static_cast<uint16_t>(size));
    const double high = size + 1 < Format<U>::infinity ? value<U>(static_cast<uint16_t>(size + 1))
                                                       : 2 * low - value<U>(static_cast<uint16_t>(size - 1));
    for (const double x : {low, (low + high) / 2}) {
      const float exact = static_cast<float>(x), most = std::numeric_limits<float>::max();
      for (const float near : {exact, std::nextafter(exact, most), std::nextafter(exact, -most)})
        for (const float sign : {1.0f, -1.0f}) numbers.push_back(sign * near);
    }
  }
  return numbers;
}

TEST_CASE_TEMPLATE("floats are rounded to nearest even, at every half and between any two", U, Float16, Bfloat16) {
  CHECK(wrong_when_rounded<U>(around_every_half<U>(), rounded<U>) == 0);
}

TEST_CASE_TEMPLATE("floats of every exponent are rounded, overflow to infinity", U, Float16, Bfloat16) {
  std::mt19937 engine(7);
  std::vector<float> numbers{std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::max(),      -std::numeric_limits<float>::max(),
                             std::numeric_limits<float>::min(),      std::numeric_limits<float>::denorm_min()};
  for (uint32_t exponent = 0; exponent < 255; ++exponent)
    for (int i = 0; i < 1000; ++i)
      numbers.push_back(float_of(exponent << 23 | (static_cast<uint32_t>(engine()) & 0x807fffff)));
  CHECK(wrong_when_rounded<U>(numbers, rounded<U>) == 0);
}

TEST_CASE_TEMPLATE("NaN stays NaN: quiet, its sign and what fits of its payload", U, Float16, Bfloat16) {
  std::vector<float> numbers;
  std::mt19937 engine(9);
  for (uint32_t sign : {0u, 0x80000000u})
    for (uint32_t payload : {1u, 0x1000u, 0x1fffu, 0xffffu, 0x3fffffu, 0x400000u, 0x400001u, 0x7fffffu})
      numbers.push_back(float_of(sign | 0x7f800000u | payload));
  for (int i = 0; i < 1000; ++i)
    numbers.push_back(float_of(0x7f800001u | (static_cast<uint32_t>(engine()) & 0x807fffffu)));
  constexpr int dropped = 23 - Format<U>::mantissa;
  const auto expected = [](float x) {
    const uint32_t bits = bits_of(x), payload = (bits & 0x7fffffu) >> dropped, quiet = 1u << (Format<U>::mantissa - 1);
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | uint32_t{Format<U>::infinity} | quiet | payload);
  };
  CHECK(wrong_when_rounded<U>(numbers, expected) == 0);
}

TEST_CASE_TEMPLATE("a half is what it was after widening and rounding", U, Float16, Bfloat16) {
  int wrong = 0;
  for (int bits = 0; bits < 65536; ++bits) {
    const U x{static_cast<uint16_t>(bits)};
    if (!std::isnan(value<U>(x.bits))) wrong += Stored<float, U>::round(Stored<float, U>::widen(x)).bits != x.bits;
  }
  CHECK(wrong == 0);
}

TEST_CASE("floats beside doubles") {
  constexpr int lanes = kLanes<double>;
  float from[lanes], to[lanes];
  std::mt19937 engine(3);
  std::normal_distribution<float> draw;
  for (float& x : from) x = draw(engine);
  const DoublePack pack = load_as<double>(from);
  for (int i = 0; i < lanes; ++i) CHECK(pack[i] == static_cast<double>(from[i]));
  store_as<double>(to, pack * (1 + 1e-8));
  for (int i = 0; i < lanes; ++i) CHECK(to[i] == static_cast<float>(static_cast<double>(from[i]) * (1 + 1e-8)));
}

TEST_CASE("numbers of the same type keep their bits, also those of a signalling NaN") {
  float from[W], to[W];
  for (int i = 0; i < W; ++i) from[i] = float_of(0x7f800001u + static_cast<uint32_t>(i));
  store_as<float>(to, load_as<float>(from));
  CHECK(std::memcmp(from, to, sizeof from) == 0);
}

}  // namespace
}  // namespace fwp
