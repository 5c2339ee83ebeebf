// Detects and chooses the instruction set level.
#include "isa.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "../scan/geometry.hpp"
#include "dispatch.hpp"

namespace fwp {

#if defined(FWP_HAS_base)
extern const Kernels kernels_base;
#endif
#if defined(FWP_HAS_v3)
extern const Kernels kernels_v3;
#endif
#if defined(FWP_HAS_v4)
extern const Kernels kernels_v4;
#endif
#if defined(FWP_HAS_neon)
extern const Kernels kernels_neon;
#endif

namespace cpu {
namespace {

struct Level {
  const Kernels* kernels;
  std::atomic<uint64_t> calls;
};

#if defined(FWP_HAS_v3) || defined(FWP_HAS_v4)
// By features: not every compiler knows the names of the x86-64 levels.
bool has_v3() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if defined(FWP_HAS_v4)
bool has_v4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Every level that is built and that this machine has, best last.
struct Levels {
  static constexpr int kMost = 4;
  Level level[kMost] = {};
  const char* names[kMost + 1] = {};
  int count = 0;
  std::atomic<int> current{-1};  // -1: FWP_ISA names no level of this list

  Levels() {
#if defined(FWP_HAS_base)
    add(kernels_base);
#endif
#if defined(FWP_HAS_v3)
    if (has_v3()) add(kernels_v3);
#endif
#if defined(FWP_HAS_v4)
    if (has_v3() && has_v4()) add(kernels_v4);
#endif
#if defined(FWP_HAS_neon)
    add(kernels_neon);
#endif
    const char* wanted = std::getenv("FWP_ISA");
    current = wanted && *wanted ? find(wanted) : count - 1;
  }

  void add(const Kernels& kernels) {
    level[count].kernels = &kernels;
    names[count++] = kernels.name;
  }

  int find(const char* name) const {
    for (int i = 0; i < count; ++i)
      if (std::strcmp(names[i], name) == 0) return i;
    return -1;
  }
};

Levels& levels() {
  static Levels all;
  return all;
}

}  // namespace

const Kernels& kernels(int level) { return *levels().level[level].kernels; }

const Kernels& count_call(int level) {
  levels().level[level].calls.fetch_add(1, std::memory_order_relaxed);
  return kernels(level);
}

double fma_peak(DType dtype, double seconds) {
  using Clock = std::chrono::steady_clock;
  const Kernels& k = kernels(level());
  double best = 0;
  const auto begin = Clock::now();
  for (double elapsed = 0; elapsed < seconds;) {
    const auto start = Clock::now();
    const double flops = k.fma(dtype == DType::f64, 20000);
    const auto now = Clock::now();
    best = std::max(best, flops / std::chrono::duration<double>(now - start).count());
    elapsed = std::chrono::duration<double>(now - begin).count();
  }
  return best;
}

const char* const* available_isas() { return levels().names; }

const char* isa() {
  const int i = levels().current;
  return i < 0 ? nullptr : levels().names[i];
}

int level() { return std::max(0, levels().current.load()); }

bool use_isa(const char* name) {
  const int i = levels().find(name);
  if (i >= 0) levels().current = i;
  return i >= 0;
}

uint64_t isa_calls(const char* name) {
  const int i = levels().find(name);
  return i < 0 ? 0 : levels().level[i].calls.load();
}

int block_size() {
  Problem p;
  return static_cast<int>(kernels(level()).geometry(p).block);
}

}  // namespace cpu
}  // namespace fwp
