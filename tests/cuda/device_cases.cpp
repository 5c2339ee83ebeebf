// The C interface on a device against the CPU's: scans, gradients and steps of small random arrays. A plain program, so
// that compute-sanitizer can run it: device_cases [WORD ...] runs the cases whose names have every word.
// For nvcc as CUDA (-x cu), for the emulator as C++: there the memory of the device is the host's.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fwp/fwp.h"

namespace {

#ifdef __CUDACC__
void put(void* there, const void* here, size_t bytes) { cudaMemcpy(there, here, bytes, cudaMemcpyHostToDevice); }
void get(void* here, const void* there, size_t bytes) { cudaMemcpy(here, there, bytes, cudaMemcpyDeviceToHost); }
// What is left when the context ends has leaked, says compute-sanitizer; it does not say so without an end.
void end() {
  cudaDeviceSynchronize();
  fwp_empty_cache();
  cudaDeviceReset();
}
#else
void put(void* there, const void* here, size_t bytes) { std::memcpy(there, here, bytes); }
void get(void* here, const void* there, size_t bytes) { std::memcpy(here, there, bytes); }
void end() {}
#endif

struct Type {
  const char* name;
  DLDataType dl;
  double tolerance;  // relative, in L2
};
constexpr Type kF32 = {"f32", {kDLFloat, 32, 1}, 1e-5}, kF64 = {"f64", {kDLFloat, 64, 1}, 1e-12},
               kF16 = {"f16", {kDLFloat, 16, 1}, 4e-3}, kBf16 = {"bf16", {kDLBfloat, 16, 1}, 1.6e-2};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

// Exact for the numbers used here, multiples of 1/64 up to 2.
void encode(const Type& type, double x, char* to) {
  const auto narrow = static_cast<float>(x);
  const uint32_t bits = bits_of(narrow);
  if (type.dl.bits == 64) {
    std::memcpy(to, &x, 8);
  } else if (type.dl.bits == 32) {
    std::memcpy(to, &narrow, 4);
  } else {
    const uint32_t half = x == 0 ? 0 : (bits >> 16 & 0x8000u) | ((bits & 0x7fffffffu) - (112u << 23)) >> 13;
    const auto both = static_cast<uint16_t>(type.dl.code == kDLBfloat ? bits >> 16 : half);
    std::memcpy(to, &both, 2);
  }
}
double decode(const Type& type, const char* from) {
  double x = 0;
  if (type.dl.bits == 64) {
    std::memcpy(&x, from, 8);
  } else if (type.dl.bits == 32) {
    float narrow;
    std::memcpy(&narrow, from, 4);
    x = static_cast<double>(narrow);
  } else {
    uint16_t both;
    std::memcpy(&both, from, 2);
    if (type.dl.code == kDLBfloat) {
      const uint32_t bits = static_cast<uint32_t>(both) << 16;
      float narrow;
      std::memcpy(&narrow, &bits, 4);
      x = static_cast<double>(narrow);
    } else {
      const int exponent = both >> 10 & 31, mantissa = both & 1023;
      x = exponent == 31 ? HUGE_VAL
                         : std::ldexp(exponent == 0 ? mantissa : 1024 + mantissa, (exponent == 0 ? 1 : exponent) - 25);
      x = exponent == 31 && mantissa != 0 ? std::nan("") : both >> 15 != 0 ? -x : x;
    }
  }
  return x;
}

// A compact tensor: on the device of the case's type, on the host of doubles. Made of numbers, or of NaN.
class Tensor {
 public:
  Tensor(bool on_device, const Type& type, const std::vector<int64_t>& shape, const std::vector<double>& values = {})
      : on_device_(on_device), type_(on_device ? type : kF64), shape_(shape) {
    size_t size = 1;
    for (const int64_t n : shape) size *= static_cast<size_t>(n);
    host_.assign(size * item(), '\xff');
    for (size_t i = 0; i < values.size(); ++i) encode(type_, values[i], host_.data() + i * item());
    if (on_device_) {
      there_ = fwp_device_allocate(0, host_.size(), nullptr);
      put(there_, host_.data(), host_.size());
    }
    tensor_ = {on_device_ ? there_ : host_.data(),
               {on_device_ ? kDLCUDA : kDLCPU, 0},
               static_cast<int32_t>(shape_.size()),
               type_.dl,
               shape_.data(),
               nullptr,
               0};
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (on_device_) fwp_device_free(0, there_, nullptr);
  }

  const DLTensor* tensor() const { return &tensor_; }
  std::vector<double> values() {
    if (on_device_) get(host_.data(), there_, host_.size());
    std::vector<double> values(host_.size() / item());
    for (size_t i = 0; i < values.size(); ++i) values[i] = decode(type_, host_.data() + i * item());
    return values;
  }

 private:
  size_t item() const { return type_.dl.bits / 8; }

  bool on_device_;
  Type type_;
  std::vector<int64_t> shape_;
  std::vector<char> host_;
  void* there_ = nullptr;
  DLTensor tensor_{};
};

struct Case {
  bool delta;
  int decay;  // 0 none, 1 scalar, 2 channel
  Type type;
  int64_t B, T, H, K, V;

  std::string name() const {
    const char* const decays[] = {"none", "scalar", "channel"};
    std::string text = std::string(delta ? "delta " : "linear ") + decays[decay] + ' ' + type.name;
    const std::pair<char, int64_t> sizes[] = {{'B', B}, {'T', T}, {'H', H}, {'K', K}, {'V', V}};
    for (const auto& [letter, n] : sizes) text += std::string(" ") + letter + std::to_string(n);
    return text;
  }
};

void check(int status) {
  if (status != FWP_OK) throw std::runtime_error(fwp_last_error());
}

// Everything that a case's scan, its gradients and a step give, by name.
std::vector<std::pair<const char*, std::vector<double>>> results(bool on_device, const Case& c) {
  const std::vector<int64_t> keys{c.B, c.T, c.H, c.K}, rows{c.B, c.T, c.H, c.V}, scalars{c.B, c.T, c.H};
  const std::vector<int64_t> gates = c.decay == 2 ? keys : scalars, states{c.B, c.H, c.K, c.V};
  const Type state_type = c.type.dl.bits == 64 ? kF64 : kF32;
  std::mt19937 rng(1);
  // Multiples of 1/64 between shift - scale and shift + scale, the same on every device.
  const auto random = [&](const std::vector<int64_t>& shape, double scale, double shift = 0) {
    size_t size = 1;
    for (const int64_t n : shape) size *= static_cast<size_t>(n);
    std::vector<double> values(size);
    for (double& x : values) x = std::round(64 * (shift + scale * (static_cast<double>(rng() % 65) - 32) / 32)) / 64;
    return values;
  };
  const auto number = [&](const std::vector<int64_t>& shape, double scale, double shift = 0) {
    return std::make_unique<Tensor>(on_device, c.type, shape, random(shape, scale, shift));
  };
  const auto state = [&] { return std::make_unique<Tensor>(on_device, state_type, states, random(states, 1)); };
  const auto result = [&](const std::vector<int64_t>& shape, const Type& type) {
    return std::make_unique<Tensor>(on_device, type, shape);
  };

  const double key = 1.7 / std::sqrt(static_cast<double>(c.K));  // for vectors of about unit length
  const auto q = number(keys, key), k = number(keys, key), v = number(rows, 1), beta = number(scalars, 0.5, 0.5);
  const auto g = number(gates, 0.25, -0.25), d_o = number(rows, 1), h0 = state(), d_hT = state();
  const auto o = result(rows, c.type), hT = result(states, state_type), dq = result(keys, c.type);
  const auto dk = result(keys, c.type), dv = result(rows, c.type), dbeta = result(scalars, c.type);
  const auto dg = result(gates, c.type), dh0 = result(states, state_type), step_o = result(rows, c.type);
  const auto stepped = state();

  fwp_options options = FWP_OPTIONS_INIT;
  options.scale = key;
  fwp_inputs inputs = {sizeof(fwp_inputs), q->tensor(),    k->tensor(),
                       v->tensor(),        beta->tensor(), c.decay != 0 ? g->tensor() : nullptr,
                       h0->tensor(),       nullptr,        nullptr};
  const fwp_outputs outputs = {sizeof(fwp_outputs), o->tensor(), hT->tensor(), nullptr};
  check((c.delta ? fwp_delta_fwd : fwp_linear_fwd)(&options, &inputs, &outputs, nullptr, 0, nullptr));
  const fwp_cotangents from = {sizeof(fwp_cotangents), d_o->tensor(), d_hT->tensor(), nullptr};
  const fwp_gradients to = {sizeof(fwp_gradients), dq->tensor(),    dk->tensor(),
                            dv->tensor(),          dbeta->tensor(), c.decay != 0 ? dg->tensor() : nullptr,
                            dh0->tensor()};
  check((c.delta ? fwp_delta_bwd : fwp_linear_bwd)(&options, &inputs, &from, &to, nullptr, 0, nullptr));
  inputs.h0 = nullptr;
  check((c.delta ? fwp_delta_step : fwp_linear_step)(&options, &inputs, stepped->tensor(), step_o->tensor(), nullptr, 0,
                                                     nullptr));

  std::vector<std::pair<const char*, std::vector<double>>> found = {
      {"o", o->values()},     {"hT", hT->values()},           {"dq", dq->values()},
      {"dk", dk->values()},   {"dv", dv->values()},           {"dbeta", dbeta->values()},
      {"dh0", dh0->values()}, {"step's o", step_o->values()}, {"step's state", stepped->values()}};
  if (c.decay != 0) found.emplace_back("dg", dg->values());
  if (on_device) check(fwp_device_check(0));
  return found;
}

// |x - exact| / |exact|, in L2.
double relative_error(const std::vector<double>& x, const std::vector<double>& exact) {
  double error = 0, size = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    error += (x[i] - exact[i]) * (x[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(error / size);
}

std::vector<Case> every_case() {
  std::vector<Case> cases;
  for (const Type& type : {kF32, kF64, kF16, kBf16})
    for (const bool delta : {false, true})
      for (const int decay : {0, 1, 2}) {
        cases.push_back({delta, decay, type, 2, 3, 2, 8, 12});
        cases.push_back({delta, decay, type, 1, 70, 2, 64, 64});
        cases.push_back({delta, decay, type, 1, 130, 1, 128, 128});
      }
  cases.push_back({true, 2, kF32, 1, 1030, 1, 16, 16});  // cut into segments
  cases.push_back({false, 1, kBf16, 1, 2100, 1, 32, 32});
  cases.push_back({true, 1, kF32, 1, 5, 1, 1000, 8});  // states in the workspace
  return cases;
}

}  // namespace

int main(int count, char** words) try {
  const std::string state = fwp_cuda_state();
  std::printf("CUDA back end: %s\n", state.c_str());
  if (state != "available" && state != "emulated") return 1;
  int run = 0, wrong = 0;
  for (const Case& c : every_case()) {
    const std::string name = ' ' + c.name() + ' ';
    bool asked = true;
    for (int i = 1; i < count; ++i) asked = asked && name.find(' ' + std::string(words[i]) + ' ') != std::string::npos;
    if (!asked) continue;
    const auto found = results(true, c), exact = results(false, c);
    double worst = 0;
    const char* of = "";
    for (size_t i = 0; i < found.size(); ++i) {
      const double error = relative_error(found[i].second, exact[i].second);
      if (error > worst || std::isnan(error)) worst = error, of = found[i].first;
      if (std::isnan(error)) break;
    }
    const bool good = worst <= c.type.tolerance;
    std::printf("%-5s %-40s %.1e %s\n", good ? "ok" : "WRONG", c.name().c_str(), worst, of);
    std::fflush(stdout);
    ++run;
    wrong += good ? 0 : 1;
  }
  std::printf("%d cases, %d wrong\n", run, wrong);
  end();
  return run == 0 || wrong != 0 ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
