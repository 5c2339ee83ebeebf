// The recurrent form under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <functional>
#include <memory>
#include <string>

#include "problems.hpp"
#include "recurrent/backward.hpp"

using namespace problems;
namespace recurrent = fwp::cuda::recurrent;

namespace {

void run_forward(Case& x, const int32_t* only = nullptr, std::vector<fwp::cuda::Memory> more = {}) {
  const Problem p = x.problem();
  Workspace workspace(recurrent::forward_workspace(p));
  more.push_back(workspace.memory());
  auto queue = x.queue(more);
  recurrent::forward(p, workspace.data(), only, queue);
}

void run_backward(const Problem& p, Case& x, const recurrent::Cut& cut, const int32_t* only = nullptr,
                  std::vector<fwp::cuda::Memory> more = {}) {
  Workspace workspace(recurrent::backward_workspace(p, cut));
  more.push_back(workspace.memory());
  auto queue = x.queue(more);
  recurrent::backward(p, cut, workspace.data(), only, queue);
}
void run_backward(Case& x) {
  const Problem p = x.problem();
  run_backward(p, x, recurrent::cut(p));
}
void run(Case& x) {
  run_forward(x);
  run_backward(x);
}

// What was computed, by name.
struct Result {
  const char* name;
  Tensor Case::* got;
  Tensor Expected::* want;
};
constexpr Result kForward[] = {{"o", &Case::o, &Expected::o}, {"hT", &Case::hT, &Expected::hT}};
constexpr Result kBackward[] = {{"dq", &Case::dq, &Expected::dq}, {"dk", &Case::dk, &Expected::dk},
                                {"dv", &Case::dv, &Expected::dv}, {"dbeta", &Case::dbeta, &Expected::dbeta},
                                {"dg", &Case::dg, &Expected::dg}, {"dh0", &Case::dh0, &Expected::dh0}};

template <class F>
void each_result(const F& f) {
  for (const Result& result : kForward) f(result);
  for (const Result& result : kBackward) f(result);
}

// Largest error of a result that was rounded to this type.
double tolerance(DType dtype) {
  return dtype == DType::f64 ? 3e-15 : dtype == DType::f32 ? 1e-6 : dtype == DType::f16 ? 1e-3 : 8e-3;
}

void check(const Case& x, double times = 1) {
  const Expected want = expected(x, true);
  each_result([&](const Result& result) {
    const Tensor& got = x.*result.got;
    INFO(result.name, " rule ", static_cast<int>(x.options.rule), " decay ", static_cast<int>(x.options.decay),
         " dtype ", static_cast<int>(x.options.dtype), " attention_norm ", x.options.attention_norm, " K ", x.K, " V ",
         x.V);
    const double most = tolerance(got.array.dtype()) * times;
    CHECK(error(got, want.*result.want) <= most);
  });
}

bool same_bits(const Tensor& a, const Tensor& b) { return a.array.bytes() == b.array.bytes(); }

void check_same(const Case& a, const Case& b) {
  each_result([&](const Result& result) {
    INFO(result.name);
    CHECK(same_bits(a.*result.got, b.*result.got));
  });
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

TEST_CASE("every rule, decay and dtype, in any order of the threads, with all of the emulator's checks") {
  each_kind([](Options options) {
    options.N = options.H = 1;
    options.T = 11;
    options.K = 37;
    options.V = 34;
    for (const bool attention_norm : {false, true}) {
      options.attention_norm = attention_norm;
      options.scale = 0.7;
      std::unique_ptr<Case> first;
      for (const char* order : {"forward", "reverse", "random"}) {
        const Emulator emulator(true, order);
        auto x = std::make_unique<Case>(options);
        run(*x);
        if (first)
          check_same(*first, *x);
        else
          check(*x, attention_norm ? 3 : 1);
        if (!first) first = std::move(x);
      }
    }
  });
}

TEST_CASE("every dtype") {
  const Emulator emulator(false);
  each_kind([](Options options) {
    for (const DType dtype : kDTypes) {
      options.dtype = dtype;
      options.T = 19;
      options.K = 24;
      options.V = 40;
      for (const bool attention_norm : {false, true}) {
        options.attention_norm = attention_norm;
        options.float_gates = attention_norm;
        options.wide_keys = attention_norm;
        Case x(options);
        run(x);
        check(x, attention_norm ? 5 : 1);
      }
    }
  });
}

TEST_CASE("sizes") {
  const Emulator emulator(false);
  for (const int64_t K : {1, 2, 31, 33, 65, 100, 128, 150, 257}) {
    for (const int64_t V : {1, 32, 65}) {
      Options options;
      options.decay = Decay::channel;
      options.N = options.H = 1;
      options.T = 9;
      options.K = K;
      options.V = V;
      Case x(options);
      run(x);
      check(x, 2);
    }
  }
  for (const int64_t T : {1, 2, 7, 8, 16, 17}) {
    Options options;
    options.decay = Decay::scalar;
    options.dtype = T % 2 == 0 ? DType::f32 : DType::f64;
    options.T = T;
    Case x(options);
    run(x);
    check(x, 2);
  }
}

TEST_CASE("nothing of something") {
  const Emulator emulator(true);
  for (const bool attention_norm : {false, true})
    for (int64_t Options::* size : {&Options::N, &Options::T, &Options::H, &Options::K, &Options::V})
      each_kind([&](Options options) {
        options.T = 3;
        options.V = 2;
        options.attention_norm = attention_norm;
        options.*size = 0;
        Case x(options);
        run(x);
        check(x, 3);
      });
}

TEST_CASE("what is absent") {
  const Emulator emulator(false);
  for (const Rule rule : kRules) {
    for (const bool attention_norm : {false, true}) {
      Options options;
      options.rule = rule;
      options.decay = Decay::scalar;
      options.attention_norm = attention_norm;
      options.beta = rule == Rule::delta;
      options.h0 = options.hT = options.d_hT = options.dh0 = false;
      options.V = 40;
      Case x(options);
      run(x);
      check(x, 3);

      // Any gradient may be unwanted; the others are the same then.
      options.beta = true;
      options.d_hT = options.dh0 = true;
      Case all(options);
      run_backward(all);
      for (const Result& left_out : kBackward) {
        Case some(options);
        Problem p = some.problem();
        const std::string name = left_out.name;
        if (name == "dq") p.dq = {};
        if (name == "dk") p.dk = {};
        if (name == "dv") p.dv = {};
        if (name == "dbeta") p.dbeta = {};
        if (name == "dg") p.dg = {};
        if (name == "dh0") p.dh0 = {};
        run_backward(p, some, recurrent::cut(p));
        for (const Result& result : kBackward) {
          INFO(name, " ", result.name);
          const Case untouched(options);
          CHECK(same_bits(some.*result.got, (result.name == name ? untouched : all).*result.got));
        }
      }
    }
  }
}

TEST_CASE("layouts make no difference, and what lies between rows is left alone") {
  const Emulator emulator(true);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    Options options;
    options.dtype = dtype;
    options.decay = Decay::channel;
    options.T = 9;
    options.K = 11;
    options.V = 35;
    options.q_group = options.v_group = 2;
    Case contiguous(options);
    run(contiguous);
    check(contiguous, 2);
    for (const Layout layout : {Layout::bhtk, Layout::gaps}) {
      options.layout = layout;
      Case x(options);  // the same numbers, drawn in the same order
      run(x);
      each_result([&](const Result& result) {
        INFO(result.name);
        const Tensor &a = contiguous.*result.got, &b = x.*result.got;
        const bool state = &a == &contiguous.hT || &a == &contiguous.dh0;
        const int64_t batches = state ? x.N : x.B, tokens = state ? x.K : x.T, heads = a.t / a.n;
        int64_t numbers = 0, there = 0;
        for (int64_t n = 0; n < batches; ++n)
          for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < (state ? x.H : heads); ++h)
              for (int64_t i = 0; i < a.n; ++i, ++numbers) REQUIRE(a.get(n, t, h, i) == b.get(n, t, h, i));
        for (int64_t i = 0; i < b.array.count(); ++i) there += !std::isnan(b.array.get(i));
        CHECK(there == numbers);
      });
    }
  }
}

TEST_CASE("heads that share rows") {
  const Emulator emulator(false);
  for (const DType dtype : {DType::f32, DType::f16}) {
    Options options;
    options.dtype = dtype;
    options.decay = Decay::scalar;
    options.N = 1;
    options.H = 6;
    options.T = 10;
    options.V = 36;
    options.q_group = 3;
    options.k_group = 6;
    options.v_group = 2;
    Case x(options);
    run(x);
    check(x);
  }
}

TEST_CASE("packed sequences are those of a batch") {
  for (const bool check_all : {true, false}) {
    const Emulator emulator(check_all);
    Options options;
    options.decay = Decay::channel;
    options.attention_norm = !check_all;
    options.V = 33;
    options.K = 9;
    options.cu_seqlens = {0, 0, 7, 7, 8, 31, 31};
    Case x(options);
    run(x);
    check(x, 3);

    Options single = options;
    single.cu_seqlens = {0, 23};
    Case alone(single);
    for (Tensor Case::* of : {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g, &Case::d_o})
      for (int64_t t = 0; t < 23; ++t)
        for (int64_t h = 0; h < x.H; ++h)
          for (int64_t i = 0; i < (x.*of).n; ++i) (alone.*of).set(0, t, h, i, (x.*of).get(0, t + 8, h, i));
    for (Tensor Case::* of : {&Case::h0, &Case::d_hT})
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t h = 0; h < x.H; ++h)
          for (int64_t i = 0; i < (x.*of).n; ++i) (alone.*of).set(0, d, h, i, (x.*of).get(4, d, h, i));
    run(alone);
    each_result([&](const Result& result) {
      INFO(result.name);
      const Tensor &a = x.*result.got, &b = alone.*result.got;
      const bool state = &b == &alone.hT || &b == &alone.dh0;
      for (int64_t t = 0; t < (state ? x.K : 23); ++t)
        for (int64_t h = 0; h < x.H; ++h)
          for (int64_t i = 0; i < a.n; ++i)
            REQUIRE(b.get(0, t, h, i) == (state ? a.get(4, t, h, i) : a.get(0, t + 8, h, i)));
    });
  }
}

TEST_CASE("how time is cut makes no difference") {
  const Emulator emulator(false);
  for (const bool packed : {false, true}) {
    for (const bool attention_norm : {false, true}) {
      Options options;
      options.decay = Decay::channel;
      options.N = 3;
      options.H = 2;
      options.T = 37;
      options.K = 10;
      options.V = 40;
      options.q_group = 2;
      options.attention_norm = attention_norm;
      if (packed) options.cu_seqlens = {0, 3, 3, 40, 41, 57, 57};
      Case whole(options);
      const Problem p = whole.problem();
      run_backward(p, whole, {1, 64, 1000});
      Case usual(options);
      run_backward(usual.problem(), usual, recurrent::cut(usual.problem()));
      check_same(whole, usual);
      for (const recurrent::Cut cut :
           {recurrent::Cut{1, 8, 1000}, {3, 16, 1000}, {1, 8, 8}, {2, 8, 24}, {3, 16, 16}, {3, 16, 5}}) {
        INFO("packed ", packed, " strips ", cut.strips, " segment ", cut.segment, " window ", cut.window);
        Case x(options);
        run_backward(x.problem(), x, cut);
        check_same(whole, x);
      }
    }
  }
}

TEST_CASE("how time is cut, with all of the emulator's checks") {
  for (const char* order : {"forward", "random"}) {
    const Emulator emulator(true, order);
    Options options;
    options.attention_norm = true;
    options.decay = Decay::scalar;
    options.H = 1;
    options.K = 40;
    options.V = 33;
    options.cu_seqlens = {0, 19, 19, 24};
    Case x(options);
    run_forward(x);
    run_backward(x.problem(), x, {2, 8, 8});
    check(x, 4);
  }
}

TEST_CASE("where the state lies makes no difference") {
  const size_t usual = fwp::cuda::emulated_shared_bytes;
  for (const bool check_all : {false, true})
    each_kind([&](Options options) {
      if (check_all && options.decay != Decay::channel) return;
      const Emulator emulator(check_all);
      options.N = options.H = 1;
      options.T = check_all ? 9 : 20;
      options.K = 35;
      options.V = 33;
      options.attention_norm = options.decay != Decay::none;
      Case in_shared(options), in_workspace(options);
      run(in_shared);
      fwp::cuda::emulated_shared_bytes = 12 << 10;  // for what does not grow with K
      run(in_workspace);
      fwp::cuda::emulated_shared_bytes = usual;
      check_same(in_shared, in_workspace);
    });
}

TEST_CASE("other sequences and heads make no difference") {
  const Emulator emulator(false);
  Options options;
  options.decay = Decay::scalar;
  options.N = 2;
  options.H = 3;
  options.V = 36;
  options.T = 21;
  Case x(options);
  run(x);
  Options single = options;
  single.N = single.H = 1;
  Case alone(single);
  const auto take = [&](Tensor Case::* of, int64_t tokens, const auto& each) {
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < (x.*of).n; ++i) each(t, i, (x.*of).get(1, t, 2, i));
  };
  for (Tensor Case::* of : {&Case::q, &Case::k, &Case::v, &Case::beta, &Case::g, &Case::d_o, &Case::h0, &Case::d_hT})
    take(of, of == &Case::h0 || of == &Case::d_hT ? x.K : x.T,
         [&](int64_t t, int64_t i, double value) { (alone.*of).set(0, t, 0, i, value); });
  run(alone);
  each_result([&](const Result& result) {
    INFO(result.name);
    take(result.got, result.got == &Case::hT || result.got == &Case::dh0 ? x.K : x.T,
         [&](int64_t t, int64_t i, double value) { REQUIRE((alone.*result.got).get(0, t, 0, i) == value); });
  });
}

TEST_CASE("gates of any size") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const bool attention_norm : {false, true})
        for (const DType dtype : {DType::f32, DType::f64}) {
          Options options;
          options.rule = rule;
          options.decay = decay;
          options.dtype = dtype;
          options.attention_norm = attention_norm;
          options.N = 1;
          options.T = 18;
          options.K = decay == Decay::scalar ? 34 : 3;
          Case x(options);
          const double gates[] = {-kInfinity, -1000, -50, -30, -20, 1, -0.1, 0, -100, 0.5, -2};
          for (int64_t h = 0; h < x.H; ++h)
            for (int64_t t = 0; t < x.T; ++t)
              for (int64_t i = 0; i < x.g.n; ++i) {
                const int64_t draw = (7 * t + 5 * h + 11 * i) % 29;
                if (draw < 11) x.g.set(0, t, h, i, gates[draw]);
              }
          run(x);
          check(x, 20);
        }
}

TEST_CASE("a reset clears even NaN") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : {Decay::scalar, Decay::channel})
      for (const int64_t at : {8, 11}) {
        Options options;
        options.rule = rule;
        options.decay = decay;
        options.N = options.H = 1;
        options.V = 34;
        options.T = 20;
        Case x(options);
        for (int64_t i = 0; i < x.g.n; ++i) x.g.set(0, at, 0, i, -kInfinity);
        x.v.set(0, at - 4, 0, 3, kNaN);
        x.d_o.set(0, at + 3, 0, 1, kNaN);
        run(x);
        check(x);
        for (int64_t t = at; t < x.T; ++t)
          for (int64_t j = 0; j < x.V; ++j) REQUIRE(std::isfinite(x.o.get(0, t, 0, j)));
        for (int64_t d = 0; d < x.K; ++d)
          for (int64_t j = 0; j < x.V; ++j) REQUIRE(std::isfinite(x.dh0.get(0, d, 0, j)));
      }
}

TEST_CASE("what is not finite reaches what depends on it, and nothing else") {
  const Emulator emulator(false);
  struct Place {
    Tensor Case::* of;
    int64_t t, i;
  };
  for (const double value : {kNaN, kInfinity})
    for (const Rule rule : kRules)
      for (const Place place : {Place{&Case::v, 5, 33}, Place{&Case::q, 13, 2}, Place{&Case::beta, 3, 0},
                                Place{&Case::d_o, 14, 1}, Place{&Case::h0, 2, 7}, Place{&Case::k, 9, 4}}) {
        Options options;
        options.rule = rule;
        options.N = options.H = 1;
        options.T = 21;
        options.V = 36;
        options.K = 12;
        Case x(options);
        (x.*place.of).set(0, place.t, 0, place.i, value);
        run_forward(x);
        const Expected want = expected(x, false);
        for (int64_t t = 0; t < x.T; ++t)
          for (int64_t j = 0; j < x.V; ++j)
            REQUIRE(std::isfinite(x.o.get(0, t, 0, j)) == std::isfinite(want.o.get(0, t, 0, j)));
        CHECK(error(x.hT, want.hT) < 1e-6);
        // Backward, what comes before the value stays finite where the recurrence's does.
        run_backward(x);
        const Expected gradients = expected(x, true);
        for (const Result& result : kBackward) {
          if (result.got == &Case::dh0 || !(x.*result.got).there()) continue;
          for (int64_t t = 0; t < x.T; ++t)
            for (int64_t i = 0; i < (x.*result.got).n; ++i) {
              INFO(result.name, " ", t, " ", i);
              REQUIRE(std::isfinite((x.*result.got).get(0, t, 0, i)) ==
                      std::isfinite((gradients.*result.want).get(0, t, 0, i)));
            }
        }
      }
}

TEST_CASE("reads that share nothing with the keys are blind, even of NaN") {
  const Emulator emulator(false);
  for (const Rule rule : kRules)
    for (const Decay decay : kDecays) {
      Options options;
      options.rule = rule;
      options.decay = decay;
      options.attention_norm = true;
      options.N = options.H = 1;
      options.T = 22;
      options.K = 6;
      options.h0 = false;
      Case x(options);
      const int64_t half = x.K / 2;
      for (int64_t t = 0; t < x.T; ++t)  // keys of one half first, then of the other
        for (int64_t i = 0; i < half; ++i) {
          x.k.set(0, t, 0, i + (t < 11 ? half : 0), 0);
          x.q.set(0, t, 0, i + (t % 3 == 0 ? half : 0), 0);
        }
      run(x);
      check(x, 5);
      x.v.set(0, 3, 0, 2, kNaN);
      const Expected want = expected(x, false);
      run_forward(x);
      CHECK(error(x.o, want.o) < 1e-6);
    }
}

TEST_CASE("only some heads") {
  const Emulator emulator(true);
  for (const bool grouped : {false, true}) {
    Options options;
    options.N = 2;
    options.H = 4;
    options.T = 9;
    options.K = 5;
    options.V = 33;
    options.attention_norm = true;
    options.k_group = grouped ? 2 : 1;
    Case all(options), some(options);
    run(all);
    std::vector<int32_t> only{0, 1, 0, 0, 0, 0, 0, 7};
    const std::vector<fwp::cuda::Memory> memory{{only.data(), only.size() * sizeof(int32_t), false}};
    run_forward(some, only.data(), memory);
    const Problem p = some.problem();
    run_backward(p, some, {1, 8, grouped ? 8 : 100}, only.data(), memory);
    each_result([&](const Result& result) {
      const Tensor &a = all.*result.got, &b = some.*result.got;
      const bool state = &a == &all.hT || &a == &all.dh0, forward = &a == &all.o || &a == &all.hT;
      if (!a.there()) return;
      const int64_t group = &a == &all.dk ? options.k_group : 1, together = forward ? 1 : options.k_group;
      for (int64_t n = 0; n < 2; ++n)
        for (int64_t h = 0; h < 4; ++h) {
          bool asked = false;
          for (int64_t i = 0; i < together; ++i)
            asked |= only[static_cast<size_t>(n * 4 + h / together * together + i)];
          for (int64_t t = 0; t < (state ? all.K : all.T); ++t)
            for (int64_t i = 0; i < a.n; ++i) {
              INFO(result.name, " ", n, " ", h);
              const double got = b.get(n, t, h / group, i);
              REQUIRE((asked ? got == a.get(n, t, h / group, i) : std::isnan(got)));
            }
        }
    });
  }
}
