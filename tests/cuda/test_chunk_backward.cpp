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

std::string text(const Options& is) {
  return std::to_string(static_cast<int>(is.rule)) + std::to_string(static_cast<int>(is.decay)) + " T " +
         std::to_string(is.T) + " K " + std::to_string(is.K) + " V " + std::to_string(is.V);
}

void check(const Case& x, double factor = 1) {
  const Expected y = expected(x, true);
  const std::vector<const Tensor*> want = {&y.dq, &y.dk, &y.dv, &y.dbeta, &y.dg, &y.dh0};
  static const char* const names[] = {"dq", "dk", "dv", "dbeta", "dg", "dh0"};
  for (size_t i = 0; i < want.size(); ++i) {
    const Tensor& got = x.*kGradients[i];
    const double e = error(got, *want[i]);
    CAPTURE(std::string(names[i]));
    CHECK(e <= factor * tolerance(got));
    if (std::getenv("SHOW") != nullptr) MESSAGE(text(x.options), " ", std::string(names[i]), " ", e);
  }
}

// Both rules, every decay.
void for_rules(Options options, const std::function<void(const Options&)>& f) {
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const Decay decay : {Decay::none, Decay::scalar, Decay::channel}) {
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
  options.float_gates = true;
  return options;
}

}  // namespace

TEST_CASE("gradients are those of the recurrence, of any size") {
  struct Size {
    int64_t T, K, V;
  };
  for (const Size& size :
       {Size{20, 3, 1}, {70, 16, 16}, {64, 31, 70}, {130, 64, 64}, {70, 100, 31}, {65, 128, 128}, {66, 40, 200}}) {
    const Emulator emulator(size.K <= 40);
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
  const Emulator emulator(false);
  const std::vector<std::vector<double>> gates = {
      {0},   {-0.01}, {-0.1},       {-5},   {-20},
      {-60}, {-1e4},  {-kInfinity}, {0.05}, {0, -20, -0.1, -kInfinity, -5, -100, -1, 0.3}};
  for (const auto& gate : gates)
    for_rules(small(), [&](const Options& options) {
      if (options.decay == Decay::none) return;
      Case x(options);
      for (int64_t t = 0; t < x.T; ++t)
        for (int64_t i = 0; i < x.g.n; ++i) {
          const double g = gate[static_cast<size_t>(t + 3 * i) % gate.size()];
          x.g.set(0, t, 0, i, options.decay == Decay::channel && g > 0 ? 0.2 * g : g);
        }
      CAPTURE(gate[0]);
      CHECK(run(x) == none_of(x));
      check(x);
      // However small, dg keeps its digits: its terms do not cancel for strong gates.
      const Expected y = expected(x, true);
      for (int64_t t = 0; t < x.T; ++t) {
        double size = 0;
        for (int64_t i = 0; i < x.K; ++i)
          size += std::abs(x.q.get(0, t, 0, i) * y.dq.get(0, t, 0, i)) +
                  std::abs(x.k.get(0, t, 0, i) * y.dk.get(0, t, 0, i));
        for (int64_t i = 0; i < x.g.n; ++i) {
          const double g = x.g.get(0, t, 0, i), dg = x.dg.get(0, t, 0, i);
          if (g <= -0.1) CHECK(std::abs(dg - y.dg.get(0, t, 0, i)) <= 2e-3 * size * std::exp(g / 2));
          if (g == -kInfinity) CHECK(dg == 0);
        }
      }
    });
}

TEST_CASE("numbers of any range") {
  const Emulator emulator(false);
  for (const double keys : {1e-3, 1.0, 30.0})
    for (const double values : {1e-3, 1e3})
      for (const double adjoints : {1e-8, 1e4})
        for_rules(small(), [&](Options options) {
          if (options.decay == Decay::none) return;
          options.scale = 0.3;
          Case x(options);
          const auto scale = [](Tensor& of, double factor) {
            for (int64_t i = 0; i < of.array.count(); ++i) of.array.set(i, factor * of.array.get(i));
          };
          if (keys > 1 && options.rule == Rule::delta) return;
          scale(x.k, keys);
          scale(x.q, 1 / keys);
          scale(x.v, values);
          scale(x.d_o, adjoints);
          scale(x.h0, values);
          scale(x.d_hT, adjoints);
          CAPTURE(keys);
          CAPTURE(values);
          CAPTURE(adjoints);
          CHECK(run(x) == none_of(x));
          check(x);
        });
}

TEST_CASE("write strengths of 0 and 2, keys that are much alike") {
  for (const Decay decay : {Decay::scalar, Decay::channel}) {
    Options options = small();
    options.decay = decay;
    CAPTURE(text(options));
    Case x(options);
    for (int64_t t = 0; t < x.T; ++t) {
      x.beta.set(0, t, 0, 0, t % 3 == 0 ? 0 : t % 3 == 1 ? 2 : 1e-6);
      for (int64_t i = 0; i < x.K; ++i) x.k.set(0, t, 0, i, 0.2 + 0.25 * x.k.get(0, t, 0, i));
    }
    CHECK(run(x) == none_of(x));
    check(x, 2);
  }
}

TEST_CASE("small adjoints of late tokens keep their digits, or the head is given up") {
  const Emulator emulator(false);
  Options small_one = small();
  small_one.T = 64;
  for_rules(small_one, [](const Options& is) {
    for (const int power : {10, 20, 26, 30, 40}) {
      Case x(is);
      for (int64_t t = 0; t < x.T; ++t)
        for (int64_t i = 0; i < x.K; ++i) x.q.set(0, t, 0, i, 1 + x.q.get(0, t, 0, i));
      for (int64_t t = 20; t < x.T; ++t)
        for (int64_t i = 0; i < x.V; ++i) x.d_o.set(0, t, 0, i, std::ldexp(x.d_o.get(0, t, 0, i), -power));
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t i = 0; i < x.V; ++i) x.d_hT.set(0, d, 0, i, std::ldexp(x.d_hT.get(0, d, 0, i), -power));
      CAPTURE(power);
      const Left left = run(x);
      if (power == 10) CHECK(left[0] == 0);
      if (left[0] == 1) continue;
      const Expected y = expected(x, true);
      const auto late = [&](const Tensor& got, const Tensor& want) {
        double wrong = 0, size = 0;
        for (int64_t t = 20; t < x.T; ++t)
          for (int64_t i = 0; i < got.n; ++i) {
            wrong += std::pow(got.get(0, t, 0, i) - want.get(0, t, 0, i), 2);
            size += std::pow(want.get(0, t, 0, i), 2);
          }
        return std::sqrt(wrong / size);
      };
      CHECK(late(x.dv, y.dv) < 4e-3);
      CHECK(late(x.dk, y.dk) < 8e-3);
      if (is.rule == Rule::delta) CHECK(late(x.dbeta, y.dbeta) < 8e-3);
    }
  });
}

TEST_CASE("packed sequences, grouped heads, any layout and scale") {
  Options options = small();
  options.H = every_case() ? 4 : 2;
  options.q_group = 2;
  options.k_group = options.H;
  options.V = 20;
  options.K = 40;
  options.scale = 0.4;
  options.cu_seqlens = {0, 0, 65, 66, 66, 100, 100};
  const Layout layouts[] = {Layout::bthk, Layout::bhtk, Layout::gaps, Layout::gaps};
  int next = 0;
  for_rules(options, [&](Options is) {
    is.layout = layouts[next++];
    is.wide_keys = is.layout == Layout::bhtk;
    is.dtype = is.layout == Layout::gaps ? DType::f16 : DType::bf16;
    is.v_group = is.layout == Layout::bthk ? is.H : 1;
    Case x(is);
    CHECK(run(x) == none_of(x));
    check(x);
  });
}

TEST_CASE("absent inputs and gradients") {
  const Emulator emulator(false);
  Options options = small();
  options.h0 = options.d_hT = options.dh0 = false;
  for_rules(options, [](Options is) {
    is.beta = is.rule == Rule::delta;
    Case x(is);
    CHECK(run(x) == none_of(x));
    check(x);
    for (Rows Problem::* absent : {&Problem::dq, &Problem::dk, &Problem::dv, &Problem::dbeta, &Problem::dg}) {
      Case y(is);
      CHECK(run(y, 0, [&](Problem& p) { p.*absent = Rows(); }) == none_of(y));
      for (Tensor Case::* gradient : kGradients) {
        bool same = (y.*gradient).array.bytes() == (x.*gradient).array.bytes(), untouched = true;
        for (int64_t i = 0; i < (y.*gradient).array.count(); ++i) untouched &= std::isnan((y.*gradient).array.get(i));
        CHECK((same || untouched));
      }
    }
  });
}

namespace {

// Gradients of one sequence and head, as bits of its numbers.
std::vector<double> numbers_of(const Case& x, int64_t n, int64_t h) {
  std::vector<double> all;
  for (Tensor Case::* gradient : kGradients) {
    const Tensor& y = x.*gradient;
    const bool state = gradient == &Case::dh0;
    for (int64_t t = 0; t < (state ? x.K : x.length(n)); ++t)
      for (int64_t i = 0; i < y.n; ++i)
        all.push_back(state ? y.get(n, t, h, i) : y.get(x.batch(n), x.begin(n) + t, h, i));
  }
  return all;
}

// Gives a sequence and head of a case the inputs of another case's.
void copy_inputs(const Case& from, int64_t n, int64_t h, Case& to, int64_t m, int64_t j) {
  for (Tensor Case::* input : {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g, &Case::d_o})
    for (int64_t t = 0; t < from.length(n); ++t)
      for (int64_t i = 0; i < (from.*input).n; ++i)
        (to.*input).set(to.batch(m), to.begin(m) + t, j, i, (from.*input).get(from.batch(n), from.begin(n) + t, h, i));
  for (Tensor Case::* input : {&Case::h0, &Case::d_hT})
    for (int64_t d = 0; d < from.K; ++d)
      for (int64_t i = 0; i < (from.*input).n; ++i) (to.*input).set(m, d, j, i, (from.*input).get(n, d, h, i));
}

}  // namespace

TEST_CASE("no bit depends on the batch, the layout or the window") {
  const Emulator emulator(false);
  Options options = small();
  options.T = 130;
  options.K = 24;
  options.V = 72;
  for_rules(options, [](Options is) {
    Case alone(is);
    run(alone);
    const auto bits = numbers_of(alone, 0, 0);

    for (const int64_t window : {1, 2}) {
      if (!every_case() && window == 2) continue;
      Case x(is);
      run(x, window);
      CHECK(numbers_of(x, 0, 0) == bits);
    }
    if (!every_case() && is.rule == Rule::linear) return;
    is.H = 2;
    is.layout = Layout::gaps;
    is.cu_seqlens = {0, 70, 70, 200, 220};
    Case packed(is);
    copy_inputs(alone, 0, 0, packed, 2, 1);
    run(packed);
    CHECK(numbers_of(packed, 2, 1) == bits);
    Case windows(is);
    copy_inputs(alone, 0, 0, windows, 2, 1);
    run(windows, 2);
    CHECK(numbers_of(windows, 2, 1) == bits);
    for (int64_t n = 0; n < windows.N; ++n) CHECK(numbers_of(windows, n, 0) == numbers_of(packed, n, 0));
  });
}

TEST_CASE("no bit depends on which thread is first") {
  for (const Decay decay : {Decay::scalar, Decay::channel}) {
    Options options = small();
    options.decay = decay;
    Case forward(options);
    run(forward);
    for (const char* order : {"reverse", "random"}) {
      Case other(options);
      const Emulator emulator(true, order);
      run(other);
      CHECK(numbers_of(other, 0, 0) == numbers_of(forward, 0, 0));
    }
  }
}

TEST_CASE("heads with data that are not finite are left, and others are as they were") {
  const Emulator emulator(false);
  Options options = small();
  for (const Decay decay : {Decay::scalar, Decay::channel}) {
    options.decay = decay;
    options.H = 3;
    options.q_group = 1;
    CAPTURE(text(options));
    Case fine(options);
    run(fine);
    for (const double bad : {kNaN, kInfinity})
      for (Tensor Case::* input :
           {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g, &Case::d_o, &Case::h0, &Case::d_hT}) {
        if (!every_case() && bad == kInfinity && input != &Case::k) continue;
        Case x(options);
        (x.*input).set(0, 3, 1, 0, bad);
        CHECK(run(x) == Left{0, 1, 0});
        for (const int64_t h : {0, 2}) CHECK(numbers_of(x, 0, h) == numbers_of(fine, 0, h));
      }
    options.H = 4;
    options.q_group = 2;
    Case grouped(options);
    grouped.v.set(0, 3, 2, 0, kNaN);
    CHECK(run(grouped) == Left{0, 0, 1, 1});
  }
}
