// Advanced SIMD of 64-bit Arm.
#pragma once
#include <arm_neon.h>

constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;

namespace fwp {
namespace {

template <class Floats, class Halves>
inline Floats widen_float16(Halves x) {
  return (Floats)vcvt_f32_f16((float16x4_t)x);
}
template <class Halves, class Floats>
inline Halves round_float16(Floats x) {
  return (Halves)vcvt_f16_f32((float32x4_t)x);
}

}  // namespace
}  // namespace fwp
