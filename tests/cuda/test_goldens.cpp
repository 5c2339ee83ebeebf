// What devices made of the primitives (goldens/*.txt) against what the emulator makes of the same operands: bit for
// bit, except that any NaN is a NaN, and that a tensor core sums in an order and with a rounding of its own.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>

#include "goldens.cuh"

using namespace fwp::cuda;
using namespace fwp::cuda::goldens;

namespace {

// A tensor core aligns the terms of a sum to the largest, in two steps or one, and cuts each off no earlier than 23
// bits below it: seventeen terms, one rounding of the result and one between the steps lose less than 2^-18 of the
// largest. Beside that the emulator rounds its result once.
constexpr double kTolerance = 0x1p-18;

struct Largest {
  double deviation = 0;  // of a sum, in units of kTolerance times the largest term
};

double half_of_word(Kind kind, uint32_t word, int i) {
  return static_cast<double>(kind == Kind::f16 ? unpack_half(word, i) : unpack_bfloat(word, i));
}

// The largest of the terms of d[r] of a lane.
template <Kind kind>
double largest_term(const Words& in, int of_lane, int r) {
  const auto word = [&](int lane, int i) { return in[static_cast<size_t>(lane * Product<kind>::in + i)]; };
  const int row = of_lane / 4 + 8 * (r / 2), column = 2 * (of_lane % 4) + r % 2;
  double largest = std::abs(static_cast<double>(number(word(of_lane, 6 + r))));
  for (int k = 0; k < (kind == Kind::f32 ? 8 : 16); ++k) {
    double a, b;
    if constexpr (kind == Kind::f32) {
      a = static_cast<double>(number(word(4 * (row % 8) + k % 4, row / 8 + 2 * (k / 4))));
      b = static_cast<double>(number(word(4 * column + k % 4, 4 + k / 4)));
    } else {
      a = half_of_word(kind, word(4 * (row % 8) + k % 8 / 2, row / 8 + 2 * (k / 8)), k % 2);
      b = half_of_word(kind, word(4 * column + k % 8 / 2, 4 + k / 8), k % 2);
    }
    largest = std::max(largest, std::abs(a * b));
  }
  return largest;
}

bool same_number(uint32_t x, uint32_t y) { return x == y || (std::isnan(number(x)) && std::isnan(number(y))); }

template <class Primitive>
bool agree(Primitive, const Words&, size_t i, uint32_t recorded, uint32_t emulated, Largest&) {
  const Kind kind = Primitive::result(static_cast<int>(i) % Primitive::out);
  return kind == Kind::f32 ? same_number(recorded, emulated) : recorded == emulated;
}
template <Kind kind>
bool agree(Product<kind>, const Words& in, size_t i, uint32_t recorded, uint32_t emulated, Largest& largest) {
  const double x = static_cast<double>(number(recorded)), y = static_cast<double>(number(emulated));
  if (!std::isfinite(x) || !std::isfinite(y)) return same_number(recorded, emulated);
  const double unit = kTolerance * largest_term<kind>(in, static_cast<int>(i) / 4, static_cast<int>(i) % 4);
  const double deviation = x == y ? 0 : std::abs(x - y) / (unit + 0x1p-140);
  largest.deviation = std::max(largest.deviation, deviation);
  return deviation <= 1;
}

struct Replay {
  int warps = 0;
  std::vector<std::string> differences;
  Largest largest;
};

Replay replay(std::istream& file) {
  Replay result;
  std::string line, name, word;
  while (std::getline(file, line)) {
    std::istringstream words(line);
    if (!(words >> name) || name[0] == '#') continue;
    Words in, out;
    bool after = false;
    while (words >> word) {
      if (word == "=") {
        after = true;
      } else {
        (after ? out : in).push_back(static_cast<uint32_t>(std::stoul(word, nullptr, 16)));
      }
    }
    bool known = false;
    each_primitive([&](const char* candidate, auto primitive) {
      using Primitive = decltype(primitive);
      if (name != candidate) return;
      known = true;
      if (in.size() != size_t{Primitive::in} * kWarpSize || out.size() != size_t{Primitive::out} * kWarpSize) {
        result.differences.push_back(name + ": a line of another length");
        return;
      }
      const Words emulated = answers<Primitive>(candidate, in);
      for (size_t i = 0; i < out.size(); ++i) {
        if (agree(primitive, in, i, out[i], emulated[i], result.largest)) continue;
        std::ostringstream text;
        text << name << ", lane " << i / Primitive::out << ", word " << i % Primitive::out << std::hex << ": recorded "
             << out[i] << ", emulated " << emulated[i];
        result.differences.push_back(text.str());
      }
    });
    if (!known) result.differences.push_back(name + ": no such primitive");
    ++result.warps;
  }
  return result;
}

std::string own_recording() {
  std::ostringstream file;
  file << "# the emulator\n";
  record(file);
  return file.str();
}

Replay replay(const std::string& text) {
  std::istringstream file(text);
  return replay(file);
}

}  // namespace

TEST_CASE("what devices recorded") {
  int files = 0;
  if (std::filesystem::is_directory(FWP_GOLDENS))
    for (const auto& entry : std::filesystem::directory_iterator(FWP_GOLDENS)) {
      if (entry.path().extension() != ".txt") continue;
      ++files;
      CAPTURE(entry.path().filename().string());
      std::ifstream file(entry.path());
      const Replay result = replay(file);
      CHECK(result.warps > 0);
      for (size_t i = 0; i < result.differences.size() && i < 20; ++i) FAIL_CHECK(result.differences[i]);
      MESSAGE(entry.path().filename().string() << ": " << result.warps << " warps, largest deviation of a sum "
                                               << result.largest.deviation << " of what is tolerated");
    }
  if (files == 0) MESSAGE("no recordings of devices yet, in " << FWP_GOLDENS);
}

TEST_CASE("what the emulator recorded is what it makes again") {
  const std::string text = own_recording();
  const Replay result = replay(text);
  int primitives = 0;
  each_primitive([&](const char*, auto) { ++primitives; });
  CHECK(result.warps == primitives * kCases);
  CHECK(result.differences == std::vector<std::string>{});
  CHECK(result.largest.deviation == 0);
}

TEST_CASE("operands are of every size, and finite but for the last case") {
  each_primitive([](const char* name, auto primitive) {
    using Primitive = decltype(primitive);
    if (Primitive::result(0) != Kind::f32 || Primitive::operand(0) == Kind::bits) return;
    CAPTURE(name);
    const Words out = answers<Primitive>(name, random_operands<Primitive>());
    const size_t of_case = out.size() / kCases;
    for (size_t i = 0; i < out.size() - of_case; ++i) REQUIRE(std::isfinite(number(out[i])));
    CHECK(std::any_of(out.end() - static_cast<std::ptrdiff_t>(of_case), out.end(),
                      [](uint32_t x) { return std::isnan(number(x)); }));
  });
}

TEST_CASE("a recording that differs is seen, whichever primitive it is of") {
  const std::string text = own_recording();
  each_primitive([&](const char* name, auto) {
    CAPTURE(name);
    std::string changed = text;
    const size_t line = changed.find(std::string("\n") + name + ' '), equals = changed.find('=', line);
    char& digit = changed[equals + 2];  // of the first word: the highest bits
    digit = digit == '1' ? '2' : '1';
    const Replay result = replay(changed);
    REQUIRE(result.differences.size() == 1);
    CHECK(result.differences[0].rfind(std::string(name) + ", lane 0, word 0: recorded", 0) == 0);
  });
  CHECK(replay("mma_f8 1 = 2\n").differences == std::vector<std::string>{"mma_f8: no such primitive"});
  CHECK(replay("widen 1 = 2\n").differences == std::vector<std::string>{"widen: a line of another length"});
}

TEST_CASE("sums may differ by what a tensor core's rounding explains, and not by more") {
  Words in(10 * kWarpSize, 0x3c003c00u);  // halves of 1, d as well: 16 + 0.0078
  const uint32_t exact = bits(16.0f + number(in[6]));
  Largest largest;
  CHECK(largest_term<Kind::f16>(in, 5, 3) == 1);
  CHECK(agree(Product<Kind::f16>(), in, 0, exact, exact + 2, largest));  // 2 * 2^-19
  CHECK(largest.deviation == 1);
  CHECK_FALSE(agree(Product<Kind::f16>(), in, 0, exact, exact + 3, largest));
  CHECK(agree(Product<Kind::f16>(), in, 0, 0x7fc00000u, 0x7fffffffu, largest));
  CHECK_FALSE(agree(Product<Kind::f16>(), in, 0, 0x7f800000u, exact, largest));
}
