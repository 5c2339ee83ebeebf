// One SIMD register of T as a value: arithmetic comes from the compiler's vector extensions, here is the rest.
// The includer has chosen the level by including one pack_<isa>.hpp first. Everything has internal linkage, so that
// the linker cannot merge code of one level into another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scan/dtype.hpp"

#if defined(__clang__)
#define FWP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FWP_UNROLL _Pragma("GCC unroll 32")
#endif
#define FWP_HD __attribute__((always_inline)) inline
#define FWP_DEVICE  // before functions that devices have, too

namespace fwp {
namespace {

typedef float FloatPack __attribute__((vector_size(kVectorBytes)));
typedef double DoublePack __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int32Pack __attribute__((vector_size(kVectorBytes)));
typedef int64_t Int64Pack __attribute__((vector_size(kVectorBytes)));
typedef uint32_t UInt32Pack __attribute__((vector_size(kVectorBytes)));
// As many halves as a pack has floats, as many floats as a pack has doubles.
typedef uint16_t HalfPack __attribute__((vector_size(kVectorBytes / 2)));
typedef float NarrowPack __attribute__((vector_size(kVectorBytes / 2)));

template <class T>
struct PackOf;
template <>
struct PackOf<float> {
  using type = FloatPack;
  using Int = Int32Pack;
};
template <>
struct PackOf<double> {
  using type = DoublePack;
  using Int = Int64Pack;
};
template <class T>
using Pack = typename PackOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Scratch memory is aligned, the caller's memory is not.
template <class T>
FWP_HD Pack<T> load(const T* p) {
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
FWP_HD void store(T* p, Pack<T> x) {
  *reinterpret_cast<Pack<T>*>(p) = x;
}
template <class T>
FWP_HD Pack<T> load_unaligned(const T* p) {
  Pack<T> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
FWP_HD void store_unaligned(T* p, Pack<T> x) {
  __builtin_memcpy(p, &x, sizeof x);
}
template <class T>
FWP_HD Pack<T> broadcast(T x) {
  return x - Pack<T>{};
}

// A pack's worth of numbers as an array of U stores them: widened exactly; rounded to nearest even, overflow to
// infinity, NaN to a quiet NaN of the same sign.
template <class T, class U>
struct Stored;
template <class T>
struct Stored<T, T> {
  using type = Pack<T>;
  FWP_HD static Pack<T> widen(Pack<T> x) { return x; }
  FWP_HD static Pack<T> round(Pack<T> x) { return x; }
  FWP_HD static T widen(T x) { return x; }
  FWP_HD static T round(T x) { return x; }
};
template <>
struct Stored<double, float> {
  using type = NarrowPack;
  FWP_HD static DoublePack widen(NarrowPack x) { return __builtin_convertvector(x, DoublePack); }
  FWP_HD static NarrowPack round(DoublePack x) { return __builtin_convertvector(x, NarrowPack); }
  FWP_HD static double widen(float x) { return x; }
  FWP_HD static float round(double x) { return static_cast<float>(x); }
};
template <>
struct Stored<float, Bfloat16> {
  using type = HalfPack;
  FWP_HD static FloatPack widen(HalfPack x) { return (FloatPack)(__builtin_convertvector(x, UInt32Pack) << 16); }
  FWP_HD static HalfPack round(FloatPack x) {
    const UInt32Pack bits = (UInt32Pack)x, even = bits >> 16 & 1u;
    const UInt32Pack rounded = x == x ? bits + (even + 0x7fffu) : bits | 0x400000u;
    return __builtin_convertvector(rounded >> 16, HalfPack);
  }
  FWP_HD static float widen(Bfloat16 x) { return widen(HalfPack{x.bits})[0]; }
  FWP_HD static Bfloat16 round(float x) { return {round(broadcast(x))[0]}; }
};
template <>
struct Stored<float, Float16> {
  using type = HalfPack;
  FWP_HD static FloatPack widen(HalfPack x) { return widen_float16<FloatPack>(x); }
  FWP_HD static HalfPack round(FloatPack x) { return round_float16<HalfPack>(x); }
  FWP_HD static float widen(Float16 x) { return widen(HalfPack{x.bits})[0]; }
  FWP_HD static Float16 round(float x) { return {round(broadcast(x))[0]}; }
};

template <class T, class U>
FWP_HD Pack<T> load_as(const U* p) {
  typename Stored<T, U>::type x;
  __builtin_memcpy(&x, p, sizeof x);
  return Stored<T, U>::widen(x);
}
template <class T, class U>
FWP_HD void store_as(U* p, Pack<T> x) {
  const typename Stored<T, U>::type rounded = Stored<T, U>::round(x);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}

// merge<h>: lane i of the result is a_i + a_{i^h} where bit h of i is clear, b_i + b_{i^h} where it is set.
template <int N, int h, int... I>
struct Lanes : Lanes<N - 1, h, N - 1, I...> {};
template <int h, int... I>
struct Lanes<0, h, I...> {
  static constexpr int W = sizeof...(I);
  template <class P>
  FWP_HD static P partner(P a) {
    return __builtin_shufflevector(a, a, (I ^ h)...);
  }
  template <class P>
  FWP_HD static P merge(P a, P b) {
    const P kept = __builtin_shufflevector(a, b, ((I & h) ? I + W : I)...);
    const P partner = __builtin_shufflevector(a, b, ((I & h) ? (I ^ h) + W : (I ^ h))...);
    return kept + partner;
  }
};

// Transposed reduction: lane i of the result is the sum over the lanes of x[i]. Overwrites x.
template <class T, int h = 1>
FWP_HD Pack<T> sum_each(Pack<T>* x) {
  constexpr int W = kLanes<T>;
  FWP_UNROLL for (int i = 0; i < W / (2 * h); ++i) x[i] = Lanes<W, h>::merge(x[2 * i], x[2 * i + 1]);
  if constexpr (2 * h < W)
    return sum_each<T, 2 * h>(x);
  else
    return x[0];
}

// Every lane of the result is that of f over all lanes of x.
template <class T, class F, int h = 1>
FWP_HD Pack<T> fold(Pack<T> x, const F& f) {
  constexpr int W = kLanes<T>;
  x = f(x, Lanes<W, h>::partner(x));
  if constexpr (2 * h < W)
    return fold<T, F, 2 * h>(x, f);
  else
    return x;
}

// exp to about one unit in the last place; -inf gives 0, NaN stays, subnormal results are kept.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504f, ln2_hi = 0.693359375f, ln2_lo = -2.12194440e-4f;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr float lo = -104.0f, hi = 89.0f;
  static constexpr int terms = 8, mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634, ln2_hi = 0.693145751953125, ln2_lo = 1.4286068203094172e-6;
  static constexpr double round = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lo = -746.0, hi = 710.0;
  static constexpr int terms = 14, mantissa = 52, bias = 1023;
};

template <class T>
FWP_HD Pack<T> exp(Pack<T> x) {
  using P = Pack<T>;
  using I = typename PackOf<T>::Int;
  using E = ExpConstants<T>;
  x = x < broadcast(E::lo) ? broadcast(E::lo) : x;
  x = x > broadcast(E::hi) ? broadcast(E::hi) : x;
  const P shifted = x * E::log2e + E::round;
  const P n = shifted - E::round;
  const P r = (x - n * E::ln2_hi) - n * E::ln2_lo;
  P y = P{} + T(1);  // Taylor series, |r| <= ln(2)/2
  FWP_UNROLL for (int i = E::terms - 1; i > 0; --i) y = y * r * T(1.0 / i) + T(1);
  const I exponent = (I)shifted - (I)broadcast(E::round);
  const I half = exponent >> 1;  // 2^n in two factors, so that subnormal and overflowing results come out right
  return y * (P)((half + E::bias) << E::mantissa) * (P)((exponent - half + E::bias) << E::mantissa);
}

}  // namespace
}  // namespace fwp
