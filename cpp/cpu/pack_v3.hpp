// x86-64-v3: AVX2, FMA and F16C.
#pragma once
#include <immintrin.h>

constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;

namespace fwp {
namespace {

template <class Floats, class Halves>
inline Floats widen_float16(Halves x) {
  return (Floats)_mm256_cvtph_ps((__m128i)x);
}
template <class Halves, class Floats>
inline Halves round_float16(Floats x) {
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
}

}  // namespace
}  // namespace fwp
