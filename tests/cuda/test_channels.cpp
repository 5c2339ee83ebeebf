// The chunk form with gates of channels and of heads where they are weak or above 0, against the recurrence in double.
#include <doctest/doctest.h>

#include "chunk/chunk.hpp"
#include "problems.hpp"

using namespace problems;
namespace chunk = fwp::cuda::chunk;

namespace {

using Left = std::vector<int32_t>;

// Fills the outputs of a case, or its gradients; returns which heads were given up.
Left run(Case& x, bool backward) {
  const Problem p = x.problem();
  Workspace workspace(backward ? chunk::backward_workspace(p) : chunk::forward_workspace(p));
  Left left(static_cast<size_t>(x.N * x.H), -1);
  fwp::cuda::Queue queue = x.queue({workspace.memory(), {left.data(), left.size() * sizeof(int32_t), true}});
  backward ? chunk::backward(p, workspace.data(), left.data(), queue)
           : chunk::forward(p, workspace.data(), left.data(), queue);
  return left;
}

Options small(Rule rule, Decay decay) {
  Options is;
  is.rule = rule;
  is.decay = decay;
  is.dtype = DType::bf16;
  is.N = is.H = 1;
  is.T = 70;
  is.float_gates = true;
  return is;
}

// The gates of a case, by token and channel.
template <class F>
void set_gates(Case& x, const F& gate) {
  for (int64_t t = 0; t < x.T; ++t)
    for (int64_t i = 0; i < x.g.n; ++i) x.g.set(0, t, 0, i, gate(t, i));
}

}  // namespace

TEST_CASE("gates above 0, of all channels or some, up to their limit") {
  const Emulator emulator(false);
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const int kind : {0, 1, 2, 3}) {
        if (decay == Decay::scalar && kind == 1) continue;
        Case x(small(rule, decay));
        const double growth = decay == Decay::channel ? 3.9 : 7.9, most = growth / 64;  // of a chunk, of a token
        set_gates(x, [&](int64_t t, int64_t i) {
          if (kind == 1) return i % 4 == 0 ? most : -0.5;              // some grow while others fade
          if (kind == 2) return t % 64 == 5 * (i % 3) ? growth : 0.0;  // at once
          if (kind == 3) return normal(random) * most;                 // around 0
          return most;
        });
        for (int64_t t = 0; t < x.T; ++t) {  // keys of unit length: states of the delta rule do not grow by themselves
          double square = 0;
          for (int64_t d = 0; d < x.K; ++d) square += x.k.get(0, t, 0, d) * x.k.get(0, t, 0, d);
          for (int64_t d = 0; d < x.K; ++d) x.k.set(0, t, 0, d, x.k.get(0, t, 0, d) / std::sqrt(square));
        }
        CAPTURE(static_cast<int>(rule));
        CAPTURE(static_cast<int>(decay));
        CAPTURE(kind);
        CHECK(run(x, false) == Left{0});
        CHECK(run(x, true) == Left{0});
        const Expected y = expected(x, true);
        CHECK(error(x.o, y.o) < 3e-3);
        CHECK(error(x.hT, y.hT) < 2.2e-3);
        CHECK(error(x.dq, y.dq) < 3e-3);
        CHECK(error(x.dk, y.dk) < 3e-3);
        CHECK(error(x.dv, y.dv) < 3e-3);
        CHECK(error(x.dbeta, y.dbeta) < 2.2e-3);
        CHECK(error(x.dg, y.dg) < 3e-3);
        CHECK(error(x.dh0, y.dh0) < 2.2e-3);
      }
}

TEST_CASE("growth beyond that is given up, in whichever channel it is") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const int64_t channel : {0, 15}) {
      Case x(small(rule, Decay::channel));
      set_gates(x, [&](int64_t, int64_t i) { return i == channel ? 4.1 / 64 : -0.1; });
      CHECK(run(x, false) == Left{1});
      CHECK(run(x, true) == Left{1});
    }
}

// A gate's gradient is a sum over all that flows past its token: what the token has, and what comes from later ones
// through their gates. Where those are weak, that is the larger part.
TEST_CASE("every number of dg has its digits, as far as what flows past its token has them") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const double g : {0.0, -0.01, -0.1, -1.0, -20.0}) {
        Case x(small(rule, decay));
        set_gates(x, [&](int64_t, int64_t) { return g; });
        CAPTURE(static_cast<int>(rule));
        CAPTURE(static_cast<int>(decay));
        CAPTURE(g);
        CHECK(run(x, true) == Left{0});
        const Expected y = expected(x, true);
        double flow = 0, worst = 0;
        for (int64_t t = x.T - 1; t >= 0; --t) {
          double own = 0;
          for (int64_t i = 0; i < x.K; ++i)
            own += std::abs(x.q.get(0, t, 0, i) * y.dq.get(0, t, 0, i)) +
                   std::abs(x.k.get(0, t, 0, i) * y.dk.get(0, t, 0, i));
          flow = std::hypot(own, std::exp(g) * flow);
          for (int64_t i = 0; i < x.g.n; ++i)
            worst = std::fmax(worst, std::abs(x.dg.get(0, t, 0, i) - y.dg.get(0, t, 0, i)) / (flow * std::exp(g / 2)));
        }
        CHECK(worst < 6e-4);
      }
}

TEST_CASE("products of the gradients that are out of range are given up") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel}) {
      CAPTURE(static_cast<int>(rule));
      CAPTURE(static_cast<int>(decay));
      Case x(small(rule, decay));
      for (Tensor Case::* huge : {&Case::v, &Case::h0, &Case::d_o, &Case::d_hT})
        for (int64_t i = 0; i < (x.*huge).array.count(); ++i) (x.*huge).array.set(i, 1e25 * (x.*huge).array.get(i));
      CHECK(run(x, true) == Left{1});
    }
}
