// Arrays of a Problem as kernels read and write them: numbers of each dtype, rows by their strides, sequences.
#pragma once

#include "../cpp/scan/problem.hpp"
#include "primitives/primitives.cuh"

namespace fwp::cuda {

// What an array of each dtype stores, and the type in which it is computed with: float, or double for double.
template <DType dtype>
struct Stored;
template <>
struct Stored<DType::f32> {
  using Type = float;
};
template <>
struct Stored<DType::f64> {
  using Type = double;
};
template <>
struct Stored<DType::f16> {
  using Type = Half;
};
template <>
struct Stored<DType::bf16> {
  using Type = BFloat;
};
template <class X>
struct AccumulationOf {
  using Type = float;
};
template <>
struct AccumulationOf<double> {
  using Type = double;
};
template <class X>
using Accumulation = typename AccumulationOf<X>::Type;

FWP_DEVICE float widened(float x) { return x; }
FWP_DEVICE double widened(double x) { return x; }
FWP_DEVICE float widened(Half x) { return to_float(x); }
FWP_DEVICE float widened(BFloat x) { return to_float(x); }

// Rounded once, to nearest even.
template <class X>
struct Rounded {
  FWP_DEVICE static X of(Accumulation<X> x) { return x; }
};
template <>
struct Rounded<Half> {
  FWP_DEVICE static Half of(float x) { return to_half(x); }
};
template <>
struct Rounded<BFloat> {
  FWP_DEVICE static BFloat of(float x) { return to_bfloat(x); }
};

// Numbers of the widest access, of aligned memory.
template <class T>
constexpr int kQuad = 16 / static_cast<int>(sizeof(T));
template <class T>
struct alignas(16) Numbers {
  T x[kQuad<T>];
};

// One number of an array whose dtype is known when the kernel runs: beta, g and their gradients, which may be float32
// beside halves. at: in numbers.
template <class T>
FWP_DEVICE T load_number(const Rows& rows, int64_t at) {
  switch (rows.dtype) {
    case DType::f64:
      return static_cast<T>(load_global(static_cast<const double*>(rows.data) + at));
    case DType::f32:
      return static_cast<T>(load_global(static_cast<const float*>(rows.data) + at));
    case DType::f16:
      return static_cast<T>(to_float(load_global(static_cast<const Half*>(rows.data) + at)));
    default:
      return static_cast<T>(to_float(load_global(static_cast<const BFloat*>(rows.data) + at)));
  }
}
template <class T>
FWP_DEVICE void store_number(const Rows& rows, int64_t at, T x) {
  switch (rows.dtype) {
    case DType::f64:
      return store_global(static_cast<double*>(rows.data) + at, static_cast<double>(x));
    case DType::f32:
      return store_global(static_cast<float*>(rows.data) + at, static_cast<float>(x));
    case DType::f16:
      return store_global(static_cast<Half*>(rows.data) + at, to_half(static_cast<float>(x)));
    default:
      return store_global(static_cast<BFloat*>(rows.data) + at, to_bfloat(static_cast<float>(x)));
  }
}

// Where a sequence lies in the arrays. In kernels p.cu_seqlens is device memory: backend.cu puts it there.
struct Sequence {
  int64_t b, begin, length;
};
inline bool packed(const Problem& p) { return p.cu_seqlens != nullptr || p.device_cu_seqlens.data != nullptr; }
inline int64_t tokens_of_call(const Problem& p) { return packed(p) ? p.T : p.N * p.T; }
FWP_DEVICE Sequence sequence(const Problem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) return {n, 0, p.T};
  const int64_t begin = load_global(p.cu_seqlens + n), length = load_global(p.cu_seqlens + n + 1) - begin;
  const int64_t b = p.batch_tokens > 0 ? load_global(p.cu_seqlens + p.N + 1 + n) : 0;
  return {b, begin - b * p.batch_tokens, length};
}

// Which of the states belongs to sequence n; kNoSlot: none. In kernels p.state_indices is device memory.
FWP_DEVICE int64_t state_slot(const Problem& p, int64_t n) {
  return p.state_indices != nullptr ? load_global(p.state_indices + n) : n;
}

// The row of token t of a sequence, counted from its begin, that head h reads; in numbers from rows.data.
FWP_DEVICE int64_t row_at(const Rows& rows, const Sequence& s, int64_t t, int64_t h) {
  const uint32_t of_rows =
      static_cast<uint32_t>(h) / static_cast<uint32_t>(rows.group);  // 64 bits take 50 instructions
  return s.b * rows.b + (s.begin + t) * rows.t + of_rows * rows.h;
}
FWP_DEVICE int64_t state_at(const States& states, int64_t slot, int64_t h) { return slot * states.n + h * states.h; }

}  // namespace fwp::cuda
