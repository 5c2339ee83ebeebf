// Every block size gives what the recurrence gives: the scans of cpp/scan themselves, forward and backward, with blocks
// of 1, 3, 4 and 16 tokens, on inputs that are hard for a block: correlated keys, writes at the edge of stability,
// strong gates.
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "cpu/pack_base.hpp"
//
#include "cpu/tiles.hpp"
//
#include "reference.hpp"
#include "scan/backward.hpp"

namespace {

using reference::Array;
using reference::Inputs;
using reference::Outputs;
using Tile = fwp::Tiles<double>;

constexpr int64_t kTokens = 61, kHeads = 2, kKeys = 7, kValues = 5;  // two tiles, the second not full

// Scratch for one call, aligned as the library's is, and full of NaN.
class Memory {
 public:
  explicit Memory(size_t bytes) : numbers_(bytes / sizeof(double) + 16, std::numeric_limits<double>::quiet_NaN()) {}
  void* base() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(numbers_.data()) + 63) / 64 * 64); }

 private:
  std::vector<double> numbers_;
};

fwp::Rows rows(Array& x, int64_t n) { return {x.empty() ? nullptr : x.data(), fwp::DType::f64, 0, kHeads * n, n, 1}; }
fwp::States states(Array& x) {
  return {x.empty() ? nullptr : x.data(), kHeads * kKeys * kValues, kKeys * kValues, kValues};
}

struct Scan {
  fwp::Problem p;
  fwp::Geometry g;
  fwp::Stop stop{[](void*) { return false; }, nullptr};

  template <class Rule, class Decay>
  Scan(Rule, Decay, int64_t block, Inputs& x) {
    p.rule = Rule::predicts ? fwp::Rule::delta : fwp::Rule::linear;
    p.decay = !Decay::decays ? fwp::Decay::none : Decay::per_channel ? fwp::Decay::channel : fwp::Decay::scalar;
    p.dtype = fwp::DType::f64;
    p.N = 1;
    p.T = kTokens;
    p.H = kHeads;
    p.K = kKeys;
    p.V = kValues;
    p.q = rows(x.q, kKeys);
    p.k = rows(x.k, kKeys);
    p.v = rows(x.v, kValues);
    p.beta = rows(x.beta, 1);
    p.g = rows(x.g, Decay::per_channel ? kKeys : 1);
    p.h0 = states(x.h0);
    g.block = block;
    g.ld = (kKeys + Tile::kWidth - 1) / Tile::kWidth * Tile::kWidth;
    g.columns = Tile::kColumns;
    g.tiles = (kValues + g.columns - 1) / g.columns;
    g.tile = g.ld * g.columns;
    g.chunk = 2 * block;
    g.segment = 2 * g.chunk;
    g.window = (kTokens + g.segment - 1) / g.segment * g.segment;
    g.together = 1;
  }

  template <class Part>
  Part part() const {
    Part part{};
    part.head_end = kHeads;
    part.tile_end = g.tiles;
    return part;
  }
};

template <int C, class Rule, class Decay>
Outputs forward(Scan& s, Array* checkpoints) {
  Outputs y{Array(kTokens * kHeads * kValues), Array(kHeads * kKeys * kValues)};
  s.p.o = rows(y.o, kValues);
  s.p.hT = states(y.hT);
  *checkpoints = Array(fwp::first_slot(s.p, s.g, 1) * kHeads * s.g.tiles * s.g.tile);
  s.p.checkpoints = checkpoints->data();
  auto part = s.part<fwp::ForwardPart>();
  part.output = true;
  fwp::Arena size(nullptr);
  (void)fwp::ForwardScratch<Tile, Rule, Decay, C>(size, s.p, s.g, kHeads, s.g.tiles);
  Memory scratch(size.used());
  fwp::scan_forward<Tile, Rule, Decay, C>(s.p, s.g, part, scratch.base(), s.stop);
  return y;
}

template <int C, class Rule, class Decay>
Inputs backward(Scan& s, Outputs& dy) {
  const int64_t gates = !Decay::decays ? 0 : Decay::per_channel ? kKeys : 1;
  Inputs d{{1, kTokens, kHeads, kKeys, kValues}, {},
           Array(kTokens * kHeads * kKeys),      Array(kTokens * kHeads * kKeys),
           Array(kTokens * kHeads * kValues),    Array(kTokens * kHeads),
           Array(kTokens * kHeads * gates),      Array(kHeads * kKeys * kValues)};
  s.p.d_o = rows(dy.o, kValues);
  s.p.d_hT = states(dy.hT);
  s.p.dh0 = states(d.h0);
  std::vector<fwp::HeadGradients> gradients;
  for (int64_t h = 0; h < kHeads; ++h) {
    const auto of_head = [h](Array& x, int64_t n) {
      return fwp::GradientRows{x.empty() ? nullptr : x.data() + h * n, kHeads * n, fwp::DType::f64};
    };
    gradients.push_back(
        {of_head(d.q, kKeys), of_head(d.k, kKeys), of_head(d.v, kValues), of_head(d.beta, 1), of_head(d.g, gates)});
  }
  Memory D(static_cast<size_t>(kHeads * s.g.tiles * s.g.tile) * sizeof(double));
  auto part = s.part<fwp::BackwardPart>();
  part.end = kTokens;
  part.D = D.base();
  part.gradients = gradients.data();
  part.next_head = 1;
  fwp::Arena size(nullptr);
  (void)fwp::BackwardScratch<Tile, Rule, Decay, C>(size, s.p, s.g, kHeads);
  Memory scratch(size.used());
  fwp::scan_backward<Tile, Rule, Decay, C>(s.p, s.g, part, scratch.base(), s.stop);
  return d;
}

// Unit keys around one direction (cosine about 0.99), beta up to 2, gates mild, strong (-100) and, if asked for, -inf.
Inputs hard_inputs(reference::Decay decay, bool resets) {
  reference::Random random(31);
  Inputs x = random.inputs({1, kTokens, kHeads, kKeys, kValues}, decay);
  const Array direction = random.normal(kKeys);
  for (int64_t row = 0; row < kTokens * kHeads; ++row) {
    double norm = 0;
    for (int64_t i = 0; i < kKeys; ++i) {
      double& k = x.k[row * kKeys + i];
      k = direction[i] + 0.1 * k;
      norm += k * k;
    }
    for (int64_t i = 0; i < kKeys; ++i) x.k[row * kKeys + i] /= std::sqrt(norm);
    x.beta[row] = 2 * static_cast<double>(row % 9) / 8;
  }
  for (int64_t i = 0; i < x.g.count(); ++i) {
    if (i % 17 == 3) x.g[i] = -100;
    if (resets && i % 23 == 5) x.g[i] = -std::numeric_limits<double>::infinity();
  }
  return x;
}

double relative(const Array& got, const Array& expected) {
  double norm = 0;
  for (int64_t i = 0; i < expected.count(); ++i) norm += expected[i] * expected[i];
  return reference::distance(got, expected) / (std::sqrt(norm) + 1e-300);
}

template <class Rule_, class Decay_>
struct Case {
  using Rule = Rule_;
  using Decay = Decay_;
};

template <int C, class Rule, class Decay>
std::pair<Outputs, Inputs> both(Inputs& x, Outputs& dy) {
  Scan s(Rule(), Decay(), C, x);
  Array checkpoints;
  Outputs y = forward<C, Rule, Decay>(s, &checkpoints);
  return {y, backward<C, Rule, Decay>(s, dy)};
}

constexpr double kTolerance =
    1e-11;  // float64, 61 tokens of an unstable recurrence; blocks and tokens differ by rounding

template <int C, class Rule, class Decay>
void compare(Inputs& x, Outputs& dy, const std::pair<Outputs, Inputs>& expected) {
  CAPTURE(C);
  const auto got = both<C, Rule, Decay>(x, dy);
  CHECK(relative(got.first.o, expected.first.o) < kTolerance);
  CHECK(relative(got.first.hT, expected.first.hT) < kTolerance);
  for (auto d : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::beta, &Inputs::g, &Inputs::h0})
    CHECK(relative(got.second.*d, expected.second.*d) < kTolerance);
}

TEST_CASE_TEMPLATE("every block size is the recurrence", X, Case<Linear, NoDecay>, Case<Linear, ScalarDecay>,
                   Case<Linear, ChannelDecay>, Case<Delta, NoDecay>, Case<Delta, ScalarDecay>,
                   Case<Delta, ChannelDecay>) {
  using Rule = typename X::Rule;
  using Decay = typename X::Decay;
  for (bool resets : {false, true}) {
    CAPTURE(resets);
    const auto decay = !Decay::decays       ? reference::Decay::none
                       : Decay::per_channel ? reference::Decay::channel
                                            : reference::Decay::scalar;
    Inputs x = hard_inputs(decay, resets);
    reference::Random random(37);
    Outputs dy{random.normal(kTokens * kHeads * kValues), random.normal(kHeads * kKeys * kValues)};
    const auto tokens = both<1, Rule, Decay>(x, dy);
    const Outputs expected =
        reference::forward(Rule::predicts ? reference::Rule::delta : reference::Rule::linear, x, 1);
    CHECK(relative(tokens.first.o, expected.o) < kTolerance);
    CHECK(relative(tokens.first.hT, expected.hT) < kTolerance);
    compare<3, Rule, Decay>(x, dy, tokens);
    compare<4, Rule, Decay>(x, dy, tokens);
    compare<16, Rule, Decay>(x, dy, tokens);
  }
}

}  // namespace
