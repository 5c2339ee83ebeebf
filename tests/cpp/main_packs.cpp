// Runs the doctest cases of test_packs.cpp and test_dtypes.cpp if this machine has their instruction set level.
// Compiled without the level's flags, so that it can say no.
#include <doctest/doctest.h>

#include <cstring>

namespace {

bool available(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "v3") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "v4") == 0) return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return isa != nullptr;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kSkipped = 77;
  return available(FWP_ISA) ? doctest::Context(argc, argv).run() : kSkipped;
}
