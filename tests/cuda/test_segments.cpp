// Sequences cut into segments, under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "problems.hpp"
#include "segments.hpp"

using namespace problems;
namespace segments = fwp::cuda::segments;

namespace {

// Forward and backward, each in a workspace full of NaN.
void run(Case& x, int64_t length) {
  const Problem p = x.problem();
  for (const bool backward : {false, true}) {
    const size_t bytes = backward ? segments::backward_workspace(p, length) : segments::forward_workspace(p, length);
    Workspace workspace(bytes);
    fwp::cuda::Queue queue = x.queue({workspace.memory()});
    (backward ? segments::backward : segments::forward)(p, length, workspace.data(), queue);
  }
}

// What was computed, by name.
struct Result {
  const char* name;
  Tensor Case::* got;
  Tensor Expected::* want;
};
constexpr Result kResults[] = {{"o", &Case::o, &Expected::o},    {"hT", &Case::hT, &Expected::hT},
                               {"dq", &Case::dq, &Expected::dq}, {"dk", &Case::dk, &Expected::dk},
                               {"dv", &Case::dv, &Expected::dv}, {"dbeta", &Case::dbeta, &Expected::dbeta},
                               {"dg", &Case::dg, &Expected::dg}, {"dh0", &Case::dh0, &Expected::dh0}};

bool is_half(const Case& x) { return x.options.dtype == DType::f16 || x.options.dtype == DType::bf16; }
bool is_state(const Tensor& of, const Case& x) { return &of == &x.hT || &of == &x.dh0; }

// Those of sequences that stay whole (test_recurrent.cpp, test_chunk_*.cpp).
double tolerance(const Case& x, const Tensor& of) {
  switch (of.array.dtype()) {
    case DType::f64:
      return 3e-15;
    case DType::f32:
      return is_half(x) ? 9e-4 : 1e-6;
    case DType::f16:
      return 9e-4;
    default:
      return 2.5e-3;
  }
}

std::string text(const Options& is) {
  return "rule " + std::to_string(static_cast<int>(is.rule)) + " decay " + std::to_string(static_cast<int>(is.decay)) +
         " dtype " + std::to_string(static_cast<int>(is.dtype));
}

void check(const Case& x, double times = 1) {
  const Expected want = expected(x, true);
  for (const Result& result : kResults) {
    const Tensor& got = x.*result.got;
    INFO(result.name, " ", text(x.options), " T ", x.T, " K ", x.K, " V ", x.V);
    const double e = error(got, want.*result.want);
    CHECK(e <= times * tolerance(x, got));
    if (std::getenv("SHOW") != nullptr && got.there()) MESSAGE(result.name, " ", text(x.options), " ", e);
  }
}

// Whether a head of a sequence has the same bits in both.
bool same_head(const Case& a, const Case& b, int64_t n, int64_t h) {
  bool same = true;
  for (const Result& result : kResults) {
    const Tensor &x = a.*result.got, &y = b.*result.got;
    for (int64_t t = 0; t < (is_state(x, a) ? a.K : a.length(n)); ++t)
      for (int64_t i = 0; i < x.n; ++i) {
        const int64_t batch = is_state(x, a) ? n : a.batch(n), token = is_state(x, a) ? t : a.begin(n) + t;
        same = same && x.get(batch, token, h, i) == y.get(batch, token, h, i);
      }
  }
  return same;
}

template <class F>
void each_kind(const F& f) {
  for (const Rule rule : kRules)
    for (const Decay decay : kDecays) {
      Options options;
      options.rule = rule;
      options.decay = decay;
      f(options);
    }
}

}  // namespace

TEST_CASE("which calls are cut") {
  Options is;
  is.dtype = DType::bf16;
  const auto length = [&](Rule rule, int64_t N, int64_t T, int64_t H, int64_t D, auto change) {
    Case x(is);
    Problem p = x.problem();
    p.rule = rule;
    p.N = N;
    p.T = T;
    p.H = H;
    p.K = p.V = D;
    change(p);
    return segments::length(p);
  };
  const auto nothing = [](Problem&) {};
  const auto f32 = [](Problem& p) { p.dtype = p.q.dtype = p.k.dtype = p.v.dtype = DType::f32; };
  const auto norm = [](Problem& p) { p.attention_norm = true; };
  CHECK(length(Rule::delta, 1, 131072, 1, 128, nothing) == 2048);
  CHECK(length(Rule::delta, 1, 131072, 8, 128, nothing) == 2048);
  CHECK(length(Rule::delta, 1, 1 << 20, 8, 128, nothing) == 16384);
  CHECK(length(Rule::delta, 1, 8192, 1, 128, nothing) == 2048);
  CHECK(length(Rule::delta, 2, 8192, 1, 128, nothing) == 2048);
  CHECK(length(Rule::linear, 1, 131072, 1, 128, nothing) == 1024);
  CHECK(length(Rule::linear, 1, 2048, 4, 64, nothing) == 512);
  CHECK(length(Rule::delta, 1, 1024, 1, 64, f32) == 256);
  CHECK(length(Rule::linear, 1, 4096, 1, 64, norm) == 256);
  // Enough heads, too few tokens, no map.
  CHECK(length(Rule::delta, 1, 131072, 32, 128, nothing) == 0);
  CHECK(length(Rule::delta, 8, 8192, 16, 128, nothing) == 0);
  CHECK(length(Rule::linear, 8, 65536, 16, 64, nothing) == 0);
  CHECK(length(Rule::delta, 1, 8191, 1, 128, nothing) == 0);
  CHECK(length(Rule::delta, 4, 8191, 1, 128, nothing) == 0);
  CHECK(length(Rule::linear, 1, 2047, 1, 128, nothing) == 0);
  CHECK(length(Rule::delta, 1, 1023, 1, 64, f32) == 0);
  CHECK(length(Rule::linear, 1, 131072, 1, 257, nothing) == 0);
  CHECK(length(Rule::delta, 1, 131072, 1, 128, norm) == 0);
  CHECK(length(Rule::delta, 1, 131072, 1, 128, [](Problem& p) { p.step = true; }) == 0);
  for (int64_t Problem::* size : {&Problem::N, &Problem::T, &Problem::H, &Problem::K, &Problem::V})
    for (const int64_t n : {int64_t{0}, int64_t{1} << 62})
      CHECK(length(Rule::delta, 1, 8192, 1, 64, [&](Problem& p) { p.*size = n; }) == 0);
  // Packed sequences, by how long they are on average.
  int64_t offsets[1] = {};
  CHECK(length(Rule::delta, 4, 32768, 1, 64, [&](Problem& p) { p.cu_seqlens = offsets; }) == 2048);
  CHECK(length(Rule::delta, 4, 32767, 1, 64, [&](Problem& p) { p.device_cu_seqlens.data = offsets; }) == 0);

  // It takes the memory of as many short sequences, and some for what they do to states.
  for (const Rule rule : kRules)
    for (const int64_t D : {64, 128, 256})
      for (int64_t T = 1024; T <= 1 << 20; T *= 4)
        for (const int64_t H : {1, 4, 16}) {
          Case x(is);
          Problem p = x.problem();
          p.rule = rule;
          p.N = 1;
          p.T = T;
          p.H = H;
          p.K = p.V = D;
          const int64_t cut = segments::length(p);
          if (cut == 0) continue;
          CAPTURE(T);
          CAPTURE(H);
          CAPTURE(D);
          CAPTURE(cut);
          CHECK(cut % 64 == 0);
          CHECK(T / cut >= 4);
          Problem batch = p;
          batch.N = (T + cut - 1) / cut;
          batch.T = cut;
          const size_t forward = segments::forward_workspace(batch, 0),
                       backward = segments::backward_workspace(batch, 0);
          const size_t maps = size_t{300} << 20;
          CHECK(segments::forward_workspace(p, cut) < forward + maps);
          CHECK(segments::backward_workspace(p, cut) < std::max(forward, backward) + maps);
        }
}

TEST_CASE("every rule, decay and dtype, batches in any layout") {
  const Emulator emulator(false);
  int next = 0;
  each_kind([&](Options options) {
    for (const DType dtype : kDTypes) {
      const bool half = dtype == DType::f16 || dtype == DType::bf16;
      options.dtype = dtype;
      options.float_gates = half;
      if (!every_case() && dtype == (options.rule == Rule::linear ? DType::bf16 : DType::f16)) continue;
      options.T = half ? 139 : 45;
      options.K = half ? 32 : 11;
      options.V = half ? 24 : 5;
      options.H = options.v_group = half ? 1 : 1 + next % 2;
      options.scale = 0.7;
      const Layout layouts[] = {Layout::bthk, Layout::bhtk, Layout::gaps};
      options.layout = layouts[next++ % 3];
      Case x(options);
      run(x, half ? 64 : 16);
      check(x, half ? 1 : 2);
    }
  });
}

TEST_CASE("packed sequences, empty ones and single tokens, grouped heads") {
  const Emulator emulator(false);
  each_kind([](Options options) {
    for (const bool half : {false, true}) {
      if (half && options.decay != Decay::scalar) continue;
      options.dtype = half ? DType::bf16 : DType::f32;
      options.cu_seqlens =
          half ? std::vector<int64_t>{0, 0, 64, 65, 65, 230, 230} : std::vector<int64_t>{0, 0, 16, 17, 17, 60, 93, 93};
      options.H = half ? 2 : 4;
      options.q_group = 2;
      options.k_group = options.H;
      options.K = 20;
      options.V = 9;
      options.layout = Layout::gaps;
      options.wide_keys = half;
      Case x(options);
      run(x, half ? 64 : 16);
      check(x, half ? 1 : 2);
    }
  });
}

TEST_CASE("in any order of the threads, with all of the emulator's checks") {
  for (const bool half : {false, true})
    each_kind([&](Options options) {
      if (half && options.decay != Decay::scalar) return;
      options.dtype = half ? DType::f16 : DType::f32;
      options.N = options.H = 1;
      options.T = half ? 130 : 19;
      options.K = 33;
      options.V = 10;
      Case forward(options), random(options);
      {
        const Emulator emulator(false, "forward");
        run(forward, half ? 64 : 8);
      }
      {
        const Emulator emulator(true, "random");
        run(random, half ? 64 : 8);
      }
      check(forward, half ? 2 : 3);
      CHECK(same_head(forward, random, 0, 0));
    });
}

TEST_CASE("linear attention with attention_norm, whose z is a column of the state") {
  const Emulator emulator(false);
  for (const Decay decay : kDecays)
    for (const DType dtype : {DType::f32, DType::f64}) {
      Options options;
      options.rule = Rule::linear;
      options.decay = decay;
      options.dtype = dtype;
      options.attention_norm = true;
      options.T = 50;
      options.K = 21;
      options.V = 40;
      options.H = 1;
      Case x(options);
      run(x, 16);
      check(x, 5);
    }
}

TEST_CASE("sizes") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const int64_t K : {1, 2, 100, 129, 530}) {
      Options options;
      options.rule = rule;
      options.decay = Decay::channel;
      options.N = options.H = 1;
      options.T = K > 200 ? 17 : 33;
      options.K = K;
      options.V = K == 100 ? 35 : 3;
      Case x(options);
      run(x, 8);
      check(x, 3);
    }
}

TEST_CASE("what is absent") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const bool half : {false, true}) {
      Options options;
      options.rule = rule;
      options.dtype = half ? DType::bf16 : DType::f32;
      options.decay = Decay::scalar;
      options.N = options.H = 1;
      options.T = half ? 200 : 50;
      options.beta = rule == Rule::delta;
      options.h0 = options.hT = options.d_hT = options.dh0 = false;
      Case x(options);
      run(x, half ? 64 : 16);
      check(x, 2);
    }
}

TEST_CASE("strong gates, growth and resets") {
  const Emulator emulator(false);
  for (const bool half : {false, true})
    for (const Rule rule : kRules)
      for (const Decay decay : {Decay::scalar, Decay::channel}) {
        if (half && decay == Decay::channel) continue;
        Options options;
        options.rule = rule;
        options.decay = decay;
        options.dtype = half ? DType::bf16 : DType::f32;
        options.float_gates = true;
        options.N = 1;
        options.T = half ? 200 : 70;
        options.K = 11;
        options.V = 6;
        Case x(options);
        const double gates[] = {-kInfinity, -1000, -50, -30, 0.2, -0.1, 0, -2};
        for (int64_t h = 0; h < x.H; ++h)
          for (int64_t t = 0; t < x.T; ++t)
            for (int64_t i = 0; i < x.g.n; ++i) {
              const int64_t draw = (7 * t + 5 * h + 11 * i) % (half ? 199 : 61);
              x.g.set(0, t, h, i, draw < 8 ? gates[draw] : h == 0 ? -0.01 : 0.01);
            }
        run(x, half ? 64 : 16);
        check(x, half ? 2 : 20);
      }
}

TEST_CASE("what is not finite reaches what depends on it, and no other head") {
  const Emulator emulator(false);
  for (const bool half : {false, true})
    for (const Rule rule : kRules) {
      Options options;
      options.rule = rule;
      options.decay = Decay::scalar;
      options.dtype = half ? DType::f16 : DType::f32;
      options.N = 1;
      options.H = 2;
      options.T = half ? 135 : 37;
      options.K = 12;
      options.V = 5;
      const int64_t length = half ? 64 : 16, at = length + 3;
      Case clean(options);
      run(clean, length);
      for (const double value : {kNaN, kInfinity})
        for (Tensor Case::* of : {&Case::v, &Case::k, &Case::beta, &Case::g, &Case::d_o, &Case::h0, &Case::d_hT}) {
          if (!every_case() && of != &Case::v && (half || value == kInfinity)) continue;
          Case x(options);
          (x.*of).set(0, of == &Case::h0 || of == &Case::d_hT ? 3 : at, 1, 0, value);
          run(x, length);
          CHECK(same_head(clean, x, 0, 0));
          // In its own head, what the recurrence has.
          const Expected want = expected(x, true);
          for (const Result& result : kResults) {
            const Tensor &got = x.*result.got, &exact = want.*result.want;
            if (!got.there() || result.got == &Case::dh0) continue;
            for (int64_t t = 0; t < (is_state(got, x) ? x.K : x.T); ++t)
              for (int64_t i = 0; i < got.n; ++i) {
                INFO(result.name, " ", text(options), " ", t);
                REQUIRE(std::isfinite(got.get(0, t, 1, i)) == std::isfinite(exact.get(0, t, 1, i)));
              }
          }
        }
    }
}

TEST_CASE("a reset clears even NaN, in another segment") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const int64_t at : {32, 39}) {
        Options options;
        options.rule = rule;
        options.decay = decay;
        options.N = options.H = 1;
        options.T = 70;
        Case x(options);
        for (int64_t i = 0; i < x.g.n; ++i) x.g.set(0, at, 0, i, -kInfinity);
        x.v.set(0, 9, 0, 3, kNaN);
        x.d_o.set(0, at + 20, 0, 1, kNaN);
        run(x, 16);
        check(x);
        for (int64_t t = at; t < x.T; ++t)
          for (int64_t j = 0; j < x.V; ++j) REQUIRE(std::isfinite(x.o.get(0, t, 0, j)));
        for (int64_t d = 0; d < x.K; ++d)
          for (int64_t j = 0; j < x.V; ++j) REQUIRE(std::isfinite(x.dh0.get(0, d, 0, j)));
      }
}

TEST_CASE("states that grow out of the range of a map are none of its concern where they are zero") {
  const Emulator emulator(false);
  for (const Rule rule : kRules) {
    Options options;
    options.rule = rule;
    options.decay = Decay::scalar;
    options.N = options.H = 1;
    options.T = 60;
    options.K = options.V = 4;
    options.h0 = options.d_hT = false;
    Case x(options);
    for (int64_t t = 0; t < 20; ++t) {
      x.g.set(0, t, 0, 0, 9);  // e^144 in a segment
      for (int64_t i = 0; i < x.V; ++i) x.v.set(0, t, 0, i, 0);
    }
    run(x, 16);
    const Expected want = expected(x, false);
    CHECK(error(x.o, want.o) < 2e-6);
    CHECK(error(x.hT, want.hT) < 2e-6);
  }
}

TEST_CASE("the past does not depend on the future, nor a head on others") {
  const Emulator emulator(false);
  each_kind([](Options options) {
    for (const bool half : {false, true}) {
      if (half != (options.decay == Decay::scalar)) continue;
      const int64_t length = half ? 64 : 16, at = half ? 131 : 37;
      options.dtype = half ? DType::f16 : DType::f32;
      options.N = 2;
      options.H = 2;
      options.T = half ? 150 : 41;
      options.K = 8;
      options.V = 10;
      Case x(options), y(options);
      for (Tensor Case::* of : {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g}) {
        for (int64_t t = at; t < x.T; ++t)
          for (int64_t i = 0; i < (y.*of).n; ++i) (y.*of).set(1, t, 0, i, -0.25 * (x.*of).get(1, t, 1, i));
      }
      run(x, length);
      run(y, length);
      for (const int64_t n : {0, 1}) CHECK(same_head(x, y, n, 1));
      CHECK(same_head(x, y, 0, 0));
      CHECK_FALSE(same_head(x, y, 1, 0));
      // The chunk form's scales span a chunk.
      for (int64_t t = 0; t < (half ? at / 64 * 64 : at); ++t)
        for (int64_t i = 0; i < x.V; ++i) REQUIRE(x.o.get(1, t, 0, i) == y.o.get(1, t, 0, i));

      // The same sequence packed among others.
      Options more = options;
      more.N = more.H = 1;
      more.cu_seqlens = {0, 5, 5, 5 + x.T, 12 + x.T};
      Case z(more);
      for (Tensor Case::* of : {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g, &Case::d_o})
        for (int64_t t = 0; t < x.T; ++t)
          for (int64_t i = 0; i < (x.*of).n; ++i) (z.*of).set(0, 5 + t, 0, i, (x.*of).get(1, t, 1, i));
      for (Tensor Case::* of : {&Case::h0, &Case::d_hT})
        for (int64_t d = 0; d < x.K; ++d)
          for (int64_t j = 0; j < x.V; ++j) (z.*of).set(2, d, 0, j, (x.*of).get(1, d, 1, j));
      run(z, length);
      for (const Result& result : kResults) {
        const Tensor &a = x.*result.got, &b = z.*result.got;
        const bool state = is_state(a, x);
        INFO(result.name, " ", text(options));
        for (int64_t t = 0; t < (state ? x.K : x.T); ++t)
          for (int64_t i = 0; i < a.n; ++i)
            REQUIRE(a.get(1, t, 1, i) == (state ? b.get(2, t, 0, i) : b.get(0, 5 + t, 0, i)));
      }
    }
  });
}

TEST_CASE("segments that are not shorter than the sequences change no bit") {
  const Emulator emulator(false);
  for (const bool half : {false, true})
    each_kind([&](Options options) {
      if (!every_case() && half && options.decay != Decay::scalar) return;
      options.dtype = half ? DType::bf16 : DType::f32;
      options.cu_seqlens = {0, 70, 70, 90};
      options.H = 1;
      options.V = 5;
      Case whole(options), cut(options);
      run(whole, 0);
      run(cut, 128);
      for (int64_t n = 0; n < whole.N; ++n) CHECK(same_head(whole, cut, n, 0));
    });
}
