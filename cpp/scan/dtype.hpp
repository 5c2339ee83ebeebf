// Number types: what arrays store, and what is computed with.
#pragma once

#include <cstdint>

namespace fwp {

enum class DType : int { f32, f64, f16, bf16 };

// The halves are bits here; their arithmetic is float's.
struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

namespace {

template <class T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;  // of what is computed with: double or float

constexpr int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The type in which arrays of this type are summed up; of their states.
constexpr DType accumulation(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

}  // namespace
}  // namespace fwp
