// The recurrence of fwp.h in double, one line per equation, and random inputs for it. Shares no code with the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <vector>

namespace reference {

// A vector with signed sizes and indices, as sizes are everywhere here.
struct Array : std::vector<double> {
  Array() = default;
  Array(std::initializer_list<double> values) : vector(values) {}
  template <class Iterator>
  Array(Iterator first, Iterator last) : vector(first, last) {}
  explicit Array(int64_t n, double value = 0) : vector(static_cast<size_t>(n), value) {}
  double& operator[](int64_t i) { return vector::operator[](static_cast<size_t>(i)); }
  const double& operator[](int64_t i) const { return vector::operator[](static_cast<size_t>(i)); }
  int64_t count() const { return static_cast<int64_t>(size()); }
};

enum class Rule { linear, delta };
enum class Decay { none, scalar, channel };

struct Sizes {
  int64_t B, T, H, K, V;
};

// Contiguous arrays with the shapes of fwp.h; an empty beta, g or h0 is absent.
struct Inputs {
  Sizes n;
  Decay decay;
  Array q, k, v, beta, g, h0;
};

struct Outputs {
  Array o, hT;
};

inline Outputs forward(Rule rule, const Inputs& x, double scale) {
  const auto [B, T, H, K, V] = x.n;
  Outputs y{Array(x.v.count()), x.h0.empty() ? Array(B * H * K * V) : x.h0};
  Array u(V);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t h = 0; h < H; ++h) {
      double* S = y.hT.data() + (b * H + h) * K * V;
      for (int64_t t = 0; t < T; ++t) {
        const int64_t row = (b * T + t) * H + h;
        const double *q = x.q.data() + row * K, *k = x.k.data() + row * K, *v = x.v.data() + row * V;
        const double beta = x.beta.empty() ? 1 : x.beta[row];
        for (int64_t i = 0; i < K && x.decay != Decay::none; ++i) {
          const double a = std::exp(x.g[x.decay == Decay::scalar ? row : row * K + i]);
          for (int64_t j = 0; j < V; ++j) S[i * V + j] *= a;
        }
        for (int64_t j = 0; j < V; ++j) {
          double predicted = 0;
          for (int64_t i = 0; i < K; ++i) predicted += S[i * V + j] * k[i];
          u[j] = beta * (rule == Rule::delta ? v[j] - predicted : v[j]);
        }
        for (int64_t i = 0; i < K; ++i)
          for (int64_t j = 0; j < V; ++j) S[i * V + j] += k[i] * u[j];
        for (int64_t j = 0; j < V; ++j)
          for (int64_t i = 0; i < K; ++i) y.o[row * V + j] += scale * q[i] * S[i * V + j];
      }
    }
  }
  return y;
}

inline double dot(const Array& a, const Array& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.count(); ++i) sum += a[i] * b[i];
  return sum;
}

inline double distance(const Array& a, const Array& b) {
  double sum = 0;
  for (int64_t i = 0; i < a.count(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// Central difference of <o, d_o> + <hT, d_hT> as one input moves along a direction.
inline double slope(Rule rule, const Inputs& x, Array Inputs::* input, const Array& direction, const Outputs& dy,
                    double scale) {
  constexpr double step = 1e-5;
  double loss[2];
  for (int side = 0; side < 2; ++side) {
    Inputs moved = x;
    for (int64_t i = 0; i < direction.count(); ++i) (moved.*input)[i] += (side ? step : -step) * direction[i];
    const Outputs y = forward(rule, moved, scale);
    loss[side] = dot(y.o, dy.o) + dot(y.hT, dy.hT);
  }
  return (loss[1] - loss[0]) / (2 * step);
}

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}

  Array normal(int64_t n, double deviation = 1) {
    std::normal_distribution<double> draw(0, deviation);
    Array x(n);
    for (double& value : x) value = draw(engine_);
    return x;
  }

  Array uniform(int64_t n, double low, double high) {
    std::uniform_real_distribution<double> draw(low, high);
    Array x(n);
    for (double& value : x) value = draw(engine_);
    return x;
  }

  // Keys of about unit length, write strengths in (0, 1), gates in (-1, 0): a stable recurrence.
  Inputs inputs(Sizes n, Decay decay) {
    const int64_t rows = n.B * n.T * n.H;
    const double unit = 1 / std::sqrt(static_cast<double>(n.K));
    Inputs x{n,
             decay,
             normal(rows * n.K),
             normal(rows * n.K, unit),
             normal(rows * n.V),
             uniform(rows, 0, 1),
             {},
             normal(n.B * n.H * n.K * n.V)};
    if (decay != Decay::none) x.g = uniform(decay == Decay::scalar ? rows : rows * n.K, -1, 0);
    return x;
  }

 private:
  std::mt19937 engine_;
};

}  // namespace reference
