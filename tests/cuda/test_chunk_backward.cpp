// The chunk form backward under the emulator, against double.
#include <doctest/doctest.h>

#include "chunk_model.hpp"

using reference::Array;
using reference::Rule;

namespace {

double relative(const Array& a, const Array& b) {
  const double norm = std::sqrt(reference::dot(b, b));
  return reference::distance(a, b) / (norm > 0 ? norm : 1);
}

}  // namespace

TEST_CASE("gradients in chunks are those of the recurrence") {
  reference::Random random(1);
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const double gate : {0.0, -0.1, -5.0, -20.0, -100.0}) {
      const int64_t T = 21, K = 5, V = 3;
      model::Head x{rule, T, K, V, 0.7, {}, {}, {}, {}, {}, {}, {}, {}};
      x.q = random.normal(T * K);
      x.k = random.normal(T * K, 0.4);
      x.v = random.normal(T * V);
      x.beta = random.uniform(T, 0, 2);
      x.beta[3] = 0;
      x.g = random.uniform(T, gate, 0);
      if (gate < -1) x.g[9] = -HUGE_VAL;
      x.h0 = random.normal(K * V);
      x.d_o = random.normal(T * V);
      x.d_hT = random.normal(K * V);
      const model::Gradients expected = model::backward(x), y = model::chunk_backward(x, 8);
      CHECK(relative(y.dq, expected.dq) < 1e-12);
      CHECK(relative(y.dk, expected.dk) < 1e-12);
      CHECK(relative(y.dv, expected.dv) < 1e-12);
      CHECK(relative(y.dbeta, expected.dbeta) < 1e-12);
      CHECK(relative(y.dh0, expected.dh0) < 1e-12);
      for (int64_t t = 0; t < T; ++t)  // each by itself, however small
        CHECK(std::abs(y.dg[t] - expected.dg[t]) <= 1e-9 * std::abs(expected.dg[t]));
    }
}
