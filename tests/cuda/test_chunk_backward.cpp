// The chunk form backward under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <cstdlib>
#include <functional>
#include <string>

#include "chunk/chunk.hpp"
#include "problems.hpp"

using namespace problems;

namespace {

using Left = std::vector<int32_t>;

// Runs the backward of a case; returns which heads it has left.
Left run(Case& x, int64_t window = 0, const std::function<void(Problem&)>& change = {}) {
  Problem p = x.problem();
  if (change) change(p);
  const size_t bytes = fwp::cuda::chunk::backward_workspace(p, window);
  Array workspace(DType::f32, static_cast<int64_t>(bytes / 4));
  Left left(static_cast<size_t>(x.N * x.H), -1);
  fwp::cuda::Queue queue =
      x.queue({{workspace.data(), bytes, true}, {left.data(), left.size() * sizeof(int32_t), true}});
  fwp::cuda::chunk::backward(p, workspace.data(), left.data(), queue, window);
  return left;
}

const Left& none_of(const Case& x) {
  static Left none;
  return none = Left(static_cast<size_t>(x.N * x.H), 0);
}

using Gradients = std::vector<Tensor Case::*>;
const Gradients kGradients = {&Case::dq, &Case::dk, &Case::dv, &Case::dbeta, &Case::dg, &Case::dh0};

// Halves are rounded once, to 1.7e-3 as bfloat16; the rest is float16 operands.
double tolerance(const Tensor& x) { return x.array.dtype() == DType::bf16 ? 2.5e-3 : 9e-4; }

void check(const Case& x, double factor = 1) {
  const Expected y = expected(x, true);
  const std::vector<const Tensor*> want = {&y.dq, &y.dk, &y.dv, &y.dbeta, &y.dg, &y.dh0};
  static const char* const names[] = {"dq", "dk", "dv", "dbeta", "dg", "dh0"};
  for (size_t i = 0; i < want.size(); ++i) {
    const Tensor& got = x.*kGradients[i];
    CAPTURE(names[i]);
    const double e = error(got, *want[i]);
    if (std::getenv("SHOW")) MESSAGE(names[i], " ", e);
    CHECK(e <= factor * tolerance(got));
  }
}

std::string text(const Options& is) {
  return std::to_string(static_cast<int>(is.rule)) + std::to_string(static_cast<int>(is.decay)) + " T " +
         std::to_string(is.T) + " K " + std::to_string(is.K) + " V " + std::to_string(is.V);
}

// Both rules, gated and not.
void for_rules(Options options, const std::function<void(const Options&)>& f) {
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const Decay decay : {Decay::none, Decay::scalar}) {
      options.rule = rule;
      options.decay = decay;
      CAPTURE(text(options));
      f(options);
    }
}

Options small() {
  Options options;
  options.dtype = DType::bf16;
  options.N = options.H = 1;
  options.T = 70;
  options.wide_gates = true;
  return options;
}

}  // namespace

TEST_CASE("gradients are those of the recurrence, of any size") {
  struct Size {
    int64_t T, K, V;
  };
  for (const Size& size :
       {Size{20, 3, 1}, {70, 16, 16}, {64, 31, 70}, {130, 64, 64}, {70, 100, 31}, {65, 128, 128}, {66, 40, 200}}) {
    Options options = small();
    options.T = size.T;
    options.K = size.K;
    options.V = size.V;
    options.wide_keys = size.K % 2 == 0;
    for_rules(options, [](const Options& is) {
      Case x(is);
      CHECK(run(x) == none_of(x));
      check(x);
    });
  }
}

TEST_CASE("gates of any strength, growth and resets") {
  const std::vector<std::vector<double>> gates = {
      {0}, {-0.1}, {-5}, {-20}, {-60}, {-1e4}, {-kInfinity}, {0.05}, {0, -20, -0.1, -kInfinity, -5, -100, -1, 0.3}};
  for (const auto& gate : gates)
    for (const Rule rule : {Rule::linear, Rule::delta}) {
      Options options = small();
      options.rule = rule;
      options.decay = Decay::scalar;
      Case x(options);
      for (int64_t t = 0; t < x.T; ++t) x.g.set(0, t, 0, 0, gate[static_cast<size_t>(t) % gate.size()]);
      CAPTURE(text(options));
      CAPTURE(gate[0]);
      CHECK(run(x) == none_of(x));
      check(x);
      const Expected y = expected(x, true);
      double worst = 0, worst_own = 0;
      for (int64_t t = 0; t < x.T; ++t) {
        double scale = 0;
        for (int64_t i = 0; i < x.K; ++i)
          scale += std::abs(x.q.get(0, t, 0, i) * y.dq.get(0, t, 0, i)) +
                   std::abs(x.k.get(0, t, 0, i) * y.dk.get(0, t, 0, i));
        const double want = y.dg.get(0, t, 0), got = x.dg.get(0, t, 0), off = std::abs(got - want);
        worst = std::max(worst, off / scale);
        if (want != 0) worst_own = std::max(worst_own, off / std::abs(want));
      }
      if (std::getenv("SHOW")) MESSAGE("dg worst to scale ", worst, " to itself ", worst_own);
    }
}

TEST_CASE("numbers of any range") {
  for (const double keys : {1e-3, 1.0, 30.0})
    for (const double values : {1e-3, 1e3})
      for (const double adjoints : {1e-8, 1e4})
        for (const Rule rule : {Rule::linear, Rule::delta}) {
          Options options = small();
          options.rule = rule;
          options.decay = Decay::scalar;
          options.scale = 0.3;
          Case x(options);
          const auto scale = [](Tensor& of, double factor) {
            for (int64_t i = 0; i < of.array.count(); ++i) of.array.set(i, factor * of.array.get(i));
          };
          if (keys > 1 && rule == Rule::delta) continue;
          scale(x.k, keys);
          scale(x.q, 1 / keys);
          scale(x.v, values);
          scale(x.d_o, adjoints);
          scale(x.h0, values);
          scale(x.d_hT, adjoints);
          CAPTURE(keys);
          CAPTURE(values);
          CAPTURE(adjoints);
          CAPTURE(text(options));
          CHECK(run(x) == none_of(x));
          check(x);
        }
}
