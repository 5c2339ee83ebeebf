// What primitives make of random operands, bit for bit, as lines of text: recorded on a device (record_goldens.cu),
// replayed under the emulator (test_goldens.cpp).
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <istream>
#include <ostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "launch.hpp"

namespace fwp::cuda::goldens {

using Words = std::vector<uint32_t>;

FWP_DEVICE float number(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
FWP_DEVICE uint32_t bits(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
template <int n>
FWP_DEVICE void load(uint32_t (&to)[n], const uint32_t* from) {
  for (int i = 0; i < n; ++i) to[i] = load_global(from + i);
}
template <int n>
FWP_DEVICE void store(uint32_t* to, const uint32_t (&from)[n]) {
  for (int i = 0; i < n; ++i) store_global(to + i, from[i]);
}

// Each primitive takes `in` words of a lane to `out` words. What the words are: bits, or numbers of random size.
enum class Kind { bits, f16, bf16, f32 };

template <Kind kind>
struct Product {  // a, b, d -> d
  static constexpr int in = 10, out = 4;
  static constexpr Kind operand(int word) { return word < 6 ? kind : Kind::f32; }
  static constexpr Kind result(int) { return Kind::f32; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    uint32_t a[4], b[2], words[4];
    load(a, x);
    load(b, x + 4);
    load(words, x + 6);
    float d[4] = {number(words[0]), number(words[1]), number(words[2]), number(words[3])};
    if constexpr (kind == Kind::f16) mma_f16(d, a, b);
    if constexpr (kind == Kind::bf16) mma_bf16(d, a, b);
    if constexpr (kind == Kind::f32) mma_tf32(d, a, b);
    for (int i = 0; i < 4; ++i) words[i] = bits(d[i]);
    store(y, words);
  }
};

template <bool transposed>
struct Matrices {  // a row, whose row to name -> a fragment
  static constexpr int in = 5, out = 4;
  static constexpr Kind operand(int) { return Kind::bits; }
  static constexpr Kind result(int) { return Kind::bits; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    auto* const rows = static_cast<Quad*>(shared_memory());
    Quad row;
    load(row.x, x);
    store_shared(rows + lane(), row);
    sync_warp();
    const Quad* const named = rows + load_global(x + 4) % kWarpSize;
    uint32_t r[4];
    if constexpr (transposed) {
      load_matrices_transposed(r, named);
    } else {
      load_matrices(r, named);
    }
    store(y, r);
  }
};

struct Copies {  // sixteen bytes, how many of them count -> sixteen bytes, and the first 8 and 4 of them
  static constexpr int in = 8, out = 7;
  static constexpr Kind operand(int) { return Kind::bits; }
  static constexpr Kind result(int) { return Kind::bits; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    uint32_t* const mine = static_cast<uint32_t*>(shared_memory()) + 8 * lane();
    const auto valid = [x](int bytes) { return static_cast<int>(load_global(x + 4) % (1u + bytes)); };
    copy_async<16>(mine, x, valid(16));
    copy_async<8>(mine + 4, x, valid(8));
    copy_async<4>(mine + 6, x, valid(4));
    commit_copies();
    wait_copies<0>();
    for (int i = 0; i < out; ++i) store_global(y + i, load_shared(mine + i));
  }
};

struct Shuffles {  // a word, two words, from where
  static constexpr int in = 4, out = 6;
  static constexpr Kind operand(int) { return Kind::bits; }
  static constexpr Kind result(int) { return Kind::bits; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    uint32_t w[4];
    load(w, x);
    const int from = static_cast<int>(w[3] % kWarpSize);
    const long long wide = static_cast<long long>(static_cast<uint64_t>(w[2]) << 32 | w[1]);
    const auto a = static_cast<uint64_t>(shuffle(wide, from)), b = static_cast<uint64_t>(shuffle_xor(wide, from));
    const uint32_t all[out] = {shuffle(w[0], from),      shuffle_xor(w[0], from),
                               static_cast<uint32_t>(a), static_cast<uint32_t>(a >> 32),
                               static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32)};
    store(y, all);
  }
};

template <Kind kind>
struct Roundings {  // two numbers -> each form of them
  static constexpr int in = 2, out = 5;
  static constexpr Kind operand(int) { return kind; }
  static constexpr Kind result(int word) { return word == 4 ? Kind::f32 : Kind::bits; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    uint32_t w[2];
    load(w, x);
    const float lo = number(w[0]), hi = number(w[1]);
    const uint32_t all[out] = {to_half(lo).bits, to_bfloat(lo).bits, pack_half(lo, hi), pack_bfloat(lo, hi),
                               to_tf32(lo)};
    store(y, all);
  }
};

struct Widenings {  // two halves
  static constexpr int in = 1, out = 6;
  static constexpr Kind operand(int) { return Kind::bits; }
  static constexpr Kind result(int) { return Kind::f32; }
  FWP_DEVICE static void run(const uint32_t* x, uint32_t* y) {
    const uint32_t w = load_global(x);
    const auto lo = static_cast<uint16_t>(w);
    const uint32_t all[out] = {bits(to_float(Half{lo})),   bits(unpack_half(w, 0)),   bits(unpack_half(w, 1)),
                               bits(to_float(BFloat{lo})), bits(unpack_bfloat(w, 0)), bits(unpack_bfloat(w, 1))};
    store(y, all);
  }
};

template <class Primitive>
FWP_KERNEL void golden(const uint32_t* in, uint32_t* out) {
  const auto i = static_cast<int64_t>(block_index_x()) * kWarpSize + lane();
  Primitive::run(in + i * Primitive::in, out + i * Primitive::out);
}

// Calls f(name, primitive) for each.
template <class F>
void each_primitive(const F& f) {
  f("mma_f16", Product<Kind::f16>());
  f("mma_bf16", Product<Kind::bf16>());
  f("mma_tf32", Product<Kind::f32>());
  f("load_matrices", Matrices<false>());
  f("load_matrices_transposed", Matrices<true>());
  f("copy_async", Copies());
  f("shuffle", Shuffles());
  f("round_numbers", Roundings<Kind::f32>());
  f("round_bits", Roundings<Kind::bits>());
  f("widen", Widenings());
}

// An array where kernels see it.
class Shared {
 public:
  explicit Shared(const Words& words) : words_(words) {
#ifdef __CUDACC__
    check(cudaMalloc(&data_, bytes()));
    check(cudaMemcpy(data_, words_.data(), bytes(), cudaMemcpyHostToDevice));
#else
    data_ = words_.data();
#endif
  }
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;
#ifdef __CUDACC__
  ~Shared() { cudaFree(data_); }
#endif

  uint32_t* data() const { return data_; }
  size_t bytes() const { return 4 * words_.size(); }
  Words words() {  // after the kernels before
#ifdef __CUDACC__
    check(cudaMemcpy(words_.data(), data_, bytes(), cudaMemcpyDeviceToHost));
#endif
    return words_;
  }

 private:
#ifdef __CUDACC__
  static void check(cudaError_t status) {
    if (status != cudaSuccess) throw Error(cudaGetErrorString(status));
  }
#endif
  Words words_;
  uint32_t* data_ = nullptr;
};

template <class Primitive>
Words answers(const char* name, const Words& operands) {
  const size_t lanes = operands.size() / Primitive::in;
  Shared in(operands), out(Words(lanes * Primitive::out, 0xdeadbeefu));
  Queue queue(nullptr, "goldens", {{in.data(), in.bytes(), false}, {out.data(), out.bytes(), true}});
  queue.run(name, golden<Primitive>, Grid{static_cast<unsigned>(lanes) / kWarpSize}, kWarpSize, 32 * kWarpSize,
            in.data(), out.data());
  return out.words();
}

// Operands, made on the host.

constexpr int kCases = 8;  // warps of operands for each primitive

// The bits of a number between 2^-binades and 2^binades; of sixteen bits or, with the mantissa of a float, 32.
inline uint32_t random_number(std::mt19937& rng, int exponent_bits, int mantissa_bits, int binades) {
  const int bias = (1 << (exponent_bits - 1)) - 1, most = std::min(binades, bias - 1);
  const auto exponent = static_cast<uint32_t>(bias + std::uniform_int_distribution<int>(-most, most - 1)(rng));
  const auto any = static_cast<uint32_t>(rng());
  const uint32_t mantissa = any & ((1u << mantissa_bits) - 1);
  return (any >> 31 << exponent_bits | exponent) << mantissa_bits | mantissa;
}

// Bits that round: halfway between neighbours of each kind or one beside it, ends of their ranges, or any.
inline uint32_t random_bits(std::mt19937& rng) {
  constexpr std::array<uint32_t, 16> ends = {0x00000000, 0x80000000, 0x7f800000, 0xff800000, 0x7fc00001, 0xff812345,
                                             0x477fe000, 0x477fefff, 0x477ff000, 0x477fffff, 0x7f7fffff, 0x7f7f8000,
                                             0x33000000, 0x33000001, 0x00000001, 0x387fffff};
  const auto any = static_cast<uint32_t>(rng()), beside = static_cast<uint32_t>(rng() % 3) - 1;
  switch (rng() % 6) {
    case 0:
      return ends[any % ends.size()];
    case 1:  // of tf32, and of halves from 2^-14
      return ((any & 0x807fe000u) | static_cast<uint32_t>(113 + rng() % 30) << 23 | 0x1000u) + beside;
    case 2:
      return ((any & 0xffff0000u) | 0x8000u) + beside;  // of bfloat16
    case 3: {                                           // of halves below 2^-14, whose steps are 2^-24
      const float halfway = std::ldexp(static_cast<float>(2 * (any % 1024) + 1), -25);
      uint32_t halfway_bits;
      std::memcpy(&halfway_bits, &halfway, 4);
      return (halfway_bits | (any & 0x80000000u)) + beside;
    }
    default:
      return any;
  }
}

inline uint32_t random_word(Kind kind, std::mt19937& rng, int which) {
  constexpr std::array<int, kCases> binades_of = {1, 1, 1, 4, 4, 12, 12, 0};
  const int binades = binades_of[static_cast<size_t>(which)];
  if (binades == 0) return random_bits(rng);
  switch (kind) {
    case Kind::f16: {
      const uint32_t lo = random_number(rng, 5, 10, binades);
      return random_number(rng, 5, 10, binades) << 16 | lo;
    }
    case Kind::bf16: {
      const uint32_t lo = random_number(rng, 8, 7, binades);
      return random_number(rng, 8, 7, binades) << 16 | lo;
    }
    case Kind::f32:
      return random_number(rng, 8, 23, binades);
    default:
      return random_bits(rng);
  }
}

template <class Primitive>
Words random_operands() {
  std::mt19937 rng(1);
  Words words;
  for (int i = 0; i < kCases * kWarpSize; ++i)
    for (int word = 0; word < Primitive::in; ++word)
      words.push_back(random_word(Primitive::operand(word), rng, i / kWarpSize));
  return words;
}

// The file: a line per warp, its name, its operands, "=" and what came out; lines with # are for people.

inline void record(std::ostream& file) {
  file << std::hex;
  each_primitive([&](const char* name, auto primitive) {
    using Primitive = decltype(primitive);
    const Words in = random_operands<Primitive>(), out = answers<Primitive>(name, in);
    for (size_t i = 0; i < kCases; ++i) {
      const auto write = [&](const Words& words, size_t of_lane) {
        for (size_t j = 0; j < of_lane * kWarpSize; ++j) file << ' ' << words[i * of_lane * kWarpSize + j];
      };
      file << name;
      write(in, Primitive::in);
      file << " =";
      write(out, Primitive::out);
      file << '\n';
    }
  });
}

}  // namespace fwp::cuda::goldens
