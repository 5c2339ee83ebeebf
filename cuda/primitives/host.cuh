// The primitives under the emulator; primitives.cuh says what they do. Every one that can go wrong knows its caller's
// line.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../simt/simt.hpp"

#define FWP_KERNEL
#define FWP_DEVICE inline
#define FWP_PARAMETER const
#define FWP_UNROLL _Pragma("GCC unroll 32")
#define FWP_UNROLL_BY(n)
// The last parameters of a primitive, and what they make.
#define FWP_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define FWP_AT(name) (simt::Site{name, file, line})

namespace fwp::cuda {

inline int thread_index() { return static_cast<int>(simt::thread_index()); }
inline int block_threads() { return static_cast<int>(simt::block_threads()); }
inline unsigned block_index_x() { return simt::block_index().x; }
inline unsigned block_index_y() { return simt::block_index().y; }
inline unsigned block_index_z() { return simt::block_index().z; }
inline int lane() { return thread_index() % kWarpSize; }
inline int warp() { return thread_index() / kWarpSize; }
template <class T>
T fresh(T x) {
  return x;
}
inline void* shared_memory() { return simt::shared_memory(); }

inline void sync_block(FWP_CALLER) { simt::sync_block(FWP_AT("sync_block")); }
inline void sync_warp(FWP_CALLER) { simt::sync_warp(FWP_AT("sync_warp")); }

template <class T>
T load_shared(const T* p, FWP_CALLER) {
  simt::touch_shared(p, sizeof(T), simt::Access::read, FWP_AT("load_shared"));
  return *p;
}
template <class T>
void store_shared(T* p, std::common_type_t<T> x, FWP_CALLER) {
  simt::touch_shared(p, sizeof(T), simt::Access::write, FWP_AT("store_shared"));
  *p = x;
}
template <class T>
T load_global(const T* p, FWP_CALLER) {
  simt::touch_global(p, sizeof(T), simt::Access::read, FWP_AT("load_global"));
  return *p;
}
template <class T>
void store_global(T* p, std::common_type_t<T> x, FWP_CALLER) {
  simt::touch_global(p, sizeof(T), simt::Access::write, FWP_AT("store_global"));
  *p = x;
}
inline void raise(int32_t* flag, FWP_CALLER) {
  simt::touch_global(flag, sizeof *flag, simt::Access::raise, FWP_AT("raise"));
  *flag = 1;
}

template <int bytes>
void copy_async(void* shared, const void* global, int valid = bytes, FWP_CALLER) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  simt::copy_async(shared, global, bytes, static_cast<size_t>(valid), FWP_AT("copy_async"));
}
inline void commit_copies() { simt::commit_copies(); }
template <int groups_left>
void wait_copies() {
  simt::wait_copies(groups_left);
}

namespace detail {

template <class T>
struct Shuffled {
  T mine;
  int from;
  T got;
};
template <class T>
T shuffled(T x, int from, const simt::Site& site) {
  Shuffled<T> arguments{x, from % kWarpSize, x};
  simt::meet(site, &arguments, [](void* const* lanes) {
    for (int l = 0; l < kWarpSize; ++l) {
      auto& of = *static_cast<Shuffled<T>*>(lanes[l]);
      of.got = static_cast<Shuffled<T>*>(lanes[of.from])->mine;
    }
  });
  return arguments.got;
}

struct Matrices {
  const char* row;
  uint32_t* r;
};
template <bool transposed>
void load_matrices(uint32_t (&r)[4], const void* row, const simt::Site& site) {
  simt::touch_shared(row, 16, simt::Access::read, site);
  Matrices arguments{static_cast<const char*>(row), r};
  simt::meet(site, &arguments, [](void* const* lanes) {
    uint32_t of_lane[kWarpSize][4];
    for (int l = 0; l < kWarpSize; ++l)
      for (int m = 0; m < 4; ++m) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int row_of = transposed ? 2 * (l % 4) + i : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + i;
          std::memcpy(&pair[i], static_cast<Matrices*>(lanes[8 * m + row_of])->row + 2 * column, 2);
        }
        of_lane[l][m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
      }
    for (int l = 0; l < kWarpSize; ++l) std::memcpy(static_cast<Matrices*>(lanes[l])->r, of_lane[l], sizeof of_lane[l]);
  });
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

}  // namespace detail

template <class T>
T shuffle(T x, int from, FWP_CALLER) {
  return detail::shuffled(x, from, FWP_AT("shuffle"));
}
template <class T>
T shuffle_xor(T x, int mask, FWP_CALLER) {
  return detail::shuffled(x, lane() ^ mask, FWP_AT("shuffle_xor"));
}
inline void load_matrices(uint32_t (&r)[4], const void* row, FWP_CALLER) {
  detail::load_matrices<false>(r, row, FWP_AT("load_matrices"));
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, FWP_CALLER) {
  detail::load_matrices<true>(r, row, FWP_AT("load_matrices_transposed"));
}

inline float to_float(BFloat x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // 2^112 moves the exponent from one bias to the other, for subnormal numbers too.
  uint32_t bits = rest << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  if (rest >= 0x7c00u) bits |= 0x7f800000u;
  bits |= sign;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline BFloat to_bfloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // as cvt does
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline Half to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {0x7fff};                                  // as cvt does
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more
  if (bits < 0x38800000u) {                                                 // below 2^-14: steps of 2^-24
    float magic = 0.5f;                                                     // whose steps are 2^-24
    float y;
    std::memcpy(&y, &bits, 4);
    y += magic;
    std::memcpy(&bits, &y, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13))};
}
inline uint32_t pack_half(float lo, float hi) {
  return to_half(lo).bits | static_cast<uint32_t>(to_half(hi).bits) << 16;
}
inline uint32_t pack_bfloat(float lo, float hi) {
  return to_bfloat(lo).bits | static_cast<uint32_t>(to_bfloat(hi).bits) << 16;
}
inline float unpack_half(uint32_t x, int i) { return to_float(Half{static_cast<uint16_t>(x >> (16 * i))}); }
inline float unpack_bfloat(uint32_t x, int i) { return to_float(BFloat{static_cast<uint16_t>(x >> (16 * i))}); }
inline uint32_t to_tf32(float x) {  // nearest, ties away from zero
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }

namespace detail {

// d[16][8] += a[16][k] b[k][8], one rounding per element. A device rounds its partial sums in an order of its own.
template <int k>
void multiply(void* const* lanes, const float (&a)[16][k], const float (&b)[k][8]) {
  for (int l = 0; l < kWarpSize; ++l) {
    float* const d = static_cast<Mma*>(lanes[l])->d;
    for (int r = 0; r < 4; ++r) {
      double sum = static_cast<double>(d[r]);
      for (int i = 0; i < k; ++i)
        sum += static_cast<double>(a[l / 4 + 8 * (r / 2)][i]) * static_cast<double>(b[i][2 * (l % 4) + r % 2]);
      d[r] = static_cast<float>(sum);
    }
  }
}

template <float unpack(uint32_t, int)>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const simt::Site& site) {
  Mma arguments{d, a, b};
  simt::meet(site, &arguments, [](void* const* lanes) {
    float A[16][16], B[16][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const auto& of = *static_cast<Mma*>(lanes[l]);
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i) A[l / 4 + 8 * (r % 2)][2 * (l % 4) + 8 * (r / 2) + i] = unpack(of.a[r], i);
      for (int r = 0; r < 2; ++r)
        for (int i = 0; i < 2; ++i) B[2 * (l % 4) + 8 * r + i][l / 4] = unpack(of.b[r], i);
    }
    multiply<16>(lanes, A, B);
  });
}

}  // namespace detail

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FWP_CALLER) {
  detail::mma_16<unpack_half>(d, a, b, FWP_AT("mma_f16"));
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FWP_CALLER) {
  detail::mma_16<unpack_bfloat>(d, a, b, FWP_AT("mma_bf16"));
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], FWP_CALLER) {
  detail::Mma arguments{d, a, b};
  simt::meet(FWP_AT("mma_tf32"), &arguments, [](void* const* lanes) {
    const auto number = [](uint32_t bits) {
      bits &= 0xffffe000u;  // the rest is not looked at
      float y;
      std::memcpy(&y, &bits, 4);
      return y;
    };
    float A[16][8], B[8][8];
    for (int l = 0; l < kWarpSize; ++l) {
      const auto& of = *static_cast<detail::Mma*>(lanes[l]);
      for (int r = 0; r < 4; ++r) A[l / 4 + 8 * (r % 2)][l % 4 + 4 * (r / 2)] = number(of.a[r]);
      for (int r = 0; r < 2; ++r) B[l % 4 + 4 * r][l / 4] = number(of.b[r]);
    }
    detail::multiply<8>(lanes, A, B);
  });
}

}  // namespace fwp::cuda
