// x86-64-v4: AVX-512.
#pragma once
#include <immintrin.h>

constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;

namespace fwp {
namespace {

// All lanes by their mask: the forms without one start from an undefined register, which GCC 12 warns about.
constexpr __mmask16 kAll = 0xffff;

template <class Floats, class Halves>
inline Floats widen_float16(Halves x) {
  return (Floats)_mm512_maskz_cvtph_ps(kAll, (__m256i)x);
}
template <class Halves, class Floats>
inline Halves round_float16(Floats x) {
  return (Halves)_mm512_maskz_cvtps_ph(kAll, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
}

}  // namespace
}  // namespace fwp
