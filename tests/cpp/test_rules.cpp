// The rule texts on plain doubles, one value column: a block of C tokens is C tokens of the recurrence, and its
// backward text is its slope.
#include <doctest/doctest.h>

#include "reference.hpp"

#define FWP_HD inline
#define FWP_UNROLL
#include "rules/block.hpp"
#include "rules/decay.hpp"
#include "rules/delta.hpp"
#include "rules/linear.hpp"

namespace {

using reference::Array;
using reference::Inputs;

constexpr int kChannels = 5;

template <class R>
constexpr reference::Rule kRule = R::predicts ? reference::Rule::delta : reference::Rule::linear;
template <class D>
constexpr reference::Decay kDecay = !D::decays       ? reference::Decay::none
                                    : D::per_channel ? reference::Decay::channel
                                                     : reference::Decay::scalar;

template <class Rule_, class Decay_, int tokens>
struct Case {
  using Rule = Rule_;
  using Decay = Decay_;
  static constexpr int C = tokens;
};

// One block, laid out as the comment of block.hpp names things; [d] channel, [t] token.
template <class Case>
struct Block {
  using Rule = typename Case::Rule;
  using Decay = typename Case::Decay;
  static constexpr int C = Case::C, K = kChannels;

  double k[K][C], q[K][C], a[K][C], kr[K][C], qr[K][C], kw[K][C], A[K], S0[K], S1[K];
  double MP[C * C] = {}, v[C], beta[C], e[C], u[C], o[C];

  explicit Block(const Inputs& x) {
    for (int t = 0; t < C; ++t) {
      v[t] = x.v[t];
      beta[t] = x.beta[t];
      for (int d = 0; d < K; ++d) {
        k[d][t] = x.k[t * K + d];
        q[d][t] = x.q[t * K + d];
        a[d][t] = !Decay::decays ? 1 : std::exp(x.g[Decay::per_channel ? t * K + d : t]);
      }
    }
    for (int d = 0; d < K; ++d) S0[d] = x.h0[d];
  }

  void forward() {
    for (int d = 0; d < K; ++d) {
      A[d] = 1;
      decay_block_fwd<Decay, Rule::predicts, C>(k[d], q[d], a[d], A[d], kr[d], qr[d], kw[d], MP);
    }
    double R[C] = {}, X[C] = {};
    for (int t = 0; t < C; ++t)
      for (int d = 0; d < K; ++d) {
        R[t] += kr[d][t] * S0[d];
        X[t] += qr[d][t] * S0[d];
      }
    block_fwd<Rule, C>(R, X, MP, v, beta, e, u, o);
    for (int d = 0; d < K; ++d) {
      S1[d] = A[d] * S0[d];
      for (int t = 0; t < C; ++t) S1[d] += kw[d][t] * u[t];
    }
  }

  // Gradients in the order of Inputs' members.
  Inputs backward(const reference::Outputs& dy) const {
    Inputs grad{{1, C, 1, K, 1}, kDecay<Decay>, Array(C * K), Array(C * K), Array(C), Array(C), {}, Array(K)};
    grad.g = Array(!Decay::decays ? 0 : Decay::per_channel ? C * K : C);
    double Z[C] = {}, p[C], de[C];
    for (int t = 0; t < C; ++t)
      for (int d = 0; d < K; ++d) Z[t] += kw[d][t] * dy.hT[d];
    block_bwd<Rule, C>(Z, MP, dy.o.data(), beta, p, de);

    const double unused = std::nan("");  // by a rule that does not predict
    double dMP[C * C];
    for (int t = 0; t < C; ++t) {
      grad.v[t] = de[t];
      grad.beta[t] = p[t] * e[t];
      for (int i = 0; i < t; ++i) dMP[M_at<C>(t, i)] = Rule::predicts ? -de[t] * u[i] : unused;
      for (int i = 0; i <= t; ++i) dMP[P_at<C>(t, i)] = dy.o[t] * u[i];
    }
    for (int d = 0; d < K; ++d) {
      double dkr[C], dqr[C], dkw[C], dk[C], dq[C], dg[C] = {};
      grad.h0[d] = A[d] * dy.hT[d];
      for (int t = 0; t < C; ++t) {
        dqr[t] = dy.o[t] * S0[d];
        dkr[t] = Rule::predicts ? -de[t] * S0[d] : unused;
        dkw[t] = u[t] * dy.hT[d];
        grad.h0[d] += qr[d][t] * dy.o[t] - (Rule::predicts ? kr[d][t] * de[t] : 0);
      }
      decay_block_bwd<Decay, Rule::predicts, C>(k[d], q[d], a[d], dkr, dqr, dkw, dMP, dy.hT[d] * S0[d], dk, dq, dg);
      for (int t = 0; t < C; ++t) {
        grad.k[t * K + d] = dk[t];
        grad.q[t * K + d] = dq[t];
        if (Decay::decays) grad.g[Decay::per_channel ? t * K + d : t] += dg[t];
      }
    }
    return grad;
  }
};

TEST_CASE_TEMPLATE("a block", X, Case<Linear, NoDecay, 1>, Case<Linear, NoDecay, 6>, Case<Linear, ScalarDecay, 1>,
                   Case<Linear, ScalarDecay, 4>, Case<Linear, ChannelDecay, 3>, Case<Delta, NoDecay, 1>,
                   Case<Delta, NoDecay, 2>, Case<Delta, NoDecay, 6>, Case<Delta, ScalarDecay, 1>,
                   Case<Delta, ScalarDecay, 6>, Case<Delta, ChannelDecay, 1>, Case<Delta, ChannelDecay, 6>) {
  using Rule = typename X::Rule;
  using Decay = typename X::Decay;
  reference::Random random(29);
  const Inputs x = random.inputs({1, X::C, 1, kChannels, 1}, kDecay<Decay>);
  Block<X> block(x);
  block.forward();

  SUBCASE("is the recurrence") {
    const reference::Outputs expected = reference::forward(kRule<Rule>, x, 1);
    for (int t = 0; t < X::C; ++t) CHECK(block.o[t] == doctest::Approx(expected.o[t]).epsilon(1e-13));
    for (int d = 0; d < kChannels; ++d) CHECK(block.S1[d] == doctest::Approx(expected.hT[d]).epsilon(1e-13));
  }

  SUBCASE("has the gradient of the recurrence") {
    const reference::Outputs dy{random.normal(X::C), random.normal(kChannels)};
    const Inputs grad = block.backward(dy);
    for (auto input : {&Inputs::q, &Inputs::k, &Inputs::v, &Inputs::beta, &Inputs::g, &Inputs::h0}) {
      const Array direction = random.normal((x.*input).count());
      const double expected = reference::slope(kRule<Rule>, x, input, direction, dy, 1);
      CHECK(reference::dot(grad.*input, direction) == doctest::Approx(expected).epsilon(1e-7));
    }
  }
}

}  // namespace
