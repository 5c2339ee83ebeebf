// Runs the doctest cases at the level that FWP_ISA names, and fails if no call ran there.
#include <doctest/doctest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fwp/fwp.h"

namespace {

constexpr int kSkipped = 77;

bool available(const char* isa) {
  for (const char* const* name = fwp_available_isas(); *name; ++name)
    if (std::strcmp(*name, isa) == 0) return true;
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = std::getenv("FWP_ISA");
  if (isa && !available(isa)) return kSkipped;
  const int status = doctest::Context(argc, argv).run();
  if (status == 0 && isa && fwp_isa_calls(isa) == 0) {
    std::fprintf(stderr, "FWP_ISA=%s was asked for, but no call ran there\n", isa);
    return 1;
  }
  return status;
}
