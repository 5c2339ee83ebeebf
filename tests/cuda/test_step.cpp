// Steps and diagnoses of kernels against the recurrence in double.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include "problems.hpp"
#include "recurrent/recurrent.hpp"

using namespace fwp;
using problems::Case;
using problems::Emulator;
using problems::Expected;
using problems::Layout;
using problems::Options;
using problems::Tensor;

namespace {

std::string name(const Options& of) {
  return (of.rule == Rule::delta ? "delta" : "linear") + std::string(" decay ") +
         std::to_string(static_cast<int>(of.decay)) + " dtype " + std::to_string(static_cast<int>(of.dtype)) + " K " +
         std::to_string(of.K) + " V " + std::to_string(of.V) + " T " + std::to_string(of.T) +
         (of.attention_norm ? " attention_norm" : "");
}

// The states are those that the step leaves.
Problem in_place(Case& x) {
  Problem p = x.problem();
  std::memcpy(x.hT.array.data(), x.h0.array.data(), x.h0.array.bytes().size());
  p.step = true;
  p.h0 = p.hT;
  p.slots = x.N;
  return p;
}
void step(Case& x, const Problem& p, std::vector<cuda::Memory> more = {}) {
  std::vector<unsigned char> workspace(cuda::recurrent::step_workspace(p) + 64);
  auto* const aligned = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  more.push_back({workspace.data(), workspace.size(), true});
  cuda::Queue queue = x.queue(std::move(more));
  cuda::recurrent::step(p, aligned, queue);
}

// What a number of this dtype may be off, at the output, and in float32 or float64.
double rounding(DType dtype) {
  return dtype == DType::f64 ? 1e-14 : dtype == DType::f32 ? 2e-6 : dtype == DType::f16 ? 5e-4 : 4e-3;
}

void check_step(const Options& of) {
  CAPTURE(name(of));
  Case x(of);
  step(x, in_place(x));
  const Expected y = problems::expected(x, false);
  CHECK(problems::error(x.o, y.o) < rounding(of.dtype));
  CHECK(problems::error(x.hT, y.hT) < rounding(accumulation(of.dtype)));
}

bool same_bits(const Tensor& a, const Tensor& b, int64_t batches, int64_t tokens, int64_t heads) {
  for (int64_t n = 0; n < batches; ++n)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < a.n; ++i) {
          const double x = a.get(n, t, h, i), y = b.get(n, t, h, i);
          if (x != y || std::signbit(x) != std::signbit(y)) return false;
        }
  return true;
}

}  // namespace

TEST_CASE("a step is the recurrence, for every rule, decay and dtype, in any order of threads") {
  for (const char* order : {"forward", "reverse", "random"})
    for (const Rule rule : {Rule::linear, Rule::delta})
      for (const Decay decay : {Decay::none, Decay::scalar, Decay::channel})
        for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
          for (const bool attention_norm : {false, true}) {
            const Emulator emulator(true, order);
            Options of;
            of.rule = rule;
            of.decay = decay;
            of.dtype = dtype;
            of.attention_norm = attention_norm;
            of.N = 1;
            of.T = 2;
            of.H = 2;
            of.K = 20;
            of.V = 36;
            of.scale = 0.25;
            of.float_gates = dtype == DType::f16;
            of.wide_keys = dtype == DType::bf16 && attention_norm;
            of.beta = rule == Rule::delta || decay == Decay::none;
            check_step(of);
          }
}

TEST_CASE("steps of any size") {
  const Emulator emulator(false, "random");
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16})
    for (const bool attention_norm : {false, true})
      for (const int64_t T : {0, 1, 3}) {
        Options of;
        of.dtype = dtype;
        of.decay = Decay::channel;
        of.attention_norm = attention_norm;
        of.T = T;
        for (const int64_t K : {0, 1, 3, 17, 64, 65, 128, 129, 256, 257, 300}) {
          of.K = K;
          of.V = 33;
          check_step(of);
        }
        for (const int64_t V : {0, 1, 2, 4, 31, 32, 64, 100, 128}) {
          of.K = 9;
          of.V = V;
          check_step(of);
        }
      }
}

TEST_CASE("grouped heads, packed sequences and no batch") {
  const Emulator emulator(true);
  Options of;
  of.H = 6;
  of.T = 2;
  of.q_group = 6;
  of.k_group = 3;
  of.v_group = 2;
  check_step(of);
  of.cu_seqlens = {0, 2, 2, 3};
  check_step(of);
  of.cu_seqlens = {};
  of.N = 0;
  check_step(of);
  of.N = 2;
  of.H = 0;
  of.q_group = of.k_group = of.v_group = 1;
  check_step(of);
}

TEST_CASE("layouts and the batch do not change a bit") {
  const Emulator emulator(true);
  for (const int64_t K : {24, 300}) {
    Options of;
    of.decay = Decay::scalar;
    of.N = 3;
    of.T = 2;
    of.K = K;
    of.V = 40;  // a whole tile by quads and a part of one
    Case x(of);
    step(x, in_place(x));
    for (const Layout layout : {Layout::bhtk, Layout::gaps}) {
      of.layout = layout;
      Case other(of);
      step(other, in_place(other));
      CHECK(same_bits(x.o, other.o, 3, 2, 2));
      CHECK(same_bits(x.hT, other.hT, 3, K, 2));
    }
    of.layout = Layout::bthk;
    Case alone(of);
    Problem p = in_place(alone);
    p.N = 1;
    for (Rows* rows : {&p.q, &p.k, &p.v, &p.beta, &p.g, &p.o})
      rows->data = static_cast<char*>(rows->data) + 2 * rows->b * item_size(rows->dtype);
    p.hT.data = static_cast<char*>(p.hT.data) + 2 * p.hT.n * 4;
    p.h0 = p.hT;
    step(alone, p);
    for (int64_t h = 0; h < 2; ++h) {
      for (int64_t t = 0; t < 2; ++t)
        for (int64_t j = 0; j < 40; ++j) CHECK(alone.o.get(2, t, h, j) == x.o.get(2, t, h, j));
      for (int64_t d = 0; d < K; ++d)
        for (int64_t j = 0; j < 40; ++j) CHECK(alone.hT.get(2, d, h, j) == x.hT.get(2, d, h, j));
    }
    if (K > 256) continue;  // by the recurrent form, which takes a few tokens at once
    Case single(of);
    Problem one = in_place(single);
    one.T = 1;
    step(single, one);
    for (Rows* rows : {&one.q, &one.k, &one.v, &one.beta, &one.g, &one.o})
      rows->data = static_cast<char*>(rows->data) + rows->t * item_size(rows->dtype);
    step(single, one);
    CHECK(same_bits(x.o, single.o, 3, 2, 2));
    CHECK(same_bits(x.hT, single.hT, 3, K, 2));
  }
}

TEST_CASE("slots of states, in any order, and sequences without one") {
  const Emulator emulator(true, "reverse");
  for (const bool attention_norm : {false, true}) {
    Options of;
    of.N = 3;
    of.T = 2;
    of.attention_norm = attention_norm;
    of.dtype = DType::f16;
    Case x(of), y(of);
    step(y, in_place(y));
    Problem p = in_place(x);
    const int64_t slots[3] = {2, kNoSlot, 0};
    p.state_indices = slots;
    for (int64_t d = 0; d < x.K; ++d)
      for (int64_t h = 0; h < x.H; ++h)
        for (int64_t j = 0; j < x.hT.n; ++j) {
          x.hT.set(2, d, h, j, x.h0.get(0, d, h, j));
          x.hT.set(0, d, h, j, x.h0.get(2, d, h, j));
          x.hT.set(1, d, h, j, 7);
        }
    step(x, p, {{slots, sizeof slots, false}});
    for (int64_t h = 0; h < x.H; ++h) {
      for (int64_t t = 0; t < x.T; ++t)
        for (int64_t j = 0; j < x.V; ++j)
          for (int64_t n = 0; n < 3; ++n) CHECK(x.o.get(n, t, h, j) == (n == 1 ? 0 : y.o.get(n, t, h, j)));
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t j = 0; j < x.hT.n; ++j) {
          CHECK(x.hT.get(2, d, h, j) == y.hT.get(0, d, h, j));
          CHECK(x.hT.get(0, d, h, j) == y.hT.get(2, d, h, j));
          CHECK(x.hT.get(1, d, h, j) == 7);
        }
    }
  }
}

TEST_CASE("a reset forgets even NaN, and gates of any strength are as the recurrence has them") {
  const Emulator emulator(true);
  for (const int64_t K : {16, 300})
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const bool attention_norm : {false, true}) {
        Options of;
        of.decay = decay;
        of.K = K;
        of.T = 4;
        of.attention_norm = attention_norm;
        Case x(of);
        for (int64_t d = 0; d < K; ++d) x.h0.set(0, d, 0, 5, problems::kNaN);
        if (attention_norm) x.h0.set(0, 3, 0, x.V, problems::kInfinity);
        for (int64_t i = 0; i < x.g.n; ++i) {
          x.g.set(0, 2, 0, i, -problems::kInfinity);
          x.g.set(1, 1, 1, i, i % 2 == 0 ? -1e4 : 0.5);
        }
        step(x, in_place(x));
        const Expected y = problems::expected(x, false);
        CHECK(std::isnan(x.o.get(0, 0, 0, 5)));
        CHECK(std::isfinite(x.o.get(0, 2, 0, 5)));
        CHECK(problems::error(x.o, y.o) < 1e-5);
        CHECK(problems::error(x.hT, y.hT) < 1e-5);
      }
}

TEST_CASE("blind reads are zeros, whatever the state") {
  const Emulator emulator(true);
  for (const Rule rule : {Rule::linear, Rule::delta}) {
    Options of;
    of.rule = rule;
    of.attention_norm = true;
    of.T = 1;
    Case x(of);
    for (int64_t d = 0; d < x.K; ++d) {
      x.h0.set(0, d, 0, x.V, 0);  // nothing gathered: the first read of sequence 0 is blind
      for (int64_t j = 0; j < x.V; ++j) x.h0.set(0, d, 0, j, problems::kNaN);
      x.q.set(1, 0, 1, d, 0);  // and the output of head 1 of sequence 1
    }
    x.v.set(1, 0, 1, 2, problems::kNaN);  // which the state keeps
    step(x, in_place(x));
    for (int64_t j = 0; j < x.V; ++j) CHECK(x.o.get(1, 0, 1, j) == 0);
    CHECK(std::isnan(x.o.get(0, 0, 0, 0)));
    const Expected y = problems::expected(x, false);
    CHECK(problems::error(x.o, y.o) < 1e-5);
    CHECK(problems::error(x.hT, y.hT) < 1e-5);
  }
}

TEST_CASE("what is not finite reaches what depends on it") {
  const Emulator emulator(true);
  for (const Rule rule : {Rule::linear, Rule::delta}) {
    Options of;
    of.rule = rule;
    of.T = 3;
    Case x(of);
    x.v.set(0, 1, 0, 2, problems::kNaN);
    x.q.set(1, 0, 0, 3, problems::kNaN);
    step(x, in_place(x));
    const Expected y = problems::expected(x, false);
    CHECK(problems::error(x.o, y.o) < 1e-5);
    CHECK(problems::error(x.hT, y.hT) < 1e-5);
  }
}

namespace {

// The probes of fwp.h, token by token.
void check_diagnosis(const Options& of) {
  CAPTURE(name(of));
  Case x(of);
  Problem p = x.problem();
  problems::Array probes(accumulation(of.dtype), x.B * x.T * x.H * kProbes);
  p.o = {probes.data(), probes.dtype(), x.T * x.H * kProbes, x.H * kProbes, kProbes, 1};
  cuda::Queue queue = x.queue({{probes.data(), probes.bytes().size(), true}});
  cuda::recurrent::diagnose(p, queue);

  const auto at = [](std::vector<double>& numbers, int64_t i) -> double& { return numbers[static_cast<size_t>(i)]; };
  double distance = 0, size = 0;
  for (int64_t n = 0; n < x.N; ++n)
    for (int64_t h = 0; h < x.H; ++h) {
      std::vector<double> S(static_cast<size_t>(x.K * x.V)), z(static_cast<size_t>(x.K));
      for (int64_t d = 0; d < x.K && x.h0.there(); ++d) {
        for (int64_t j = 0; j < x.V; ++j) at(S, d * x.V + j) = x.h0.get(n, d, h, j);
        if (of.attention_norm) at(z, d) = x.h0.get(n, d, h, x.V);
      }
      for (int64_t t = x.begin(n); t < x.begin(n) + x.length(n); ++t) {
        const int64_t b = x.batch(n);
        const double beta = x.beta.there() ? x.beta.get(b, t, h) : 1;
        double want[kProbes] = {};
        for (int64_t d = 0; d < x.K; ++d) {
          const double g = of.decay == Decay::none ? 0 : x.g.get(b, t, h, of.decay == Decay::channel ? d : 0);
          const double a = std::exp(g), k = x.k.get(b, t, h / of.k_group, d), q = x.q.get(b, t, h / of.q_group, d);
          for (int64_t j = 0; j < x.V; ++j) at(S, d * x.V + j) = g == -problems::kInfinity ? 0 : a * at(S, d * x.V + j);
          at(z, d) = g == -problems::kInfinity ? 0 : a * at(z, d);
          want[6] += k * k;
          want[7] += k;
          want[8] += at(z, d) * k;
          at(z, d) += k;
          want[9] += at(z, d) * q;
          want[10] += std::fabs(at(z, d));
          want[11] = d == 0 ? at(z, d) : std::max(want[11], at(z, d));
        }
        const auto divided = [&](double read, double by) {
          return !of.attention_norm ? read : by == 0 ? 0 : read / (by + of.eps);
        };
        for (int64_t j = 0; j < x.V; ++j) {
          const double v = x.v.get(b, t, h / of.v_group, j);
          double read = 0, left = 0;
          for (int64_t d = 0; d < x.K; ++d) read += at(S, d * x.V + j) * x.k.get(b, t, h / of.k_group, d);
          read = divided(read, want[8]);
          const double u = beta * (of.rule == Rule::delta ? v - read : v);
          for (int64_t d = 0; d < x.K; ++d) {
            const double k = x.k.get(b, t, h / of.k_group, d);
            double& s = at(S, d * x.V + j);
            s += k * u;
            left += s * k;
            want[5] += s * s;
          }
          left = divided(left, want[8] + want[6]);
          want[0] += v * v;
          want[1] += read * read;
          want[2] += v * read;
          want[3] += (v - read) * (v - read);
          want[4] += (v - left) * (v - left);
        }
        for (int64_t i = 0; i < kProbes; ++i) {
          const double got = probes.get(((b * x.T + t) * x.H + h) * kProbes + i);
          CHECK(std::isfinite(got) == std::isfinite(want[i]));
          if (!std::isfinite(want[i])) continue;
          distance += (got - want[i]) * (got - want[i]) / (1 + want[i] * want[i]);
          size += 1;
        }
      }
    }
  CHECK(std::sqrt(distance) <= 1e-30 + std::sqrt(size) * rounding(accumulation(of.dtype)));
}

}  // namespace

TEST_CASE("probes are those of the definition") {
  for (const char* order : {"forward", "reverse", "random"})
    for (const Rule rule : {Rule::linear, Rule::delta})
      for (const Decay decay : {Decay::none, Decay::scalar, Decay::channel})
        for (const bool attention_norm : {false, true}) {
          const Emulator emulator(true, order);
          Options of;
          of.rule = rule;
          of.decay = decay;
          of.attention_norm = attention_norm;
          of.T = 3;
          of.K = 20;
          of.V = 36;
          of.q_group = 2;
          of.k_group = 2;
          check_diagnosis(of);
        }
  const Emulator emulator(true);
  Options of;
  of.attention_norm = true;
  of.dtype = DType::f64;
  of.cu_seqlens = {0, 2, 2, 5};
  check_diagnosis(of);
  of.dtype = DType::bf16;
  of.h0 = false;
  of.wide_keys = true;
  check_diagnosis(of);
  of.cu_seqlens = {};
  of.T = 2;
  for (const int64_t n : {0, 1, 33}) {
    of.K = n;
    of.V = 5;
    check_diagnosis(of);
    of.K = 5;
    of.V = n;
    check_diagnosis(of);
  }
  of.K = 3000;  // narrow tiles
  of.N = of.H = 1;
  check_diagnosis(of);
}

TEST_CASE("channels that a key is lost in are counted, and a reset forgets NaN") {
  Options of;
  of.N = of.H = 1;
  of.T = 2;
  of.K = 8;
  of.attention_norm = true;
  of.decay = Decay::scalar;
  Case x(of);
  x.g.set(0, 0, 0, 0, 0);
  x.g.set(0, 1, 0, 0, -problems::kInfinity);
  for (int64_t d = 0; d < 8; ++d) {
    x.h0.set(0, d, 0, 16, d < 3 ? 1e9 : 0);
    x.k.set(0, 0, 0, d, 1 + static_cast<double>(d));
    x.h0.set(0, d, 0, 1, problems::kNaN);
  }
  Problem p = x.problem();
  problems::Array probes(DType::f32, 2 * kProbes);
  p.o = {probes.data(), DType::f32, 2 * kProbes, kProbes, kProbes, 1};
  cuda::Queue queue = x.queue({{probes.data(), probes.bytes().size(), true}});
  cuda::recurrent::diagnose(p, queue);
  CHECK(probes.get(12) == 3);
  CHECK(std::isnan(probes.get(1)));
  CHECK(probes.get(11) == 1e9);
  for (int64_t i = 0; i < kProbes; ++i) CHECK(std::isfinite(probes.get(kProbes + i)));
  CHECK(probes.get(kProbes + 12) == 0);
}
