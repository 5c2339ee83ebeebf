// The C++ interface: every function against the recurrence, strides, absent views, exceptions.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "fwp/fwp.hpp"
#include "reference.hpp"

namespace {

using reference::Array;
using reference::Decay;
using reference::Rule;

constexpr int64_t B = 2, T = 9, H = 3, K = 5, V = 4;

// A problem with a scalar decay, and views of it.
struct Problem {
  reference::Inputs x = reference::Random(41).inputs({B, T, H, K, V}, Decay::scalar);
  fwp::inputs in;
  Array o = Array(x.v.count()), hT = Array(x.h0.count());
  fwp::options options;

  Problem() {
    in.q = {x.q.data(), {B, T, H, K}};
    in.k = {x.k.data(), {B, T, H, K}};
    in.v = {x.v.data(), {B, T, H, V}};
    in.beta = {x.beta.data(), {B, T, H}};
    in.g = {x.g.data(), {B, T, H}};
    in.h0 = {x.h0.data(), {B, H, K, V}};
    options.scale = 0.5;
  }
  fwp::outputs outputs() { return {{o.data(), {B, T, H, V}}, {hT.data(), {B, H, K, V}}}; }

  void check_outputs(Rule rule) {
    const auto expected = reference::forward(rule, x, options.scale);
    CHECK(reference::distance(o, expected.o) < 1e-12);
    CHECK(reference::distance(hT, expected.hT) < 1e-12);
  }
};

TEST_CASE_FIXTURE(Problem, "forward") {
  SUBCASE("linear") {
    fwp::linear_fwd(in, outputs(), options);
    check_outputs(Rule::linear);
  }
  SUBCASE("delta") {
    fwp::delta_fwd(in, outputs(), options);
    check_outputs(Rule::delta);
  }
  SUBCASE("with a workspace of the caller's") {
    const size_t bytes = fwp::delta_fwd_workspace(in);
    std::vector<char> memory(bytes + 64);
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    fwp::delta_fwd(in, outputs(), options, {memory.data() + (64 - address % 64) % 64, bytes});
    check_outputs(Rule::delta);
  }
}

TEST_CASE_FIXTURE(Problem, "strides are read in place: heads before time") {
  Array q(x.q.count());
  for (int64_t b = 0; b < B; ++b)
    for (int64_t t = 0; t < T; ++t)
      for (int64_t h = 0; h < H; ++h)
        for (int64_t i = 0; i < K; ++i) q[((b * H + h) * T + t) * K + i] = x.q[((b * T + t) * H + h) * K + i];
  in.q = {q.data(), {B, T, H, K}, {H * T * K, K, T * K, 1}};
  fwp::delta_fwd(in, outputs(), options);
  check_outputs(Rule::delta);
}

TEST_CASE_FIXTURE(Problem, "backward") {
  reference::Random random(43);
  const reference::Outputs dy{random.normal(B * T * H * V), random.normal(B * H * K * V)};
  const fwp::cotangents from{{dy.o.data(), {B, T, H, V}}, {dy.hT.data(), {B, H, K, V}}};
  Array dk(x.k.count()), dg(x.g.count());
  fwp::gradients to;
  to.dk = {dk.data(), {B, T, H, K}};
  to.dg = {dg.data(), {B, T, H}};
  for (Rule rule : {Rule::linear, Rule::delta}) {
    const auto bwd = rule == Rule::delta ? fwp::delta_bwd : fwp::linear_bwd;
    bwd(in, from, to, options, {});
    const Array along_k = random.normal(B * T * H * K), along_g = random.normal(B * T * H);
    const double slope_k = reference::slope(rule, x, &reference::Inputs::k, along_k, dy, options.scale);
    const double slope_g = reference::slope(rule, x, &reference::Inputs::g, along_g, dy, options.scale);
    CHECK(reference::dot(dk, along_k) == doctest::Approx(slope_k).epsilon(1e-6));
    CHECK(reference::dot(dg, along_g) == doctest::Approx(slope_g).epsilon(1e-6));
  }
}

TEST_CASE_FIXTURE(Problem, "a workspace of the caller's serves backward and steps") {
  Array dv(x.v.count()), again(x.v.count());
  const Array d_o(x.v.count(), 1.0);
  const fwp::cotangents from{{d_o.data(), {B, T, H, V}}};
  fwp::gradients to;
  to.dv = {dv.data(), {B, T, H, V}};
  fwp::delta_bwd(in, from, to, options);
  const size_t bytes = fwp::delta_bwd_workspace(in);
  std::vector<char> memory(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  to.dv = {again.data(), {B, T, H, V}};
  fwp::delta_bwd(in, from, to, options, {memory.data() + (64 - address % 64) % 64, bytes});
  CHECK(dv == again);
}

TEST_CASE_FIXTURE(Problem, "checkpoints") {
  Array checkpoints(fwp::checkpoints(in));
  fwp::outputs out = outputs();
  out.checkpoints = {checkpoints.data(), {fwp::checkpoints(in)}};
  fwp::delta_fwd(in, out, options);
  check_outputs(Rule::delta);
}

TEST_CASE_FIXTURE(Problem, "one sequence after the other in a packed batch") {
  const int64_t cu_seqlens[] = {0, 4, 4, T};
  fwp::inputs packed;
  packed.q = {x.q.data(), {1, T, H, K}};
  packed.k = {x.k.data(), {1, T, H, K}};
  packed.v = {x.v.data(), {1, T, H, V}};
  packed.cu_seqlens = {cu_seqlens, {4}};
  Array states(3 * H * K * V, -1.0), whole(T * H * V);
  fwp::linear_fwd(packed, {{whole.data(), {1, T, H, V}}, {states.data(), {3, H, K, V}}});
  for (int64_t i = H * K * V; i < 2 * H * K * V; ++i) CHECK(states[i] == 0);  // the empty sequence

  packed.q = {x.q.data() + 4 * H * K, {1, T - 4, H, K}};
  packed.k = {x.k.data() + 4 * H * K, {1, T - 4, H, K}};
  packed.v = {x.v.data() + 4 * H * V, {1, T - 4, H, V}};
  packed.cu_seqlens = {};
  Array last((T - 4) * H * V);
  fwp::linear_fwd(packed, {{last.data(), {1, T - 4, H, V}}});
  CHECK(last == Array(whole.begin() + 4 * H * V, whole.end()));
}

TEST_CASE("a step updates its state") {
  const double k[] = {1, 0}, v[] = {3, 5}, beta[] = {1};
  double state[] = {1, 1, 2, 2}, o[] = {0, 0};
  fwp::inputs in;
  in.q = in.k = {k, {1, 1, 2}};
  in.v = {v, {1, 1, 2}};
  in.beta = {beta, {1, 1}};
  fwp::delta_step(in, {state, {1, 1, 2, 2}}, {o, {1, 1, 2}});
  CHECK(o[0] == 3);
  CHECK(o[1] == 5);
  CHECK(Array(state, state + 4) == Array{3, 5, 2, 2});
  fwp::linear_step(in, {state, {1, 1, 2, 2}}, {o, {1, 1, 2}});
  CHECK(Array(state, state + 4) == Array{6, 10, 2, 2});
}

// 1, 2 and 3 in both formats.
constexpr fwp::float16 kHalf[] = {{0x3c00}, {0x4000}, {0x4200}};
constexpr fwp::bfloat16 kBrain[] = {{0x3f80}, {0x4000}, {0x4040}};

template <class Number>
void check_half(const Number (&numbers)[3]) {
  const Number zero{0}, k[] = {numbers[0], zero}, v[] = {numbers[2], numbers[1]};
  const float beta[] = {1};
  float state[] = {1, 1, 2, 2};
  Number o[2] = {};
  fwp::inputs in;
  in.q = in.k = {k, {1, 1, 2}};
  in.v = {v, {1, 1, 2}};
  in.beta = {beta, {1, 1}};
  fwp::delta_step(in, {state, {1, 1, 2, 2}}, {o, {1, 1, 2}});
  CHECK(o[0].bits == numbers[2].bits);
  CHECK(o[1].bits == numbers[1].bits);
  CHECK(Array(state, state + 4) == Array{3, 2, 2, 2});
  in.v = {v, {1, 2, 1}};
  CHECK_THROWS_AS(fwp::delta_step(in, {state, {1, 1, 2, 2}}, {o, {1, 1, 2}}), fwp::Error);
}

TEST_CASE("half precisions by their bits, states in float") {
  check_half(kHalf);
  check_half(kBrain);
}

TEST_CASE_FIXTURE(Problem, "a step of all tokens on states from a pool") {
  const int64_t size = H * K * V, slots[] = {3, 1};
  Array pool(4 * size, -1.0);
  for (int64_t i = 0; i < B * size; ++i) pool[slots[i / size] * size + i % size] = x.h0[i];
  in.h0 = {};
  in.state_indices = {slots, {B}};
  fwp::delta_step(in, {pool.data(), {4, H, K, V}}, {o.data(), {B, T, H, V}}, options);
  for (int64_t i = 0; i < B * size; ++i) hT[i] = pool[slots[i / size] * size + i % size];
  check_outputs(Rule::delta);
  for (int64_t i = 0; i < size; ++i) CHECK((pool[i] == -1 && pool[2 * size + i] == -1));
}

// DPFP with nu = 2 of a row of K numbers, feature by feature.
std::vector<double> dpfp(const double* x) {
  std::vector<double> r(2 * K), y;
  for (int64_t i = 0; i < K; ++i) {
    r[i] = std::max(x[i], 0.0);
    r[K + i] = std::max(-x[i], 0.0);
  }
  for (int64_t j = 1; j <= 2; ++j)
    for (int64_t i = 0; i < 2 * K; ++i) y.push_back(r[i] * r[(i - j + 2 * K) % (2 * K)]);
  return y;
}

TEST_CASE_FIXTURE(Problem, "a feature map alone, and inside a scan") {
  fwp::feature_map map;
  map.kind = FWP_MAP_DPFP;
  map.nu = 2;
  const int64_t features = fwp::feature_size(map, K), rows = B * T * H;
  REQUIRE(features == 4 * K);
  Array q(rows * features), k(q.count());
  fwp::feature_map_fwd(map, {x.q.data(), {rows, K}}, {q.data(), {rows, features}});
  fwp::feature_map_fwd(map, {x.k.data(), {rows, K}}, {k.data(), {rows, features}});
  for (int64_t row = 0; row < rows; ++row) {
    const auto expected = dpfp(x.q.data() + row * K);
    for (int64_t i = 0; i < features; ++i) CHECK(q[row * features + i] == expected[i]);
  }
  Array dx(x.q.count());
  fwp::feature_map_bwd(map, {q.data(), {rows, features}}, {x.q.data(), {rows, K}}, {dx.data(), {rows, K}});
  double along = 0, twice = 0;  // |phi(x)|^2 is of degree four: <x, its gradient> is four times it
  for (int64_t i = 0; i < dx.count(); ++i) along += 2 * dx[i] * x.q[i];
  for (int64_t i = 0; i < q.count(); ++i) twice += q[i] * q[i];
  CHECK(along == doctest::Approx(4 * twice));

  for (const bool normalised : {false, true}) {
    options.qk_norm = FWP_NORM_SUM;
    options.attention_norm = normalised;
    const int64_t columns = V + (normalised ? 1 : 0);
    Array inside(B * T * H * V), outside(inside.count()), S(B * H * features * columns), state(S.count());
    in.h0 = {};
    options.feature_map = map;
    fwp::delta_fwd(in, {{inside.data(), {B, T, H, V}}, {S.data(), {B, H, features, columns}}}, options);
    options.feature_map = {};
    fwp::inputs mapped = in;
    mapped.q = {q.data(), {B, T, H, features}};
    mapped.k = {k.data(), {B, T, H, features}};
    fwp::delta_fwd(mapped, {{outside.data(), {B, T, H, V}}, {state.data(), {B, H, features, columns}}}, options);
    CHECK(reference::distance(inside, outside) == 0);
    CHECK(reference::distance(S, state) == 0);
  }
}

TEST_CASE_FIXTURE(Problem, "a diagnosis tells what a first token finds: nothing") {
  Array probes(B * T * H * FWP_PROBES);
  in.h0 = {};
  const size_t bytes = fwp::delta_diagnose_workspace(in);
  std::vector<char> memory(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  fwp::delta_diagnose(in, {probes.data(), {B, T, H, FWP_PROBES}}, options,
                      {memory.data() + (64 - address % 64) % 64, bytes});
  double value = 0, key = 0;
  for (int64_t i = 0; i < V; ++i) value += x.v[i] * x.v[i];
  for (int64_t i = 0; i < K; ++i) key += x.k[i] * x.k[i];
  CHECK(probes[0] == doctest::Approx(value));  // |v|^2
  CHECK(probes[1] == 0);                       // |v~|^2
  CHECK(probes[3] == doctest::Approx(value));  // |v - v~|^2
  CHECK(probes[6] == doctest::Approx(key));    // |k|^2
  CHECK(probes[8] == 0);                       // z'.k
  Array linear(probes.count());
  fwp::linear_diagnose(in, {linear.data(), {B, T, H, FWP_PROBES}}, options);
  CHECK(linear[0] == probes[0]);
  CHECK(reference::distance(linear, probes) > 0);
}

TEST_CASE("FAVOR takes its projection, and says what is wrong with another") {
  const Array R = reference::Random(5).normal(3 * K), x = reference::Random(6).normal(K);
  fwp::feature_map map;
  map.kind = FWP_MAP_FAVOR;
  map.projection = {R.data(), {3, K}};
  CHECK(fwp::feature_size(map, K) == 6);
  Array y(6);
  fwp::feature_map_fwd(map, {x.data(), {1, K}}, {y.data(), {1, 6}});
  for (int64_t i = 0; i < 3; ++i) {
    double product = 0, square = 0;
    for (int64_t j = 0; j < K; ++j) {
      product += R[i * K + j] * x[j];
      square += x[j] * x[j];
    }
    CHECK(y[i] == doctest::Approx(std::exp(product - square / 2) / std::sqrt(6.0)));
    CHECK(y[3 + i] == doctest::Approx(std::exp(-product - square / 2) / std::sqrt(6.0)));
  }
  CHECK_THROWS_WITH_AS(fwp::feature_size(map, K + 1), "projection: expected shape (m, K_in=6), got (3, 5)", fwp::Error);
  map.kind = 17;
  CHECK_THROWS_WITH_AS(fwp::feature_size(map, K), "feature_map: expected a kind from 1 to 5, got 17", fwp::Error);
}

TEST_CASE_FIXTURE(Problem, "errors are exceptions with the code and the message of fwp.h") {
  in.k = {x.k.data(), {B, T, H, K - 1}};
  try {
    fwp::delta_fwd(in, outputs());
    FAIL("keys and queries of different sizes were accepted");
  } catch (const fwp::Error& error) {
    CHECK(error.code() == FWP_SHAPE_ERROR);
    CHECK(std::string(error.what()).find("k:") == 0);
  }
  CHECK_THROWS_AS(fwp::set_num_threads(0), fwp::Error);
  CHECK_THROWS_AS(fwp::use_isa("no such level"), fwp::Error);
  CHECK_THROWS_AS((fwp::view(x.q.data(), {1, 1, 1, 1, 1})), fwp::Error);
}

TEST_CASE_FIXTURE(Problem, "tensors of devices and streams go to the library as they are") {
  fwp::options on_stream;
  on_stream.stream = &x;
  CHECK_THROWS_WITH_AS(fwp::delta_fwd(in, outputs(), on_stream), "stream: expected NULL for CPU tensors, got a stream",
                       fwp::Error);
  in.k = in.k.cuda(3);
  CHECK_THROWS_WITH_AS(fwp::delta_fwd(in, outputs()), "k: expected a tensor on the CPU, as q is, got one on cuda:3",
                       fwp::Error);
  in.q = in.q.cuda();
  try {
    fwp::delta_fwd(in, outputs());
    FAIL("a device was found");
  } catch (const fwp::Error& error) {
    CHECK(error.code() == FWP_DEVICE_ERROR);
  }
}

TEST_CASE("threads and level can be asked for and set") {
  const int before = fwp::get_num_threads();
  fwp::set_num_threads(2);
  CHECK(fwp::get_num_threads() == 2);
  fwp::set_num_threads(before);
  const std::string isa = fwp::isa();
  fwp::use_isa("base");
  CHECK(std::string(fwp::isa()) == "base");
  fwp::use_isa(isa.c_str());
}

}  // namespace
