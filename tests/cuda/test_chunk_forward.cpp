// The chunk form, forward, under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <cstdlib>
#include <initializer_list>
#include <string>

#include "chunk/chunk.hpp"
#include "chunk/tile.cuh"
#include "problems.hpp"

using namespace problems;
namespace cuda = fwp::cuda;
namespace chunk = fwp::cuda::chunk;

namespace {

// Fills the outputs of a case; returns the flags of the heads that were given up.
std::vector<int32_t> run(Case& x, int64_t window = 0) {
  const Problem p = x.problem();
  std::vector<unsigned char> memory(chunk::forward_workspace(p, window) + 64, 0xff);
  unsigned char* const workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  std::vector<int32_t> left(static_cast<size_t>(x.N * x.H), 7);
  cuda::Queue queue = x.queue({{memory.data(), memory.size(), true}, {left.data(), left.size() * 4, true}});
  chunk::forward(p, workspace, left.data(), queue, window);
  return left;
}

int64_t given_up(const std::vector<int32_t>& left) {
  int64_t sum = 0;
  for (const int32_t flag : left) sum += flag;
  return sum;
}

// Keys of unit length, all of them with a part of `common` alike.
void unit_keys(Case& x, double common = 0) {
  for (int64_t b = 0; b < x.B; ++b)
    for (int64_t t = 0; t < x.T; ++t)
      for (int64_t h = 0; h < x.H / x.options.k_group; ++h) {
        const auto part = [&](int64_t d) { return x.k.get(b, t, h, d); };
        double square = 0;
        for (int64_t d = 1; d < x.K; ++d) square += part(d) * part(d);
        for (int64_t d = 1; d < x.K; ++d) x.k.set(b, t, h, d, part(d) * std::sqrt((1 - common) / square));
        x.k.set(b, t, h, 0, std::sqrt(x.K > 1 ? common : 1.0));
      }
}

// error_o: before its rounding. Few numbers may be rounded worse than the average of many.
void check(Case& x, double error_o = 6e-4, double error_hT = 6e-4) {
  const auto& is = x.options;
  CAPTURE(static_cast<int>(is.rule));
  CAPTURE(static_cast<int>(is.decay));
  CAPTURE(static_cast<int>(is.dtype));
  CAPTURE(x.T);
  CAPTURE(x.K);
  CAPTURE(x.V);
  CHECK(given_up(run(x)) == 0);
  const Expected y = expected(x, false);
  const double few = y.o.array.count() < 4000 ? 2 : 1;
  const double rounding = few * (is.dtype == DType::bf16 ? 1.7e-3 : 2.1e-4);
  const double o = error(x.o, y.o), hT = error(x.hT, y.hT);
  CHECK(o < std::hypot(few * error_o, rounding));
  CHECK(hT < few * error_hT);
  if (std::getenv("SHOW") != nullptr)
    MESSAGE(int{is.rule == Rule::delta}, static_cast<int>(is.decay), " T ", x.T, " K ", x.K, " V ", x.V, " o ", o,
            " hT ", hT);
}

template <class F>
void with_rules(const F& f) {
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const Decay decay : {Decay::none, Decay::scalar, Decay::channel}) {
      Options is;
      is.rule = rule;
      is.decay = decay;
      is.dtype = DType::f16;
      is.N = is.H = 1;
      is.T = 100;
      is.K = is.V = 32;
      f(is);
    }
}

void scale(Tensor& x, double factor) {
  for (int64_t i = 0; i < x.array.count(); ++i) x.array.set(i, factor * x.array.get(i));
}

}  // namespace

TEST_CASE("what it serves") {
  Options is;
  is.dtype = DType::bf16;
  is.T = 64;
  const auto serves = [&](auto change) {
    Case x(is);
    Problem p = x.problem();
    change(p);
    return chunk::serves(p);
  };
  CHECK(serves([](Problem&) {}));
  CHECK(serves([](Problem& p) { p.decay = Decay::scalar; }));
  CHECK(serves([](Problem& p) { p.decay = Decay::channel; }));
  CHECK(serves([](Problem& p) { p.rule = Rule::linear; }));
  CHECK(serves([](Problem& p) { p.K = p.V = 128; }));
  CHECK(serves([](Problem& p) { p.V = 500; }));
  CHECK_FALSE(serves([](Problem& p) { p.dtype = DType::f32; }));
  CHECK_FALSE(serves([](Problem& p) { p.attention_norm = true; }));
  CHECK_FALSE(serves([](Problem& p) { p.K = 129; }));
  CHECK_FALSE(serves([](Problem& p) { p.K = 0; }));
  CHECK_FALSE(serves([](Problem& p) { p.V = 0; }));
  CHECK(serves([](Problem& p) { p.T = 1; }));  // a sequence has its bits, whatever it is packed with
  CHECK_FALSE(serves([](Problem& p) { p.step = true; }));
}

TEST_CASE("all options, checked, in every order") {
  for (const char* order : {"forward", "reverse", "random"}) {
    const Emulator emulator(true, order);
    with_rules([&](Options is) {
      is.H = 2;
      is.k_group = 2;
      is.T = order[0] == 'f' ? 70 : 130;
      is.V = 40;
      is.layout = order[0] == 'f' ? Layout::bthk : order[2] == 'v' ? Layout::bhtk : Layout::gaps;
      is.float_gates = order[2] == 'v';
      is.dtype = order[2] == 'n' ? DType::bf16 : DType::f16;
      is.scale = 0.25;
      Case x(is);
      unit_keys(x);
      check(x);
    });
  }
}

TEST_CASE("sizes") {
  const Emulator emulator(false);
  int64_t i = 0;
  for (const int64_t K : {1, 3, 31, 64, 100, 128})
    for (const int64_t V : {1, 3, 31, 64, 100, 128}) {
      const int64_t T[] = {1, 15, 33, 64, 65, 127, 129, 200};
      with_rules([&](Options is) {
        if (K >= 100 && V != 31 && V != 128) return;
        is.K = K;
        is.V = V;
        const bool by_channel = is.decay == Decay::channel;
        is.T = T[(by_channel ? i + 4 : i++) % 8];
        is.dtype = i % 3 == 0 ? DType::bf16 : DType::f16;
        is.seed = static_cast<unsigned>(i);
        Case x(is);
        unit_keys(x);
        const double alike = K < 8 ? 2e-3 : 6e-4;  // keys
        check(x, alike, alike);
      });
    }
}

TEST_CASE("packed sequences, some of them empty") {
  with_rules([&](Options is) {
    is.cu_seqlens = {0, 0, 1, 64, 64, 129, 130, 194, 300, 300};
    is.H = 2;
    is.v_group = 2;
    is.dtype = DType::bf16;
    is.seed = 5;
    Case x(is);
    unit_keys(x);
    check(x);
  });
}

TEST_CASE("what may be absent, keys of float32, gates of float32") {
  const Emulator emulator(false);
  with_rules([&](Options is) {
    is.h0 = false;
    is.beta = is.rule == Rule::delta;
    is.wide_keys = is.float_gates = true;
    is.q_group = 2;
    is.H = 2;
    is.N = 2;
    is.scale = 3;
    for (const Layout layout : {Layout::bthk, Layout::gaps}) {
      is.layout = layout;
      Case x(is);
      unit_keys(x);
      check(x);
    }
    is.hT = false;
    Case x(is);
    unit_keys(x);
    check(x);
  });
}

TEST_CASE("gates of every strength") {
  const Emulator emulator(false);
  for (const int kind : {0, 1, 2, 3, 4})
    with_rules([&](Options is) {
      if (is.decay == Decay::none) return;
      is.T = 200;
      is.float_gates = true;
      Case x(is);
      unit_keys(x);
      const double strengths[] = {0, -0.1, -5, -100, -1e4, -kInfinity, 0.02};
      std::mt19937 random(9);
      for (int64_t t = 0; t < x.T; ++t)
        for (int64_t i = 0; i < x.g.n; ++i) {
          const double any = strengths[random() % 7];
          const double g[] = {any, -5, i % 2 == 0 ? -0.1 : -30, t % 50 == 33 + i % 3 ? -kInfinity : -0.01,
                              is.decay == Decay::channel ? 0.01 : 0.02};
          x.g.set(0, t, 0, i, g[kind]);
        }
      CAPTURE(kind);
      check(x, 1e-3, 1e-3);
    });
}

TEST_CASE("strengths of 0 and 2, keys alike") {
  const Emulator emulator(false);
  for (const double common : {0.0, 0.5, 0.9})
    for (const double beta : {0.0, 0.5, 1.0, 2.0})
      with_rules([&](Options is) {
        is.T = 150;
        is.K = 64;
        is.V = 48;
        Case x(is);
        unit_keys(x, common);
        for (int64_t t = 0; t < x.T; ++t) x.beta.set(0, t, 0, 0, beta == 0 ? static_cast<double>(t % 3) : beta);
        CAPTURE(common);
        CAPTURE(beta);
        const double worst = beta == 2 ? 2e-3 : 1e-3;  // where the inverse is large
        check(x, worst, worst);
      });
}

TEST_CASE("data of every size") {
  const Emulator emulator(false);
  with_rules([&](Options is) {
    is.dtype = DType::bf16;  // float16 has no room for some of these
    for (const double q : {1e-3, 1e3})
      for (const double v : {1e-3, 1e3}) {
        Case x(is);
        unit_keys(x);
        scale(x.q, q);
        scale(x.v, v);
        scale(x.h0, v);
        check(x);
      }
    for (const double k : {1e-3, 1e-2, 3.0, 1e3}) {
      Case x(is);
      unit_keys(x);
      scale(x.k, k);
      if (is.rule == Rule::delta) scale(x.beta, 1 / (k * k));
      check(x);
    }
  });
}

TEST_CASE("small tokens before large ones keep their digits, or the head is given up") {
  const Emulator emulator(false);
  with_rules([&](Options is) {
    is.dtype = DType::bf16;
    is.T = 64;
    for (const bool keys : {false, true})
      for (const int power : {10, 20, 26, 30, 40}) {
        if (keys && is.rule == Rule::delta) continue;
        Case x(is);
        unit_keys(x);
        scale(x.h0, std::ldexp(1.0, -power));
        Tensor& of = keys ? x.k : x.v;
        for (int64_t t = 0; t < 40; ++t)
          for (int64_t i = 0; i < of.n; ++i) of.set(0, t, 0, i, std::ldexp(of.get(0, t, 0, i), -power));
        CAPTURE(keys);
        CAPTURE(power);
        CAPTURE(static_cast<int>(is.rule));
        CAPTURE(static_cast<int>(is.decay));
        const int64_t left = given_up(run(x));
        if (power == 10) CHECK(left == 0);
        if (left == 1) continue;
        const Expected y = expected(x, false);
        double wrong = 0, size = 0;
        for (int64_t t = 0; t < 40; ++t)
          for (int64_t j = 0; j < x.V; ++j) {
            wrong += std::pow(x.o.get(0, t, 0, j) - y.o.get(0, t, 0, j), 2);
            size += std::pow(y.o.get(0, t, 0, j), 2);
          }
        CHECK(std::sqrt(wrong / size) < 4e-3);
      }
  });
}

TEST_CASE("data that are not finite are left, and disturb nothing else") {
  const Emulator emulator(false);
  with_rules([&](Options is) {
    is.N = 2;
    is.H = 2;
    is.T = 70;
    is.V = 48;
    Case clean(is);
    unit_keys(clean);
    CHECK(given_up(run(clean)) == 0);
    for (const char* what : {"q", "k", "v", "beta", "g", "h0", "g up"}) {
      if (what[0] == 'g' && is.decay == Decay::none) continue;
      for (const double bad : {kNaN, kInfinity, -kInfinity}) {
        if (what[0] == 'g' && bad == -kInfinity) continue;
        if (!every_case() && !std::isnan(bad) && (std::string(what) != "k" || is.rule == Rule::linear)) continue;
        Case x(is);
        unit_keys(x);
        const std::string name = what;
        Tensor& tensor = name == "q" ? x.q : name == "k" ? x.k : name == "v" ? x.v : name == "h0" ? x.h0 : x.beta;
        if (name == "g up")
          for (int64_t t = 0; t < 64; ++t) x.g.set(1, t, 1, x.g.n - 1, 0.3);
        else if (name == "g")
          x.g.set(1, 40, 1, 0, bad);
        else
          tensor.set(1, name == "h0" ? 7 : 69, 1, 0, bad);
        CAPTURE(name);
        CAPTURE(bad);
        const auto left = run(x);
        CHECK(given_up(left) == 1);
        CHECK(left[1 * 2 + 1] == 1);
        for (int64_t n = 0; n < 2; ++n)
          for (int64_t h = 0; h < 2; ++h) {
            if (n == 1 && h == 1) continue;
            bool same = true;
            for (int64_t t = 0; t < x.T; ++t)
              for (int64_t j = 0; j < x.V; ++j) same = same && x.o.get(n, t, h, j) == clean.o.get(n, t, h, j);
            for (int64_t d = 0; d < x.K; ++d)
              for (int64_t j = 0; j < x.V; ++j) same = same && x.hT.get(n, d, h, j) == clean.hT.get(n, d, h, j);
            CHECK(same);
          }
      }
    }
  });
}

TEST_CASE("bits do not depend on batch, heads, layout, packing or the window") {
  const Emulator emulator(false);
  with_rules([&](Options is) {
    is.N = 2;
    is.H = 2;
    is.V = 40;
    is.q_group = 2;
    Case x(is);
    unit_keys(x);
    run(x);
    const auto compare = [&](Case& y, int64_t n, int64_t h, int64_t begin) {  // y: head (n, h) of x, as its (0, 0)
      const auto copy = [&](Tensor& to, const Tensor& from, int64_t group) {
        for (int64_t t = 0; t < x.T && to.there(); ++t)
          for (int64_t i = 0; i < to.n; ++i) to.set(0, begin + t, 0, i, from.get(n, t, h / group, i));
      };
      copy(y.q, x.q, 2);
      copy(y.k, x.k, 1);
      copy(y.v, x.v, 1);
      copy(y.beta, x.beta, 1);
      copy(y.g, x.g, 1);
      const int64_t sequence = begin > 0 ? 1 : 0;
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t j = 0; j < x.V; ++j) y.h0.set(sequence, d, 0, j, x.h0.get(n, d, h, j));
      run(y);
      bool same = true;
      for (int64_t t = 0; t < x.T; ++t)
        for (int64_t j = 0; j < x.V; ++j) same = same && y.o.get(0, begin + t, 0, j) == x.o.get(n, t, h, j);
      for (int64_t d = 0; d < x.K; ++d)
        for (int64_t j = 0; j < x.V; ++j) same = same && y.hT.get(sequence, d, 0, j) == x.hT.get(n, d, h, j);
      CHECK(same);
    };
    Options one = is;
    one.N = one.H = one.q_group = 1;
    one.layout = Layout::gaps;
    Case single(one);
    compare(single, 1, 1, 0);
    one.cu_seqlens = {0, 37, 137, 140};
    Case packed(one);
    unit_keys(packed);
    compare(packed, 0, 1, 37);

    if (!every_case() && is.decay != Decay::channel) return;  // others have windows in the backward alone
    for (const auto& offsets : {std::vector<int64_t>{}, {0, 70, 70, 200, 220}}) {
      Options cut = is;
      cut.N = 1;
      cut.T = 200;
      cut.cu_seqlens = offsets;
      Case whole(cut);
      unit_keys(whole);
      run(whole);
      for (const int64_t window : {1, 2}) {
        Case x_cut(cut);
        unit_keys(x_cut);
        run(x_cut, window);
        CHECK(x_cut.o.array.bytes() == whole.o.array.bytes());
        CHECK(x_cut.hT.array.bytes() == whole.hT.array.bytes());
      }
    }
  });
}

TEST_CASE("nothing of anything") {
  with_rules([&](Options is) {
    is.K = 5;
    is.V = 3;
    Options no_tokens = is, no_heads = is, no_sequences = is, no_values = is;
    no_tokens.T = 0;
    no_heads.H = 0;
    no_sequences.N = 0;
    no_values.V = 0;
    for (const Options& none : {no_tokens, no_heads, no_sequences, no_values}) {
      Case x(none);
      CHECK(given_up(run(x)) == 0);
      CHECK(error(x.hT, expected(x, false).hT) == 0);
    }
    no_tokens.h0 = false;
    Case x(no_tokens);
    run(x);
    CHECK(error(x.hT, expected(x, false).hT) == 0);
  });
}

namespace {

// Rows of random numbers, of very different size, through the functions of tiles: X X^T, X^T X and X itself.
template <int D>
void check_tiles(DType dtype, int64_t stride, int columns, int tokens) {
  using namespace fwp::cuda;
  using namespace fwp::cuda::chunk;
  CAPTURE(D);
  CAPTURE(columns);
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  Array x(dtype, stride * kChunk);
  for (int64_t i = 0; i < x.count(); ++i)
    x.set(i, std::ldexp(normal(random), static_cast<int>(i / stride * 5 % 21 - 10)));
  const fwp::Rows rows{x.data(), dtype, 0, stride, 0, 1};
  std::vector<float> inner(kChunk * kChunk), outer(D * D);
  std::vector<uint16_t> turned(64 * kChunk, 0x7fff);
  fwp::simt::Options options;
  for (const auto& [begin, bytes] : {std::pair<const void*, size_t>{x.data(), x.bytes().size()},
                                     {inner.data(), inner.size() * 4},
                                     {outer.data(), outer.size() * 4},
                                     {turned.data(), turned.size() * 2}})
    options.global.push_back({begin, bytes, true});
  struct Shared {
    Half tile[kChunk * D], v[kChunk * 16];
    float up[kChunk];
  };
  const auto report = fwp::simt::launch({}, 128, sizeof(Shared), options, [&] {
    auto& shared = *static_cast<Shared*>(shared_memory());
    const Sequence s{0, 0, tokens};
    const auto all = HeadRows::from(rows, Place::of(rows, s, 0, 0, columns), 0, tokens);
    copy_rows<D, 128>(all, shared.tile);
    if (warp() == 0 && dtype != DType::f32) copy_rows<16, 32>(all, shared.v);
    commit_copies();
    wait_copies<0>();
    const uint32_t most = scale_rows<D, 128>(all, shared.tile, shared.up);
    if (most >= kInfinite) CHECK(most < kInfinite);
    sync_block();
    const int row = 16 * warp(), g = lane() / 4, t = lane() % 4;
    float d[8][4] = {};
    for (int k = 0; k < D; k += 16) {
      uint32_t a[4];
      load_a<D, Sum::along>(a, shared.tile, row, k);
      multiply<D, Sum::along, 8>(d, a, shared.tile, 0, k);
    }
    for (int n = 0; n < 8; ++n)
      for (int r = 0; r < 4; ++r) {
        const int i = row + g + 8 * (r / 2), j = 8 * n + 2 * t + r % 2;
        store_global(&inner[static_cast<size_t>(i * kChunk + j)], d[n][r] * shared.up[i] * shared.up[j]);
      }
    for (int m = row; m < D; m += 64)  // rows as they stand in the tile
      for (int n = 0; n < D; n += 16) {
        float e[2][4] = {};
        for (int k = 0; k < kChunk; k += 16) {
          uint32_t a[4];
          load_a<D, Sum::down>(a, shared.tile, m, k);
          multiply<D, Sum::down, 2>(e, a, shared.tile, n, k);
        }
        for (int l = 0; l < 2; ++l)
          for (int r = 0; r < 4; ++r)
            store_global(&outer[static_cast<size_t>((m + g + 8 * (r / 2)) * D + n + 8 * l + 2 * t + r % 2)], e[l][r]);
      }
    if (warp() == 0 && dtype != DType::f32) {
      float v[8][4];
      load_turned(v, dtype, shared.v);
      const fwp::Rows out{turned.data(), dtype, 0, 64, 0, 1};
      for (int n = 0; n < 8; ++n)
        store_turned_halves(HeadRows::from(out, Place::of(out, s, 0, 0, columns < 16 ? columns : 16), 0, tokens), 8 * n,
                            v[n]);
    }
  });
  const auto number = [&](int row, int column) {
    return row < tokens && column < columns ? x.get(row * stride + column) : 0.0;
  };
  // A row as it stands in the tile: to a multiple of a power of two.
  const auto standing = [&](int row, int column) {
    double most = 0;
    for (int i = 0; i < columns; ++i) most = std::fmax(most, std::fabs(number(row, i)));
    return most == 0 ? 0 : std::ldexp(number(row, column), 15 - std::ilogb(most) - 1);
  };
  const double precision = dtype == DType::f32 ? 1e-3 : 1e-6;
  double wrong = 0;
  for (int i = 0; i < kChunk; ++i)
    for (int j = 0; j < kChunk; ++j) {
      double sum = 0, size = 1e-30;
      for (int c = 0; c < columns; ++c) {
        sum += number(i, c) * number(j, c);
        size += std::fabs(number(i, c) * number(j, c));
      }
      wrong = std::fmax(wrong, std::fabs(static_cast<double>(inner[static_cast<size_t>(i * kChunk + j)]) - sum) / size);
    }
  CHECK(wrong < precision);
  wrong = 0;
  for (int i = 0; i < D; ++i)
    for (int j = 0; j < D; ++j) {
      double sum = 0, size = 1e-30;
      for (int c = 0; c < kChunk; ++c) {
        sum += standing(c, i) * standing(c, j);
        size += std::fabs(standing(c, i) * standing(c, j));
      }
      wrong = std::fmax(wrong, std::fabs(static_cast<double>(outer[static_cast<size_t>(i * D + j)]) - sum) / size);
    }
  CHECK(wrong < precision);
  bool same = true;
  for (int i = 0; i < kChunk; ++i)
    for (int j = 0; j < 64; ++j) {
      uint16_t bits = 0x7fff;
      if (dtype != DType::f32 && i < tokens && j < columns && j < 16)
        std::memcpy(&bits, x.bytes().data() + 2 * (i * stride + j), 2);
      same = same && turned[static_cast<size_t>(64 * i + j)] == bits;
    }
  CHECK(same);
  for (const auto& [line, traffic] : report.shared) {
    CAPTURE(line);
    CHECK(traffic.actual == traffic.ideal);
  }
}

}  // namespace

TEST_CASE("tiles: products in both orientations, and no bank conflict") {
  check_tiles<32>(DType::bf16, 32, 32, 64);
  check_tiles<32>(DType::f16, 27, 25, 63);
  check_tiles<64>(DType::f16, 72, 60, 64);
  check_tiles<64>(DType::f32, 64, 64, 37);
  check_tiles<128>(DType::bf16, 128, 128, 50);
}
