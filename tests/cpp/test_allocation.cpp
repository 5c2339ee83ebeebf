// A step takes no memory: this program counts what the library asks for.
#include <doctest/doctest.h>

#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "fwp/fwp.hpp"

namespace {

thread_local int taken = 0;

void* take(std::size_t bytes) {
  ++taken;
  return std::malloc(bytes);
}

}  // namespace

// In place of those of the C and C++ libraries, for the shared library too.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  void* memory = nullptr;
  ++taken;
  return posix_memalign(&memory, alignment, bytes) == 0 ? memory : nullptr;
}
void* operator new(std::size_t bytes) {
  if (void* memory = take(bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

// Arrays of any contents for steps of T tokens (0: without a T axis) of B sequences, with a pool of states.
struct Steps {
  int64_t B = 3, H = 2, K = 70, V = 100;
  int64_t T;
  std::vector<float> numbers = std::vector<float>(1 << 16, 0.25f), state = numbers, o = numbers;
  std::vector<int64_t> slots{2, -1, 0};
  fwp::inputs in;
  fwp::view states, output;

  explicit Steps(int64_t tokens, bool pool) : T(tokens) {
    const auto view = [&](const float* data, int64_t n) {
      return T == 0 ? fwp::view(data, {B, H, n}) : fwp::view(data, {B, T, H, n});
    };
    in.q = in.k = in.g = view(numbers.data(), K);
    in.v = view(numbers.data(), V);
    in.beta = T == 0 ? fwp::view(numbers.data(), {B, H}) : fwp::view(numbers.data(), {B, T, H});
    if (pool) in.state_indices = {slots.data(), {B}};
    states = {state.data(), {B, H, K, V}};
    output = T == 0 ? fwp::view(o.data(), {B, H, V}) : fwp::view(o.data(), {B, T, H, V});
  }

  int run() const {
    const int before = taken;
    fwp::delta_step(in, states, output);
    return taken - before;
  }
};

TEST_CASE("steps take no memory, but for the first of a thread") {
  // Every thread starts without memory, so its first call must be seen to take some.
  for (bool pool : {false, true}) {
    std::vector<Steps> all;
    all.reserve(5);
    for (int64_t T : {30, 8, 3, 1, 0}) all.emplace_back(T, pool);
    std::vector<int> counts;
    std::thread([&] {
      for (int round = 0; round < 3; ++round)
        for (const Steps& steps : all) counts.push_back(steps.run());
    }).join();
    CHECK(counts.front() > 0);
    for (size_t i = 1; i < counts.size(); ++i) CHECK(counts[i] == 0);
  }
}

TEST_CASE("a call from within a call has memory of its own") {
  // The interrupt callback of a long scan takes steps on the same thread.
  struct Inside {
    Steps steps{8, true};
    int calls = 0;
  } inside;
  const int64_t H = 1, K = 256;
  for (int64_t T = 100; inside.calls == 0; T *= 2) {  // as long as it takes until the callback comes
    REQUIRE(T < 100000);
    const std::vector<float> x(static_cast<size_t>(T * H * K), 0.25f);
    std::vector<float> o(x.size()), alone(x.size());
    fwp::inputs in;
    in.q = in.k = in.v = {x.data(), {1, T, H, K}};
    fwp::options options;
    fwp::linear_fwd(in, {{alone.data(), {1, T, H, K}}}, options);
    options.interrupt = [](void* data) {
      auto& self = *static_cast<Inside*>(data);
      self.steps.run();
      return ++self.calls, 0;
    };
    options.interrupt_data = &inside;
    fwp::linear_fwd(in, {{o.data(), {1, T, H, K}}}, options);
    CHECK(o == alone);
  }
}

}  // namespace
