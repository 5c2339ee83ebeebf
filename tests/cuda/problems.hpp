// Problems on host memory for kernels under the emulator: random inputs, outputs full of NaN in any layout, the queue
// that may touch them and nothing else, and what the recurrence of cpp/rules gives for them in double, token by token.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "launch.hpp"
#include "rows.cuh"

namespace problems {

using fwp::Decay;
using fwp::DType;
using fwp::Problem;
using fwp::Rows;
using fwp::Rule;
using fwp::States;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

constexpr Rule kRules[] = {Rule::linear, Rule::delta};
constexpr Decay kDecays[] = {Decay::none, Decay::scalar, Decay::channel};
constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

// Whether all cases are wanted, which takes long, or a part of them that has every value of every option.
inline bool every_case() {
  const char* const wanted = std::getenv("FWP_EVERY_CASE");
  return wanted != nullptr && *wanted == '1';
}

// What the emulator does while this lives.
class Emulator {
 public:
  // Where every case is wanted, all are checked.
  explicit Emulator(bool check, const char* order = "forward") {
    setenv("FWP_SIMT_CHECK", check || every_case() ? "1" : "0", 1);
    setenv("FWP_SIMT_ORDER", order, 1);
  }
  ~Emulator() {
    unsetenv("FWP_SIMT_CHECK");
    unsetenv("FWP_SIMT_ORDER");
  }
  Emulator(const Emulator&) = delete;
  Emulator& operator=(const Emulator&) = delete;
};

// Sixty-four byte aligned, and full of NaN.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : bytes_(bytes), numbers_(bytes / 8 + 8, kNaN) {}
  void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(numbers_.data()) + 63) / 64 * 64); }
  fwp::cuda::Memory memory() { return {data(), bytes_, true}; }

 private:
  size_t bytes_;
  std::vector<double> numbers_;
};

// Numbers of one dtype, read and written as double.
class Array {
 public:
  explicit Array(DType dtype = DType::f32, int64_t count = 0, double value = kNaN)
      : dtype_(dtype), count_(count), bytes_(static_cast<size_t>(count * fwp::item_size(dtype))) {
    for (int64_t i = 0; i < count; ++i) set(i, value);
  }
  double get(int64_t i) const {
    switch (dtype_) {
      case DType::f64:
        return at<double>(i);
      case DType::f32:
        return static_cast<double>(at<float>(i));
      case DType::f16:
        return static_cast<double>(fwp::cuda::to_float(at<fwp::cuda::Half>(i)));
      default:
        return static_cast<double>(fwp::cuda::to_float(at<fwp::cuda::BFloat>(i)));
    }
  }
  void set(int64_t i, double x) {
    switch (dtype_) {
      case DType::f64:
        return put(i, x);
      case DType::f32:
        return put(i, static_cast<float>(x));
      case DType::f16:
        return put(i, fwp::cuda::to_half(static_cast<float>(x)));
      default:
        return put(i, fwp::cuda::to_bfloat(static_cast<float>(x)));
    }
  }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }
  void* data() { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }

 private:
  template <class X>
  X at(int64_t i) const {
    X x;
    std::memcpy(&x, bytes_.data() + i * static_cast<int64_t>(sizeof(X)), sizeof x);
    return x;
  }
  template <class X>
  void put(int64_t i, X x) {
    std::memcpy(bytes_.data() + i * static_cast<int64_t>(sizeof(X)), &x, sizeof x);
  }

  DType dtype_;
  int64_t count_;
  std::vector<unsigned char> bytes_;
};

// bthk: contiguous.  bhtk: [B,H,T,n] in memory.  gaps: rows apart from each other, and not at the array's begin.
enum class Layout { bthk, bhtk, gaps };

struct Options {
  Rule rule = Rule::delta;
  Decay decay = Decay::none;
  DType dtype = DType::f32;
  int64_t N = 2, T = 20, H = 2, K = 16, V = 16;
  std::vector<int64_t> cu_seqlens;  // if there are any: N and T are theirs
  int64_t q_group = 1, k_group = 1, v_group = 1;
  bool beta = true, h0 = true, hT = true, d_hT = true, dh0 = true;
  bool attention_norm = false;
  double eps = 1e-6, scale = 1;
  Layout layout = Layout::bthk;
  bool wide_keys = false;    // q, k, dq and dk of the accumulation type
  bool float_gates = false;  // beta, g and their gradients float32
  unsigned seed = 1;
};

// A tensor [B,T,heads,n] or state [N,H,K,n] of a case, with its own memory.
struct Tensor {
  Array array;
  int64_t begin = 0, b = 0, t = 0, h = 0, n = 0;  // places of numbers; n of them per row, 0: absent

  bool there() const { return n > 0; }
  int64_t at(int64_t batch, int64_t token, int64_t head, int64_t i = 0) const {
    return begin + batch * b + token * t + head * h + i;
  }
  double get(int64_t batch, int64_t token, int64_t head, int64_t i = 0) const {
    return array.get(at(batch, token, head, i));
  }
  void set(int64_t batch, int64_t token, int64_t head, int64_t i, double x) { array.set(at(batch, token, head, i), x); }
};

class Case {
 public:
  Options options;
  int64_t N, T, H, K, V, B;
  Tensor q, k, v, beta, g, o, d_o, dq, dk, dv, dbeta, dg;
  Tensor h0, hT, d_hT, dh0;  // as tensors: batch is the sequence, token the key channel
  std::vector<int64_t> cu_seqlens;

  explicit Case(const Options& of) : options(of), random_(of.seed) {
    cu_seqlens = of.cu_seqlens;
    const bool packed = !cu_seqlens.empty();
    N = packed ? static_cast<int64_t>(cu_seqlens.size()) - 1 : of.N;
    T = packed ? cu_seqlens.back() : of.T;
    H = of.H;
    K = of.K;
    V = of.V;
    B = packed ? 1 : N;
    const DType wide = fwp::accumulation(of.dtype), keys = of.wide_keys ? wide : of.dtype;
    const DType gates = of.float_gates ? DType::f32 : of.dtype;
    const int64_t gate = of.decay == Decay::channel ? K : of.decay == Decay::scalar ? 1 : 0;
    q = dq = rows(keys, H / of.q_group, K);
    k = dk = rows(keys, H / of.k_group, K);
    v = dv = rows(of.dtype, H / of.v_group, V);
    o = d_o = rows(of.dtype, H, V);
    beta = dbeta = rows(gates, H, of.beta ? 1 : 0);
    g = dg = rows(gates, H, gate);
    const int64_t columns = V + (of.attention_norm ? 1 : 0);
    h0 = states(wide, of.h0 ? columns : 0);
    hT = states(wide, of.hT ? columns : 0);
    d_hT = states(wide, of.d_hT ? columns : 0);
    dh0 = states(wide, of.dh0 ? columns : 0);

    const double unit = 1 / std::sqrt(static_cast<double>(K > 0 ? K : 1));
    normal(q, 1);
    normal(k, unit);
    normal(v, 1);
    normal(d_o, 1);
    normal(h0, 1);
    normal(d_hT, 1);
    uniform(beta, 0, 1);
    uniform(g, -1, 0);
    if (of.attention_norm)
      for (Tensor* x : {&q, &k, &h0}) magnitudes(*x);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  Problem problem() {
    Problem p;
    p.rule = options.rule;
    p.decay = options.decay;
    p.dtype = options.dtype;
    p.N = N;
    p.T = T;
    p.H = H;
    p.K = K;
    p.V = V;
    p.cu_seqlens = cu_seqlens.empty() ? nullptr : cu_seqlens.data();
    p.attention_norm = options.attention_norm;
    p.eps = options.eps;
    p.scale = options.scale;
    p.device = 0;
    p.q = of(q, options.q_group);
    p.k = of(k, options.k_group);
    p.v = of(v, options.v_group);
    p.beta = of(beta, 1);
    p.g = of(g, 1);
    p.o = of(o, 1);
    p.d_o = of(d_o, 1);
    p.dq = of(dq, options.q_group);
    p.dk = of(dk, options.k_group);
    p.dv = of(dv, options.v_group);
    p.dbeta = of(dbeta, 1);
    p.dg = of(dg, 1);
    p.h0 = of(h0);
    p.hT = of(hT);
    p.d_hT = of(d_hT);
    p.dh0 = of(dh0);
    return p;
  }

  // Its kernels may touch the arrays, inputs for reading only, and what is given here.
  fwp::cuda::Queue queue(std::vector<fwp::cuda::Memory> more = {}) {
    for (Tensor* x : {&q, &k, &v, &beta, &g, &d_o, &h0, &d_hT}) add(more, *x, false);
    for (Tensor* x : {&o, &hT, &dq, &dk, &dv, &dbeta, &dg, &dh0}) add(more, *x, true);
    if (!cu_seqlens.empty()) more.push_back({cu_seqlens.data(), cu_seqlens.size() * sizeof(int64_t), false});
    return fwp::cuda::Queue(nullptr, "test", std::move(more));
  }

  int64_t begin(int64_t n) const { return cu_seqlens.empty() ? 0 : at(n); }
  int64_t batch(int64_t n) const { return cu_seqlens.empty() ? n : 0; }
  int64_t length(int64_t n) const { return cu_seqlens.empty() ? T : at(n + 1) - at(n); }

 private:
  int64_t at(int64_t n) const { return cu_seqlens[static_cast<size_t>(n)]; }

  Tensor rows(DType dtype, int64_t heads, int64_t n) const {
    Tensor x;
    x.n = n;
    const int64_t gap = options.layout == Layout::gaps ? 3 : 0;
    x.begin = options.layout == Layout::gaps ? 1 : 0;
    if (options.layout == Layout::bhtk) {
      x.t = n;
      x.h = T * n;
      x.b = heads * T * n;
    } else {
      x.h = n + gap;
      x.t = heads * x.h + gap;
      x.b = T * x.t + gap;
    }
    x.array = Array(dtype, n > 0 ? x.begin + B * x.b : 0);
    return x;
  }
  Tensor states(DType dtype, int64_t columns) const {
    Tensor x;
    x.n = columns;
    x.t = columns + (options.layout == Layout::gaps ? 1 : 0);
    x.h = K * x.t;
    x.b = H * x.h;
    x.array = Array(dtype, columns > 0 ? N * x.b : 0);
    return x;
  }

  template <class Draw>
  void fill(Tensor& x, Draw draw) {
    if (!x.there()) return;
    const bool state = &x == &h0 || &x == &d_hT;
    const int64_t batches = state ? N : B, tokens = state ? K : T;
    const int64_t heads = state                               ? H
                          : x.h == 0 || batches * tokens == 0 ? 0
                          : options.layout == Layout::bhtk    ? x.b / x.h
                                                              : x.t / x.h;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t i = 0; i < x.n; ++i) x.set(b, t, h, i, draw(random_));
  }
  void normal(Tensor& x, double deviation) { fill(x, std::normal_distribution<double>(0, deviation)); }
  void uniform(Tensor& x, double low, double high) { fill(x, std::uniform_real_distribution<double>(low, high)); }
  static void magnitudes(Tensor& x) {
    for (int64_t i = 0; i < x.array.count(); ++i) x.array.set(i, std::fabs(x.array.get(i)));
  }

  static Rows of(Tensor& x, int64_t group) {
    if (!x.there()) return {};
    const int64_t item = fwp::item_size(x.array.dtype());
    return {static_cast<char*>(x.array.data()) + x.begin * item, x.array.dtype(), x.b, x.t, x.h, group};
  }
  static States of(Tensor& x) {
    if (!x.there()) return {};
    return {x.array.data(), x.b, x.h, x.t};
  }
  static void add(std::vector<fwp::cuda::Memory>& memory, Tensor& x, bool writable) {
    if (x.there()) memory.push_back({x.array.data(), x.array.bytes().size(), writable});
  }

  std::mt19937 random_;
};

// What is expected of a case: tensors of its shapes in double, contiguous, 0 to begin with.
struct Expected {
  Tensor o, hT, dq, dk, dv, dbeta, dg, dh0;
};

namespace detail {

inline Tensor zeros(int64_t batches, int64_t tokens, int64_t heads, int64_t n) {
  Tensor x;
  x.n = n;
  x.h = n;
  x.t = heads * n;
  x.b = tokens * x.t;
  x.array = Array(DType::f64, batches * x.b, 0);
  return x;
}

using Numbers = std::vector<double>;
struct Token {
  Numbers S, z;            // after this token's decay
  Numbers S_next, z_next;  // after its write
  Numbers predicted, e, u, o;
  double s = 0, c = 0;  // what reads are divided by, less eps
};

}  // namespace detail

// The recurrence and its adjoint, one token after the other. Gradients only if asked for.
inline Expected expected(const Case& x, bool gradients) {
  using detail::Numbers;
  using detail::Token;
  const auto& is = x.options;
  const int64_t K = x.K, V = x.V, gates = is.decay == Decay::channel ? K : is.decay == Decay::scalar ? 1 : 0;
  const int64_t columns = V + (is.attention_norm ? 1 : 0);
  Expected y{detail::zeros(x.B, x.T, x.H, V),
             detail::zeros(x.N, K, x.H, columns),
             detail::zeros(x.B, x.T, x.H / is.q_group, K),
             detail::zeros(x.B, x.T, x.H / is.k_group, K),
             detail::zeros(x.B, x.T, x.H / is.v_group, V),
             detail::zeros(x.B, x.T, x.H, 1),
             detail::zeros(x.B, x.T, x.H, gates),
             detail::zeros(x.N, K, x.H, columns)};
  const auto numbers = [](int64_t n) { return Numbers(static_cast<size_t>(n), 0.0); };
  const auto ref = [](Numbers& of, int64_t i) -> double& { return of[static_cast<size_t>(i)]; };
  const auto read = [](const Tensor& of, int64_t n, int64_t h, int64_t d, int64_t j) {
    return of.there() ? of.get(n, d, h, j) : 0.0;
  };

  for (int64_t n = 0; n < x.N; ++n)
    for (int64_t h = 0; h < x.H; ++h) {
      const int64_t b = x.batch(n), begin = x.begin(n), length = x.length(n);
      const int64_t hq = h / is.q_group, hk = h / is.k_group, hv = h / is.v_group;
      const auto gate = [&](int64_t t, int64_t d) {
        return is.decay == Decay::none ? 0 : x.g.get(b, begin + t, h, is.decay == Decay::channel ? d : 0);
      };
      const auto decayed = [&](int64_t t, int64_t d, double y0) {  // a reset clears even NaN
        const double g = gate(t, d);
        return g == -kInfinity ? 0 : std::exp(g) * y0;
      };
      const auto row = [&](const Tensor& of, int64_t t, int64_t head, int64_t i) {
        return of.get(b, begin + t, head, i);
      };
      const auto beta = [&](int64_t t) { return x.beta.there() ? row(x.beta, t, h, 0) : 1.0; };

      std::vector<Token> tokens(static_cast<size_t>(length));
      Numbers S = numbers(K * V), z = numbers(K);
      for (int64_t d = 0; d < K; ++d) {
        for (int64_t j = 0; j < V; ++j) ref(S, d * V + j) = read(x.h0, n, h, d, j);
        if (is.attention_norm) ref(z, d) = read(x.h0, n, h, d, V);
      }
      for (int64_t t = 0; t < length; ++t) {
        Token& token = tokens[static_cast<size_t>(t)];
        for (int64_t d = 0; d < K; ++d) {
          for (int64_t j = 0; j < V; ++j) ref(S, d * V + j) = decayed(t, d, ref(S, d * V + j));
          ref(z, d) = decayed(t, d, ref(z, d));
          token.s += ref(z, d) * row(x.k, t, hk, d);
        }
        token.S = S;
        token.z = z;
        token.predicted = token.e = token.u = token.o = numbers(V);
        for (int64_t j = 0; j < V; ++j) {
          double m = 0;
          for (int64_t d = 0; d < K; ++d) m += ref(S, d * V + j) * row(x.k, t, hk, d);
          if (is.attention_norm) m = token.s == 0 ? 0 : m / (token.s + is.eps);
          ref(token.predicted, j) = is.rule == Rule::delta ? m : 0;
          ref(token.e, j) = is.rule == Rule::delta ? row(x.v, t, hv, j) - m : row(x.v, t, hv, j);
          ref(token.u, j) = beta(t) * ref(token.e, j);
        }
        for (int64_t d = 0; d < K; ++d) {
          for (int64_t j = 0; j < V; ++j) ref(S, d * V + j) += row(x.k, t, hk, d) * ref(token.u, j);
          ref(z, d) += row(x.k, t, hk, d);
          token.c += ref(z, d) * row(x.q, t, hq, d);
        }
        token.S_next = S;
        token.z_next = z;
        for (int64_t j = 0; j < V; ++j) {
          double r = 0;
          for (int64_t d = 0; d < K; ++d) r += ref(S, d * V + j) * row(x.q, t, hq, d);
          r *= is.scale;
          if (is.attention_norm) r = token.c == 0 ? 0 : r / (token.c + is.eps);
          ref(token.o, j) = r;
          y.o.set(b, begin + t, h, j, r);
        }
      }
      for (int64_t d = 0; d < K; ++d) {
        for (int64_t j = 0; j < V; ++j) y.hT.set(n, d, h, j, ref(S, d * V + j));
        if (is.attention_norm) y.hT.set(n, d, h, V, ref(z, d));
      }
      if (!gradients) continue;

      Numbers D = numbers(K * V), dz = numbers(K);
      for (int64_t d = 0; d < K; ++d) {
        for (int64_t j = 0; j < V; ++j) ref(D, d * V + j) = read(x.d_hT, n, h, d, j);
        if (is.attention_norm) ref(dz, d) = read(x.d_hT, n, h, d, V);
      }
      const auto add = [&](Tensor& to, int64_t t, int64_t head, int64_t i, double value) {
        to.set(b, begin + t, head, i, to.get(b, begin + t, head, i) + value);
      };
      for (int64_t t = length - 1; t >= 0; --t) {
        Token& token = tokens[static_cast<size_t>(t)];
        Numbers read_adjoint = numbers(V), p = numbers(V), predicted_adjoint = numbers(V);
        double dc = 0, ds = 0, dbeta = 0;
        for (int64_t j = 0; j < V; ++j) {
          const double d_o = row(x.d_o, t, h, j), over = token.c + is.eps;
          ref(read_adjoint, j) = !is.attention_norm ? is.scale * d_o : token.c == 0 ? 0 : is.scale * d_o / over;
          if (is.attention_norm && token.c != 0) dc -= d_o * ref(token.o, j) / over;
        }
        for (int64_t d = 0; d < K; ++d) {
          const double q = row(x.q, t, hq, d);
          double dq = dc * ref(token.z_next, d);
          for (int64_t j = 0; j < V; ++j) {
            ref(D, d * V + j) += q * ref(read_adjoint, j);
            dq += ref(token.S_next, d * V + j) * ref(read_adjoint, j);
          }
          ref(dz, d) += dc * q;
          add(y.dq, t, hq, d, dq);
        }
        for (int64_t j = 0; j < V; ++j) {
          for (int64_t d = 0; d < K; ++d) ref(p, j) += ref(D, d * V + j) * row(x.k, t, hk, d);
          dbeta += ref(p, j) * ref(token.e, j);
          const double dv = beta(t) * ref(p, j), over = token.s + is.eps;
          add(y.dv, t, hv, j, dv);
          if (is.rule == Rule::linear) continue;
          ref(predicted_adjoint, j) = !is.attention_norm ? -dv : token.s == 0 ? 0 : -dv / over;
          if (is.attention_norm && token.s != 0) ds += dv * ref(token.predicted, j) / over;
        }
        add(y.dbeta, t, h, 0, dbeta);
        for (int64_t d = 0; d < K; ++d) {
          const double k = row(x.k, t, hk, d);
          double dk = is.attention_norm ? ref(dz, d) + ds * ref(token.z, d) : 0, dg = 0;
          ref(dz, d) += ds * k;
          for (int64_t j = 0; j < V; ++j) {
            double& at = ref(D, d * V + j);
            dk += at * ref(token.u, j);
            if (is.rule == Rule::delta) {
              dk += ref(token.S, d * V + j) * ref(predicted_adjoint, j);
              at += k * ref(predicted_adjoint, j);
            }
            if (gate(t, d) != -kInfinity) dg += at * ref(token.S, d * V + j);
            at = decayed(t, d, at);
          }
          if (is.attention_norm && gate(t, d) != -kInfinity) dg += ref(dz, d) * ref(token.z, d);
          ref(dz, d) = decayed(t, d, ref(dz, d));
          add(y.dk, t, hk, d, dk);
          if (gates > 0) add(y.dg, t, h, gates == 1 ? 0 : d, dg);
        }
      }
      for (int64_t d = 0; d < K; ++d) {
        for (int64_t j = 0; j < V; ++j) y.dh0.set(n, d, h, j, ref(D, d * V + j));
        if (is.attention_norm) y.dh0.set(n, d, h, V, ref(dz, d));
      }
    }
  return y;
}

// Of what was computed, against what is expected: the distance over the size of the latter; NaN where NaN or infinity
// stand in different places. Numbers between the rows are none of it.
inline double error(const Tensor& got, const Tensor& want) {
  if (!got.there() || want.array.count() == 0) return 0;
  double distance = 0, size = 0;
  for (int64_t b = 0; b < want.array.count() / want.b; ++b)
    for (int64_t t = 0; t < want.b / want.t; ++t)
      for (int64_t h = 0; h < want.t / want.h; ++h)
        for (int64_t i = 0; i < want.n; ++i) {
          const double a = got.get(b, t, h, i), w = want.get(b, t, h, i);
          if (std::isfinite(w) != std::isfinite(a)) return kNaN;
          if (!std::isfinite(w)) continue;
          distance += (a - w) * (a - w);
          size += w * w;
        }
  return size == 0 ? std::sqrt(distance) : std::sqrt(distance / size);
}

}  // namespace problems
