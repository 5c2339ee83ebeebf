// Packs and tiles of one instruction set level, against plain loops. Compiled once per level.
#include <doctest/doctest.h>

#include FWP_PACK

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/tiles.hpp"

namespace fwp {
namespace {

std::mt19937 engine(31);

// Random numbers on a 64-byte boundary.
template <class T>
class Aligned {
 public:
  explicit Aligned(int64_t n) : memory_(static_cast<size_t>(n) + 64 / sizeof(T)) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    data_ = memory_.data() + (64 - address % 64) % 64 / sizeof(T);
    std::uniform_real_distribution<T> draw(-1, 1);
    for (T& x : memory_) x = draw(engine);
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;

  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  std::vector<T> memory_;
  T* data_;
};

template <class T>
constexpr double kEpsilon = std::numeric_limits<T>::epsilon();

TEST_CASE_TEMPLATE("a pack fills a register", T, float, double) {
  CHECK(sizeof(Pack<T>) == kVectorBytes);
  CHECK(kLanes<T> * sizeof(T) == kVectorBytes);
}

TEST_CASE_TEMPLATE("loads and stores move every lane, from any address", T, float, double) {
  constexpr int W = kLanes<T>;
  Aligned<T> from(2 * W), to(2 * W);
  for (int shift = 0; shift < W; ++shift) {
    store_unaligned(to.get() + shift, load_unaligned(from.get() + shift));
    for (int i = 0; i < W; ++i) CHECK(to[shift + i] == from[shift + i]);
  }
  store(to.get(), load(from.get() + W));
  for (int i = 0; i < W; ++i) CHECK(to[i] == from[W + i]);
}

TEST_CASE_TEMPLATE("broadcast keeps the sign of zero, infinity and NaN", T, float, double) {
  const T infinity = std::numeric_limits<T>::infinity();
  for (T x : {T(1.5), T(0), -T(0), infinity, -infinity}) {
    const Pack<T> pack = broadcast(x);
    for (int i = 0; i < kLanes<T>; ++i) {
      CHECK(pack[i] == x);
      CHECK(std::signbit(pack[i]) == std::signbit(x));
    }
  }
  CHECK(std::isnan(broadcast(std::numeric_limits<T>::quiet_NaN())[0]));
}

TEST_CASE_TEMPLATE("lane i of the transposed reduction is the sum of pack i", T, float, double) {
  constexpr int W = kLanes<T>;
  Aligned<T> numbers(W * W);
  Pack<T> packs[W];
  for (int i = 0; i < W; ++i) packs[i] = load(numbers.get() + i * W);
  const Pack<T> sums = sum_each<T>(packs);
  for (int i = 0; i < W; ++i) {
    double expected = 0;
    for (int l = 0; l < W; ++l) expected += numbers[i * W + l];
    CHECK(std::abs(sums[i] - expected) <= 8 * kEpsilon<T>);
  }
}

TEST_CASE_TEMPLATE("exp is within two units in the last place", T, float, double) {
  constexpr int W = kLanes<T>;
  const double lowest = std::log(static_cast<double>(std::numeric_limits<T>::min()));
  const double highest = std::log(static_cast<double>(std::numeric_limits<T>::max()));
  std::uniform_real_distribution<double> draw(lowest, highest);
  double worst = 0;
  for (int round = 0; round < 20000; ++round) {
    Pack<T> x;
    for (int i = 0; i < W; ++i) x[i] = static_cast<T>(draw(engine) * (round % 2 ? 1 : 0.01));
    const Pack<T> y = fwp::exp<T>(x);
    for (int i = 0; i < W; ++i) {
      const long double expected = std::exp(static_cast<long double>(x[i]));
      worst = std::max(worst, static_cast<double>(std::abs(y[i] - expected) / expected) / kEpsilon<T>);
    }
  }
  CHECK(worst <= 2);
}

TEST_CASE_TEMPLATE("exp at the ends", T, float, double) {
  const T infinity = std::numeric_limits<T>::infinity();
  const auto exp = [](T x) { return fwp::exp<T>(broadcast(x))[0]; };
  CHECK(exp(0) == 1);
  CHECK(exp(-0.0) == 1);
  CHECK(exp(-infinity) == 0);
  CHECK(exp(-std::numeric_limits<T>::max()) == 0);
  CHECK(exp(infinity) == infinity);
  CHECK(exp(std::numeric_limits<T>::max()) == infinity);
  CHECK(std::isnan(exp(std::numeric_limits<T>::quiet_NaN())));
  const T tiny = std::log(std::numeric_limits<T>::denorm_min()) / 2 + std::log(std::numeric_limits<T>::min()) / 2;
  CHECK(exp(tiny) > 0);  // a subnormal number
  CHECK(exp(tiny) < std::numeric_limits<T>::min());
}

// A tile of a state with K keys, and rows for it.
template <class T>
struct Strip {
  static constexpr int kRows = 12, kColumns = Tiles<T>::kColumns;
  int64_t K, ld;  // ld: K in whole packs
  Aligned<T> S, rows, columns, decay, out;

  explicit Strip(int64_t keys)
      : K(keys),
        ld((keys + kLanes<T> - 1) / kLanes<T> * kLanes<T>),
        S(ld * kColumns),
        rows(kRows * ld),
        columns(kRows * kColumns),
        decay(ld),
        out(ld + kRows * kColumns) {}
};

template <class T, int R>
void check_read(Strip<T>& x) {
  Tiles<T>::template read<R>(x.rows.get(), x.ld, x.K, x.S.get(), x.out.get());
  double worst = 0;
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < x.kColumns; ++j) {
      double expected = 0;
      for (int64_t d = 0; d < x.K; ++d) expected += double(x.rows[r * x.ld + d]) * double(x.S[d * x.kColumns + j]);
      worst = std::max(worst, std::abs(expected - double(x.out[r * x.kColumns + j])));
    }
  CHECK(worst <= static_cast<double>(x.K + 1) * kEpsilon<T>);
}

// A row's result must not depend on the rows beside it: this is what makes block size a matter of speed only.
template <class T, int R>
void check_rows_are_independent(Strip<T>& x) {
  Aligned<T> alone(x.kColumns);
  Tiles<T>::template read<R>(x.rows.get(), x.ld, x.K, x.S.get(), x.out.get());
  for (int r = 0; r < R; ++r) {
    Tiles<T>::template read<1>(x.rows.get() + r * x.ld, x.ld, x.K, x.S.get(), alone.get());
    for (int j = 0; j < x.kColumns; ++j) CHECK(alone[j] == x.out[r * x.kColumns + j]);
  }
}

template <class T, int R, bool decays>
void check_write(Strip<T>& x) {
  Aligned<T> after(x.ld * x.kColumns);
  Tiles<T>::template write<R, decays>(x.rows.get(), x.ld, x.K, x.decay.get(), x.columns.get(), x.S.get(), after.get());
  double worst = 0;
  for (int64_t d = 0; d < x.K; ++d)
    for (int j = 0; j < x.kColumns; ++j) {
      double expected = double(x.S[d * x.kColumns + j]) * (decays ? double(x.decay[d]) : 1);
      for (int r = 0; r < R; ++r) expected += double(x.rows[r * x.ld + d]) * double(x.columns[r * x.kColumns + j]);
      worst = std::max(worst, std::abs(expected - double(after[d * x.kColumns + j])));
    }
  CHECK(worst <= (R + 2) * kEpsilon<T>);
}

TEST_CASE_TEMPLATE("tiles multiply matrices", T, float, double) {
  for (int64_t K : {1, 3, 16, 65}) {
    Strip<T> strip(K);
    check_read<T, 1>(strip);
    check_read<T, 6>(strip);
    check_read<T, 12>(strip);
    check_rows_are_independent<T, 12>(strip);
    check_write<T, 1, false>(strip);
    check_write<T, 6, false>(strip);
    check_write<T, 6, true>(strip);
  }
}

TEST_CASE_TEMPLATE("a tile inside a state gives the same bits, at any address", T, float, double) {
  constexpr int R = 4;
  Strip<T> x(21);
  const int64_t columns = x.kColumns, stride = 2 * columns + 3;
  for (int shift = 0; shift < kLanes<T>; ++shift) {
    for (int64_t step : {stride, -stride}) {
      Aligned<T> state(x.K * stride + kLanes<T>), after(x.ld * columns), read(R * columns);
      T* const first = state.get() + shift + (step < 0 ? (x.K - 1) * stride : 0);
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t j = 0; j < columns; ++j) first[d * step + j] = x.S[d * columns + j];

      Tiles<T>::template read<R>(x.rows.get(), x.ld, x.K, x.S.get(), x.out.get());
      Tiles<T>::template read<R>(x.rows.get(), x.ld, x.K, first, read.get(), step);
      for (int64_t i = 0; i < R * columns; ++i) CHECK(read[i] == x.out[i]);

      Tiles<T>::template write<R, true>(x.rows.get(), x.ld, x.K, x.decay.get(), x.columns.get(), x.S.get(),
                                        after.get());
      std::vector<T> gaps(state.get(), state.get() + x.K * stride + kLanes<T>);
      Tiles<T>::template write<R, true>(x.rows.get(), x.ld, x.K, x.decay.get(), x.columns.get(), first, first, step);
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t j = 0; j < columns; ++j) {
          CHECK(first[d * step + j] == after[d * columns + j]);
          gaps[static_cast<size_t>(first + d * step + j - state.get())] = after[d * columns + j];
        }
      for (size_t i = 0; i < gaps.size(); ++i) CHECK(state[static_cast<int64_t>(i)] == gaps[i]);
    }
  }
}

TEST_CASE_TEMPLATE("writing a few rows is writing them one after the other", T, float, double) {
  constexpr int C = 6;
  for (int n = 1; n <= C; ++n) {
    Strip<T> x(20);
    Aligned<T> expected(x.ld * x.kColumns);
    for (int64_t i = 0; i < x.ld * x.kColumns; ++i) expected[i] = x.S[i];
    for (int r = 0; r < n; ++r) {
      const T* row = x.rows.get() + r * x.ld;
      const T* columns = x.columns.get() + r * x.kColumns;
      T* S = expected.get();
      if (r == 0)
        Tiles<T>::template write<1, true>(row, x.ld, x.K, x.decay.get(), columns, S, S);
      else
        Tiles<T>::template write<1, false>(row, x.ld, x.K, nullptr, columns, S, S);
    }
    T* S = x.S.get();
    Tiles<T>::template write_some<C, true>(n, x.rows.get(), x.ld, x.K, x.decay.get(), x.columns.get(), S, S);
    for (int64_t i = 0; i < x.K * x.kColumns; ++i) CHECK(x.S[i] == expected[i]);
  }
}

TEST_CASE_TEMPLATE("sums over value columns", T, float, double) {
  Strip<T> x(2 * kLanes<T>);
  Aligned<T> D(x.ld * x.kColumns);
  Tiles<T>::read_columns(x.S.get(), x.ld, x.columns.get(), x.out.get());
  Aligned<T> dots(x.ld);
  Tiles<T>::dot_rows(x.S.get(), D.get(), x.ld, dots.get());
  for (int64_t d = 0; d < x.ld; ++d) {
    double read = 0, dot = 0;
    for (int j = 0; j < x.kColumns; ++j) {
      read += double(x.S[d * x.kColumns + j]) * double(x.columns[j]);
      dot += double(x.S[d * x.kColumns + j]) * double(D[d * x.kColumns + j]);
    }
    CHECK(std::abs(read - double(x.out[d])) <= x.kColumns * kEpsilon<T>);
    CHECK(std::abs(dot - double(dots[d])) <= x.kColumns * kEpsilon<T>);
  }
}

}  // namespace
}  // namespace fwp
