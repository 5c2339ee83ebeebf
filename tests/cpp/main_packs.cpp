// Runs the doctest cases of test_packs.cpp and test_dtypes.cpp if this machine has their instruction set level.
// Compiled without the level's flags, so that it can say no.
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstring>

namespace {

bool available(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(isa, "v3") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "v4") == 0) return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa != nullptr;
}

// Before the cases register themselves, by code that has the level's instructions.
[[gnu::constructor(101)]] void skip_if_absent() {
  constexpr int kSkipped = 77;
  if (!available(FWP_ISA)) _exit(kSkipped);
}

}  // namespace

int main(int argc, char** argv) { return doctest::Context(argc, argv).run(); }
