// The gradients of one head in double, twice: token by token, and in chunks as cuda/chunk/backward.cu has them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../cpp/reference.hpp"

namespace model {

using reference::Array;
using reference::Rule;

// Rows are tokens, contiguous; an empty beta is ones, an empty g no decay, an empty h0 or d_hT zeros.
struct Head {
  Rule rule;
  int64_t T, K, V;
  double scale;
  Array q, k, v, beta, g, h0, d_o, d_hT;

  double strength(int64_t t) const { return beta.empty() ? 1 : beta[t]; }
  double log_decay(int64_t t) const { return g.empty() ? 0 : g[t]; }
};
struct Gradients {
  Array dq, dk, dv, dbeta, dg, dh0;
  explicit Gradients(const Head& x)
      : dq(x.T * x.K),
        dk(x.T * x.K),
        dv(x.T * x.V),
        dbeta(x.T),
        dg(x.T),
        dh0(x.d_hT.empty() ? Array(x.K * x.V) : x.d_hT) {}
};

// cpp/rules/delta.hpp, with every state kept.
inline Gradients backward(const Head& x) {
  const auto K = x.K, V = x.V;
  std::vector<Array> before, errors, after;  // S', e and S of every token
  Array S = x.h0.empty() ? Array(K * V) : x.h0;
  for (int64_t t = 0; t < x.T; ++t) {
    const double a = std::exp(x.log_decay(t));
    Array e(V);
    for (double& s : S) s *= a;
    for (int64_t j = 0; j < V; ++j) {
      double predicted = 0;
      for (int64_t i = 0; i < K; ++i) predicted += S[i * V + j] * x.k[t * K + i];
      e[j] = x.v[t * V + j] - (x.rule == Rule::delta ? predicted : 0);
    }
    before.push_back(S);
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < V; ++j) S[i * V + j] += x.k[t * K + i] * x.strength(t) * e[j];
    after.push_back(S);
    errors.push_back(e);
  }
  Gradients y(x);
  Array& D = y.dh0;
  for (int64_t t = x.T - 1; t >= 0; --t) {
    const auto row = static_cast<size_t>(t);
    const double *q = x.q.data() + t * K, *k = x.k.data() + t * K, *d_o = x.d_o.data() + t * V;
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < V; ++j) {
        y.dq[t * K + i] += x.scale * after[row][i * V + j] * d_o[j];
        D[i * V + j] += x.scale * q[i] * d_o[j];
      }
    for (int64_t j = 0; j < V; ++j) {
      double p = 0;
      for (int64_t i = 0; i < K; ++i) p += D[i * V + j] * k[i];
      y.dbeta[t] += p * errors[row][j];
      y.dv[t * V + j] = x.strength(t) * p;
    }
    const double a = std::exp(x.log_decay(t));
    for (int64_t i = 0; i < K; ++i)
      for (int64_t j = 0; j < V; ++j) {
        const double de = x.rule == Rule::delta ? y.dv[t * V + j] : 0;
        y.dk[t * K + i] += D[i * V + j] * x.strength(t) * errors[row][j] - before[row][i * V + j] * de;
        D[i * V + j] -= k[i] * de;
        y.dg[t] += D[i * V + j] * before[row][i * V + j];
        D[i * V + j] *= a;
      }
  }
  return y;
}

// One chunk of n tokens from t0 on: forward from S0 its errors, backward from dS1 everything.
class Chunk {
 public:
  Chunk(const Head& x, int64_t t0, int64_t n) : x_(x), t0_(t0), n_(n), G_(n), E_(n * x.V) {
    for (int64_t i = 0; i < n; ++i) G_[i] = (i > 0 ? G_[i - 1] : 0) + std::max(x.log_decay(t0 + i), -1e4);
  }

  // E = (I + M diag(beta))^-1 (V - e^G K S0), and S becomes S1.
  void forward(Array& S) {
    const auto V = x_.V;
    S0_ = S;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < V; ++j) {
        double& e = E_[i * V + j];
        e = x_.v[(t0_ + i) * V + j];
        if (x_.rule == Rule::linear) continue;
        for (int64_t c = 0; c < x_.K; ++c) e -= std::exp(G_[i]) * k(i, c) * S0_[c * V + j];
        for (int64_t m = 0; m < i; ++m) e -= M(i, m) * u(m, j);
      }
    for (int64_t c = 0; c < x_.K; ++c)
      for (int64_t j = 0; j < V; ++j) {
        S[c * V + j] *= std::exp(G_[n_ - 1]);
        for (int64_t i = 0; i < n_; ++i) S[c * V + j] += std::exp(G_[n_ - 1] - G_[i]) * k(i, c) * u(i, j);
      }
  }

  // D is the adjoint of S1, and becomes that of S0.
  void backward(Array& D, Gradients& y) const {
    const auto K = x_.K, V = x_.V;
    const bool delta = x_.rule == Rule::delta;
    const double last = G_[n_ - 1];
    const auto row = [&](const Array& S, int64_t c) { return S.data() + c * V; };
    const auto dot = [&](const double* a, const double* b) {
      double sum = 0;
      for (int64_t j = 0; j < V; ++j) sum += a[j] * b[j];
      return sum;
    };
    // p = P^T dO + e^(G_C - G) K dS1 - M^T dE, dE = beta p
    Array dE(n_ * V);
    for (int64_t i = n_ - 1; i >= 0; --i)
      for (int64_t j = 0; j < V; ++j) {
        double p = 0;
        for (int64_t m = i; m < n_; ++m) p += P(m, i) * d_o(m)[j];
        for (int64_t c = 0; c < K; ++c) p += std::exp(last - G_[i]) * k(i, c) * D[c * V + j];
        for (int64_t m = i + 1; m < n_ && delta; ++m) p -= M(m, i) * dE[m * V + j];
        dE[i * V + j] = x_.strength(t0_ + i) * p;
        y.dv[(t0_ + i) * V + j] = dE[i * V + j];
      }
    // The adjoints of P and M, and what each of their elements gives to the decays that lie between its tokens.
    Array dP(n_ * n_), dM(n_ * n_), between(n_ * n_), reads(n_), writes(n_);
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t m = 0; m <= i; ++m) {
        const double b = x_.strength(t0_ + m), X = dot(d_o(i), row(E_, m)), Y = delta ? dot(row(dE, i), row(E_, m)) : 0;
        y.dbeta[t0_ + m] += P(i, m) * X;
        dP[i * n_ + m] = b * X;
        between[i * n_ + m] = P(i, m) * b * X;
        if (m == i || !delta) continue;
        y.dbeta[t0_ + m] -= M(i, m) * Y;
        dM[i * n_ + m] = -b * Y;
        between[i * n_ + m] -= M(i, m) * b * Y;
      }
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t c = 0; c < K; ++c) {
        const double dq = x_.scale * std::exp(G_[i]) * dot(d_o(i), row(S0_, c));
        const double dk_read = delta ? -std::exp(G_[i]) * dot(row(dE, i), row(S0_, c)) : 0;
        const double written = std::exp(last - G_[i]) * dot(row(E_, i), row(D, c));
        const double b = x_.strength(t0_ + i);
        reads[i] += q(i, c) * dq + k(i, c) * dk_read;
        writes[i] += k(i, c) * written * b;
        y.dbeta[t0_ + i] += k(i, c) * written;
        double &to_q = y.dq[(t0_ + i) * K + c], &to_k = y.dk[(t0_ + i) * K + c];
        to_q = dq;
        to_k = dk_read + b * written;
        for (int64_t m = 0; m < n_; ++m) {
          if (m <= i) to_q += x_.scale * gamma(i, m) * dP[i * n_ + m] * k(m, c);
          if (m >= i) to_k += x_.scale * gamma(m, i) * dP[m * n_ + i] * q(m, c);
          if (m != i) to_k += (m < i ? gamma(i, m) * dM[i * n_ + m] : gamma(m, i) * dM[m * n_ + i]) * k(m, c);
        }
      }
    // Every term has the factor a_t: none is larger than the sum may be.
    double carried = 0;
    for (int64_t c = 0; c < K; ++c) carried += std::exp(last) * dot(row(S0_, c), row(D, c));
    for (int64_t t = 0; t < n_; ++t) {
      double& dg = y.dg[t0_ + t];
      dg = carried;
      for (int64_t i = t; i < n_; ++i) dg += reads[i];
      for (int64_t i = 0; i < t; ++i) dg += writes[i];
      for (int64_t i = t; i < n_; ++i)
        for (int64_t m = 0; m < t; ++m) dg += between[i * n_ + m];
    }
    for (int64_t c = 0; c < K; ++c)
      for (int64_t j = 0; j < V; ++j) {
        double& d = D[c * V + j];
        d *= std::exp(last);
        for (int64_t i = 0; i < n_; ++i)
          d += std::exp(G_[i]) * (x_.scale * q(i, c) * d_o(i)[j] - (delta ? k(i, c) * dE[i * V + j] : 0));
      }
  }

 private:
  double q(int64_t i, int64_t c) const { return x_.q[(t0_ + i) * x_.K + c]; }
  double k(int64_t i, int64_t c) const { return x_.k[(t0_ + i) * x_.K + c]; }
  double u(int64_t i, int64_t j) const { return x_.strength(t0_ + i) * E_[i * x_.V + j]; }
  const double* d_o(int64_t i) const { return x_.d_o.data() + (t0_ + i) * x_.V; }
  double gamma(int64_t i, int64_t m) const { return std::exp(G_[i] - G_[m]); }
  double M(int64_t i, int64_t m) const {
    double sum = 0;
    for (int64_t c = 0; c < x_.K; ++c) sum += k(i, c) * k(m, c);
    return gamma(i, m) * sum;
  }
  double P(int64_t i, int64_t m) const {
    double sum = 0;
    for (int64_t c = 0; c < x_.K; ++c) sum += q(i, c) * k(m, c);
    return x_.scale * gamma(i, m) * sum;
  }

  const Head& x_;
  int64_t t0_, n_;
  Array G_, E_, S0_;
};

inline Gradients chunk_backward(const Head& x, int64_t chunk_size) {
  std::vector<Chunk> chunks;
  Array S = x.h0.empty() ? Array(x.K * x.V) : x.h0;
  for (int64_t t = 0; t < x.T; t += chunk_size) {
    chunks.emplace_back(x, t, std::min(chunk_size, x.T - t));
    chunks.back().forward(S);
  }
  Gradients y(x);
  for (size_t c = chunks.size(); c-- > 0;) chunks[c].backward(y.dh0, y);
  return y;
}

}  // namespace model
