// The chunk form, forward, under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <string>

#include "chunk/chunk.hpp"
#include "problems.hpp"

using namespace problems;
namespace cuda = fwp::cuda;
namespace chunk = fwp::cuda::chunk;

namespace {

// What came of a case: outputs in its tensors, and heads that were given up.
std::vector<int32_t> run(Case& x) {
  const Problem p = x.problem();
  REQUIRE(chunk::serves(p));
  std::vector<unsigned char> memory(chunk::forward_workspace(p) + 64, 0xff);
  unsigned char* const workspace = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  std::vector<int32_t> left(static_cast<size_t>(x.N * x.H), 7);
  cuda::Queue queue = x.queue({{memory.data(), memory.size(), true}, {left.data(), left.size() * 4, true}});
  chunk::forward(p, workspace, left.data(), queue);
  return left;
}

int64_t given_up(const std::vector<int32_t>& left) {
  int64_t sum = 0;
  for (const int32_t flag : left) sum += flag;
  return sum;
}

Options base() {
  Options is;
  is.dtype = DType::bf16;
  is.T = 100;
  is.K = is.V = 64;
  is.N = is.H = 1;
  return is;
}

}  // namespace

TEST_CASE("first") {
  Options is = base();
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const Decay decay : {Decay::none, Decay::scalar}) {
      is.rule = rule;
      is.decay = decay;
      Case x(is);
      const auto left = run(x);
      const Expected y = expected(x, false);
      MESSAGE(int(rule), int(decay), " left ", given_up(left), " o ", error(x.o, y.o), " hT ", error(x.hT, y.hT));
    }
}
