// The C interface against the recurrence in double: both rules, every decay, forward, backward and step, both dtypes.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "fwp/fwp.h"
#include "reference.hpp"

namespace {

using reference::Array;
using reference::Decay;
using reference::Inputs;
using reference::Rule;
using reference::Sizes;

const Decay kDecays[] = {Decay::none, Decay::scalar, Decay::channel};
const Rule kRules[] = {Rule::linear, Rule::delta};
const Sizes kSizes[] = {{1, 1, 1, 1, 1}, {2, 7, 3, 5, 3}, {1, 70, 2, 64, 64}, {1, 33, 1, 20, 130}};

// A contiguous tensor that owns its memory. Starts as NaN, so that an element left unwritten is seen.
template <class T>
class Tensor {
 public:
  explicit Tensor(std::vector<int64_t> shape) : shape_(std::move(shape)) {
    int64_t elements = 1;
    for (int64_t n : shape_) elements *= n;
    data_.assign(static_cast<size_t>(elements), std::numeric_limits<T>::quiet_NaN());
    tensor_.data = data_.data();
    tensor_.device = {kDLCPU, 0};
    tensor_.ndim = static_cast<int32_t>(shape_.size());
    tensor_.dtype = {static_cast<uint8_t>(kDLFloat), 8 * sizeof(T), 1};
    tensor_.shape = shape_.data();
  }
  Tensor(std::vector<int64_t> shape, const Array& values) : Tensor(std::move(shape)) {
    std::transform(values.begin(), values.end(), data_.begin(), [](double x) { return static_cast<T>(x); });
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  DLTensor* get() { return &tensor_; }
  Array values() const { return Array(data_.begin(), data_.end()); }

 private:
  std::vector<int64_t> shape_;
  std::vector<T> data_;
  DLTensor tensor_{};
};

// The tensors of one problem; absent ones are empty.
template <class T>
struct Call {
  Sizes n;
  bool beta_given, decays;
  Tensor<T> q, k, v, beta, g, h0;

  static std::vector<int64_t> g_shape(const Inputs& x) {
    if (x.decay == Decay::none) return {0};
    if (x.decay == Decay::scalar) return {x.n.B, x.n.T, x.n.H};
    return {x.n.B, x.n.T, x.n.H, x.n.K};
  }
  explicit Call(const Inputs& x)
      : n(x.n),
        beta_given(!x.beta.empty()),
        decays(x.decay != Decay::none),
        q({n.B, n.T, n.H, n.K}, x.q),
        k({n.B, n.T, n.H, n.K}, x.k),
        v({n.B, n.T, n.H, n.V}, x.v),
        beta(beta_given ? std::vector<int64_t>{n.B, n.T, n.H} : std::vector<int64_t>{0}, x.beta),
        g(g_shape(x), x.g),
        h0({n.B, n.H, n.K, n.V}, x.h0) {}

  fwp_inputs inputs() {
    fwp_inputs in = FWP_INPUTS_INIT;
    in.q = q.get();
    in.k = k.get();
    in.v = v.get();
    in.beta = beta_given ? beta.get() : nullptr;
    in.g = decays ? g.get() : nullptr;
    in.h0 = h0.get();
    return in;
  }
};

fwp_options with_scale(double scale) {
  fwp_options options = FWP_OPTIONS_INIT;
  options.scale = scale;
  return options;
}

template <class T>
double tolerance(const Array& expected) {
  const double epsilon = std::is_same_v<T, float> ? 2e-6 : 1e-13;
  return epsilon * (1 + std::sqrt(reference::dot(expected, expected)));
}

template <class F>
void for_each_case(F check) {
  for (Rule rule : kRules)
    for (Decay decay : kDecays)
      for (const Sizes& n : kSizes) {
        CAPTURE(static_cast<int>(rule));
        CAPTURE(static_cast<int>(decay));
        CAPTURE(n.T);
        CAPTURE(n.K);
        CAPTURE(n.V);
        check(rule, reference::Random(7).inputs(n, decay));
      }
}

TEST_CASE_TEMPLATE("forward is the recurrence", T, float, double) {
  const fwp_options options = with_scale(0.5);
  for_each_case([&](Rule rule, const Inputs& x) {
    const auto expected = reference::forward(rule, x, options.scale);
    Call<T> call(x);
    const fwp_inputs in = call.inputs();
    Tensor<T> o({x.n.B, x.n.T, x.n.H, x.n.V}), hT({x.n.B, x.n.H, x.n.K, x.n.V});
    fwp_outputs out = FWP_OUTPUTS_INIT;
    out.o = o.get();
    out.hT = hT.get();
    auto* fwd = rule == Rule::delta ? fwp_delta_fwd : fwp_linear_fwd;
    REQUIRE_MESSAGE(fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_OK, fwp_last_error());
    CHECK(reference::distance(o.values(), expected.o) <= tolerance<T>(expected.o));
    CHECK(reference::distance(hT.values(), expected.hT) <= tolerance<T>(expected.hT));
  });
}

TEST_CASE("backward is the slope of forward") {
  const fwp_options options = with_scale(0.5);
  reference::Random random(11);
  for_each_case([&](Rule rule, const Inputs& x) {
    Call<double> call(x);
    const fwp_inputs in = call.inputs();
    const reference::Outputs dy{random.normal(x.n.B * x.n.T * x.n.H * x.n.V),
                                random.normal(x.n.B * x.n.H * x.n.K * x.n.V)};
    Tensor<double> d_o({x.n.B, x.n.T, x.n.H, x.n.V}, dy.o), d_hT({x.n.B, x.n.H, x.n.K, x.n.V}, dy.hT);
    fwp_cotangents cotangents = FWP_COTANGENTS_INIT;
    cotangents.d_o = d_o.get();
    cotangents.d_hT = d_hT.get();

    Call<double> grad(x);
    fwp_gradients gradients = FWP_GRADIENTS_INIT;
    gradients.dq = grad.q.get();
    gradients.dk = grad.k.get();
    gradients.dv = grad.v.get();
    gradients.dbeta = grad.beta.get();
    gradients.dg = grad.decays ? grad.g.get() : nullptr;
    gradients.dh0 = grad.h0.get();
    auto* bwd = rule == Rule::delta ? fwp_delta_bwd : fwp_linear_bwd;
    REQUIRE_MESSAGE(bwd(&options, &in, &cotangents, &gradients, nullptr, 0, nullptr) == FWP_OK, fwp_last_error());

    const auto check = [&](const char* name, Array Inputs::* input, const Tensor<double>& gradient) {
      CAPTURE(name);
      const Array direction = random.normal((x.*input).count());
      const double expected = reference::slope(rule, x, input, direction, dy, options.scale);
      CHECK(reference::dot(gradient.values(), direction) == doctest::Approx(expected).epsilon(1e-6));
    };
    check("q", &Inputs::q, grad.q);
    check("k", &Inputs::k, grad.k);
    check("v", &Inputs::v, grad.v);
    check("beta", &Inputs::beta, grad.beta);
    if (grad.decays) check("g", &Inputs::g, grad.g);
    check("h0", &Inputs::h0, grad.h0);
  });
}

TEST_CASE_TEMPLATE("a step is a scan of one token", T, float, double) {
  const fwp_options options = with_scale(0.5);
  for (Rule rule : kRules) {
    for (Decay decay : kDecays) {
      const Sizes n{2, 1, 3, 5, 9};
      const Inputs x = reference::Random(3).inputs(n, decay);
      const auto expected = reference::forward(rule, x, options.scale);
      Tensor<T> q({n.B, n.H, n.K}, x.q), k({n.B, n.H, n.K}, x.k), v({n.B, n.H, n.V}, x.v), beta({n.B, n.H}, x.beta);
      Tensor<T> g(decay == Decay::none     ? std::vector<int64_t>{0}
                  : decay == Decay::scalar ? std::vector<int64_t>{n.B, n.H}
                                           : std::vector<int64_t>{n.B, n.H, n.K},
                  x.g);
      Tensor<T> state({n.B, n.H, n.K, n.V}, x.h0), o({n.B, n.H, n.V});
      fwp_inputs in = FWP_INPUTS_INIT;
      in.q = q.get();
      in.k = k.get();
      in.v = v.get();
      in.beta = beta.get();
      in.g = decay == Decay::none ? nullptr : g.get();
      auto* step = rule == Rule::delta ? fwp_delta_step : fwp_linear_step;
      REQUIRE_MESSAGE(step(&options, &in, state.get(), o.get(), nullptr, 0, nullptr) == FWP_OK, fwp_last_error());
      CHECK(reference::distance(o.values(), expected.o) <= tolerance<T>(expected.o));
      CHECK(reference::distance(state.values(), expected.hT) <= tolerance<T>(expected.hT));
    }
  }
}

// Three sequences of two tokens in a pool of five states; the second sequence has none.
struct Pool {
  const Sizes n{3, 2, 2, 5, 40};
  const Inputs x = reference::Random(29).inputs(n, Decay::scalar);
  Call<double> call{x};
  const Array contents = reference::Random(31).normal(5 * n.H * n.K * n.V);
  Tensor<double> pool{{5, n.H, n.K, n.V}, contents}, o{{n.B, n.T, n.H, n.V}};
  std::vector<int32_t> slots{4, -1, 1};
  std::vector<int64_t> shape{3};
  DLTensor indices{slots.data(), {kDLCPU, 0}, 1, {kDLInt, 32, 1}, shape.data(), nullptr, 0};
  fwp_options options = FWP_OPTIONS_INIT;
  fwp_inputs in = call.inputs();
  Pool() {
    in.h0 = nullptr;
    in.state_indices = &indices;
  }

  int step(void* workspace = nullptr, size_t bytes = 0) {
    return fwp_delta_step(&options, &in, pool.get(), o.get(), workspace, bytes, nullptr);
  }
  // Element i of slot s.
  int64_t at(int64_t s, int64_t i) const { return s * n.H * n.K * n.V + i; }

  void check() {
    const int64_t size = n.H * n.K * n.V, rows = n.T * n.H * n.V;
    Inputs own = x;
    for (int64_t b : {0, 2})
      for (int64_t i = 0; i < size; ++i) own.h0[b * size + i] = contents[at(slots[static_cast<size_t>(b)], i)];
    const auto expected = reference::forward(Rule::delta, own, 1);
    const Array after = pool.values(), output = o.values();
    for (int64_t b : {0, 2}) {
      const Array out(output.begin() + b * rows, output.begin() + (b + 1) * rows);
      CHECK(reference::distance(out, Array(expected.o.begin() + b * rows, expected.o.begin() + (b + 1) * rows)) <
            1e-12);
      for (int64_t i = 0; i < size; ++i)
        CHECK(after[at(slots[static_cast<size_t>(b)], i)] == doctest::Approx(expected.hT[b * size + i]).epsilon(1e-12));
    }
    for (int64_t i = 0; i < rows; ++i) CHECK(output[rows + i] == 0);
    for (int64_t s : {0, 2, 3})
      for (int64_t i = 0; i < size; ++i) CHECK(after[at(s, i)] == contents[at(s, i)]);
  }
};

TEST_CASE_FIXTURE(Pool, "a step of several tokens takes its states from a pool") {
  REQUIRE_MESSAGE(step() == FWP_OK, fwp_last_error());
  check();
}

TEST_CASE_FIXTURE(Pool, "a caller's workspace holds the slots too") {
  size_t bytes = 0, without = 0;
  REQUIRE(fwp_delta_step_workspace(&options, &in, &bytes) == FWP_OK);
  in.state_indices = nullptr;
  REQUIRE(fwp_delta_step_workspace(&options, &in, &without) == FWP_OK);
  CHECK(bytes > without);
  in.state_indices = &indices;
  std::vector<char> memory(bytes + 64, 'x');
  char* const aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  CHECK(step(aligned, bytes - 1) == FWP_ARGUMENT_ERROR);
  REQUIRE_MESSAGE(step(aligned, bytes) == FWP_OK, fwp_last_error());
  check();
  for (char* byte = aligned + bytes; byte < memory.data() + memory.size(); ++byte) CHECK(*byte == 'x');
}

TEST_CASE_FIXTURE(Pool, "wrong slots are refused before anything changes") {
  int expected = FWP_ARGUMENT_ERROR;
  SUBCASE("twice") { slots = {4, -1, 4}; }
  SUBCASE("below -1") { slots = {4, -2, 1}; }
  SUBCASE("beyond the pool") { slots = {4, -1, 5}; }
  SUBCASE("one too few") {
    shape = {2};
    expected = FWP_SHAPE_ERROR;
  }
  SUBCASE("floating point") {
    indices.dtype.code = kDLFloat;
    expected = FWP_DTYPE_ERROR;
  }
  CHECK(step() == expected);
  CHECK(std::string(fwp_last_error()).find("state_indices: expected ") == 0);
  CHECK(pool.values() == contents);
  for (double value : o.values()) CHECK(std::isnan(value));
}

TEST_CASE_FIXTURE(Pool, "slots are for steps") {
  fwp_outputs out = FWP_OUTPUTS_INIT;
  out.o = o.get();
  CHECK(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_ARGUMENT_ERROR);
  in.struct_size = offsetof(fwp_inputs, state_indices);  // a program that was built before there were slots
  CHECK(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_OK);
}

// A small delta problem whose parts the error cases below spoil.
struct Refused {
  Inputs x = reference::Random(5).inputs({1, 4, 2, 3, 3}, Decay::none);
  Call<double> call{x};
  Tensor<double> o{{1, 4, 2, 3}};
  fwp_options options = FWP_OPTIONS_INIT;
  fwp_inputs in = call.inputs();
  fwp_outputs out = FWP_OUTPUTS_INIT;
  Refused() { out.o = o.get(); }

  int forward(void* workspace = nullptr, size_t bytes = 0) {
    return fwp_delta_fwd(&options, &in, &out, workspace, bytes, nullptr);
  }
};

TEST_CASE_FIXTURE(Refused, "the unspoiled problem is accepted") { CHECK(forward() == FWP_OK); }

TEST_CASE_FIXTURE(Refused, "errors have a code and a message, and leave the output alone") {
  int expected = FWP_OK;
  SUBCASE("no beta") {
    in.beta = nullptr;
    expected = FWP_ARGUMENT_ERROR;
  }
  SUBCASE("a struct without size") {
    in.struct_size = 0;
    expected = FWP_ARGUMENT_ERROR;
  }
  SUBCASE("an unknown device") {
    const int32_t cuda = 2;  // fwp.h names no such device
    static_assert(sizeof cuda == sizeof(DLDeviceType));
    std::memcpy(&call.k.get()->device.device_type, &cuda, sizeof cuda);
    expected = FWP_DEVICE_ERROR;
  }
  SUBCASE("integers") {
    call.v.get()->dtype.code = kDLInt;
    expected = FWP_DTYPE_ERROR;
  }
  SUBCASE("a missing axis") {
    call.v.get()->ndim = 3;
    expected = FWP_SHAPE_ERROR;
  }
  SUBCASE("output over input") {
    out.o = call.v.get();
    expected = FWP_ARGUMENT_ERROR;
  }
  const Array before = call.v.values();
  CHECK(forward() == expected);
  if (expected != FWP_OK) {
    CHECK(std::string(fwp_last_error()).size() > 10);
    CHECK(call.v.values() == before);
    for (double value : o.values()) CHECK(std::isnan(value));
  }
}

TEST_CASE_FIXTURE(Refused, "a caller's workspace gives the same bits") {
  REQUIRE(forward() == FWP_OK);
  const Array expected = o.values();
  size_t bytes = 0;
  REQUIRE(fwp_delta_fwd_workspace(&options, &in, &bytes) == FWP_OK);
  std::vector<char> memory(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  char* aligned = memory.data() + (64 - address % 64) % 64;
  CHECK(forward(aligned, bytes) == FWP_OK);
  CHECK(o.values() == expected);
  if (bytes > 0) {
    CHECK(forward(aligned, bytes - 1) == FWP_ARGUMENT_ERROR);
    CHECK(forward(aligned + 1, bytes) == FWP_ARGUMENT_ERROR);
  }
}

TEST_CASE("checkpoints spare the backward pass nothing but time") {
  const fwp_options options = FWP_OPTIONS_INIT;
  const Inputs x = reference::Random(13).inputs({1, 300, 2, 20, 24}, Decay::scalar);
  Call<double> call(x);
  const fwp_inputs in = call.inputs();
  int64_t elements = 0;
  REQUIRE(fwp_checkpoints(&options, &in, &elements) == FWP_OK);
  Tensor<double> o({1, 300, 2, 24}), checkpoints({elements});
  fwp_outputs out = FWP_OUTPUTS_INIT;
  out.o = o.get();
  out.checkpoints = checkpoints.get();
  REQUIRE_MESSAGE(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_OK, fwp_last_error());

  Tensor<double> d_o({1, 300, 2, 24}, reference::Random(17).normal(300 * 2 * 24));
  Array dk[2];
  for (int given = 0; given < 2; ++given) {
    fwp_cotangents cotangents = FWP_COTANGENTS_INIT;
    cotangents.d_o = d_o.get();
    cotangents.checkpoints = given ? checkpoints.get() : nullptr;
    Tensor<double> gradient({1, 300, 2, 20});
    fwp_gradients gradients = FWP_GRADIENTS_INIT;
    gradients.dk = gradient.get();
    REQUIRE_MESSAGE(fwp_delta_bwd(&options, &in, &cotangents, &gradients, nullptr, 0, nullptr) == FWP_OK,
                    fwp_last_error());
    dk[given] = gradient.values();
  }
  CHECK(dk[0] == dk[1]);
}

TEST_CASE("an interrupted call says so, and the next one works") {
  fwp_options options = FWP_OPTIONS_INIT;
  const Inputs x = reference::Random(19).inputs({1, 20000, 2, 32, 32}, Decay::none);
  Call<double> call(x);
  const fwp_inputs in = call.inputs();
  Tensor<double> o({1, 20000, 2, 32});
  fwp_outputs out = FWP_OUTPUTS_INIT;
  out.o = o.get();
  options.interrupt = [](void*) { return 1; };
  CHECK(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_INTERRUPTED);
  options.interrupt = nullptr;
  CHECK(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_OK);
}

TEST_CASE("threads do not change a bit") {
  const fwp_options options = FWP_OPTIONS_INIT;
  const Inputs x = reference::Random(23).inputs({1, 200, 1, 64, 200}, Decay::channel);
  Call<float> call(x);
  const fwp_inputs in = call.inputs();
  const int threads = fwp_get_num_threads();
  Array results[2];
  for (int parallel = 0; parallel < 2; ++parallel) {
    REQUIRE(fwp_set_num_threads(parallel ? 3 : 1) == FWP_OK);
    Tensor<float> o({1, 200, 1, 200});
    fwp_outputs out = FWP_OUTPUTS_INIT;
    out.o = o.get();
    REQUIRE_MESSAGE(fwp_delta_fwd(&options, &in, &out, nullptr, 0, nullptr) == FWP_OK, fwp_last_error());
    results[parallel] = o.values();
  }
  CHECK(results[0] == results[1]);
  CHECK(fwp_set_num_threads(0) == FWP_ARGUMENT_ERROR);
  CHECK(fwp_set_num_threads(threads) == FWP_OK);
}

TEST_CASE("memory of devices") {
  char from[] = "abc", to[] = "xyz";
  CHECK(fwp_device_copy(-1, to, from, 3, nullptr) == FWP_ARGUMENT_ERROR);
  CHECK(fwp_device_wait(-1, from, to) == FWP_ARGUMENT_ERROR);
  CHECK(fwp_device_check(-1) == FWP_ARGUMENT_ERROR);
  CHECK(fwp_device_allocate(-1, 3, nullptr) == nullptr);
  const std::string state = fwp_cuda_state();
  if (state == "available" || state == "emulated") return;
  const std::string expected = "device: expected memory of the CPU, since CUDA is " + state + ", got cuda:0";
  CHECK(fwp_device_copy(0, to, from, 3, nullptr) == FWP_DEVICE_ERROR);
  CHECK(fwp_last_error() == expected);
  CHECK(fwp_device_wait(0, from, to) == FWP_DEVICE_ERROR);
  CHECK(fwp_device_check(0) == FWP_DEVICE_ERROR);
  CHECK(fwp_device_allocate(0, 3, nullptr) == nullptr);
  CHECK(fwp_last_error() == expected);
  CHECK(std::string(to) == "xyz");
}

TEST_CASE("a library that knows itself") {
  CHECK(fwp_abi_version() == FWP_ABI_VERSION);
  CHECK(std::string(fwp_version()) == FWP_EXPECTED_VERSION);
  size_t errors = 0;
  const fwp_error_info* table = fwp_error_table(&errors);
  for (size_t i = 0; i < errors; ++i) {
    CHECK(table[i].code != FWP_OK);
    CHECK(std::strlen(table[i].name) > 0);
    CHECK(std::strlen(table[i].meaning) > 0);
  }
  CHECK(fwp_use_isa("no such level") == FWP_ARGUMENT_ERROR);
  CHECK(fwp_block_size() >= 1);
}

}  // namespace
