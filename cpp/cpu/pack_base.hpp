// x86-64 without extensions, and any other machine: 16-byte vectors, 16 registers, float16 by integer arithmetic.
#pragma once
#include <cstdint>

constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;

namespace fwp {
namespace {

typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef int32_t SignedBits __attribute__((vector_size(kVectorBytes)));
constexpr uint32_t kRebias = (127 - 15) << 23;  // from the exponent of float16 to that of float

// A float16 moved to the place of a float's exponent and mantissa lacks the bias; a subnormal one lacks a leading 1 as
// well, which comes with 2^-14 added and goes with it subtracted; infinity and NaN need the bias twice.
template <class Floats, class Halves>
inline Floats widen_float16(Halves x) {
  constexpr uint32_t least = kRebias + (1 << 23), exponents = 0x7c00 << 13;
  const Bits bits = __builtin_convertvector(x, Bits), size = (bits & 0x7fffu) << 13, exponent = size & exponents;
  const Bits normal = size + kRebias;
  const Bits subnormal = (Bits)((Floats)(size + least) - (Floats)(Bits{} + least));
  const Bits finite = exponent == 0 ? subnormal : normal;
  return (Floats)((exponent == exponents ? normal + kRebias : finite) | (bits & 0x8000u) << 16);
}

// The other way round; a subnormal result is rounded by adding 0.5, whose last bit is that of a subnormal float16.
template <class Halves, class Floats>
inline Halves round_float16(Floats x) {
  constexpr int32_t least = static_cast<int32_t>(kRebias) + (1 << 23), beyond = (127 + 16) << 23, infinity = 255 << 23;
  constexpr uint32_t half = 126 << 23;
  const Bits bits = (Bits)x, size = bits & 0x7fffffffu, odd = size >> 13 & 1u;
  const SignedBits order = (SignedBits)size;
  const Bits normal = (size - kRebias + 0xfffu + odd) >> 13;
  const Bits subnormal = (Bits)((Floats)size + (Floats)(Bits{} + half)) - half;
  const Bits finite = order < least ? subnormal : normal;
  const Bits nan = (size >> 13 & 0x3ffu) | 0x7e00u;
  const Bits infinite = order > infinity ? nan : Bits{} + 0x7c00u;
  return __builtin_convertvector((order < beyond ? finite : infinite) | (bits >> 16 & 0x8000u), Halves);
}

}  // namespace
}  // namespace fwp
