// The chunk form backward under the emulator, against the recurrence in double.
#include <doctest/doctest.h>

#include <cstdlib>
#include <string>

#include "chunk/chunk.hpp"
#include "problems.hpp"

using namespace problems;

namespace {

// Runs the backward of a case; returns which heads it has left.
std::vector<int32_t> run(Case& x) {
  const Problem p = x.problem();
  const size_t bytes = fwp::cuda::chunk::backward_workspace(p);
  Array workspace(DType::f32, static_cast<int64_t>(bytes / 4));
  std::vector<int32_t> left(static_cast<size_t>(x.N * x.H), -1);
  fwp::cuda::Queue queue =
      x.queue({{workspace.data(), bytes, true}, {left.data(), left.size() * sizeof(int32_t), true}});
  fwp::cuda::chunk::backward(p, workspace.data(), left.data(), queue);
  return left;
}

struct Errors {
  double dq, dk, dv, dbeta, dg, dh0;
};
Errors errors(const Case& x) {
  const Expected y = expected(x, true);
  return {error(x.dq, y.dq),       error(x.dk, y.dk), error(x.dv, y.dv),
          error(x.dbeta, y.dbeta), error(x.dg, y.dg), error(x.dh0, y.dh0)};
}

}  // namespace

TEST_CASE("first") {
  Options options;
  options.N = 1;
  options.H = 1;
  options.dtype = DType::bf16;
  options.wide_gates = true;
  if (const char* t = std::getenv("T")) options.T = std::atoi(t);
  if (const char* t = std::getenv("KK")) options.K = std::atoi(t);
  if (const char* t = std::getenv("VV")) options.V = std::atoi(t);
  for (const Rule rule : {Rule::linear, Rule::delta})
    for (const Decay decay : {Decay::none, Decay::scalar}) {
      options.rule = rule;
      options.decay = decay;
      Case x(options);
      const auto left = run(x);
      for (int32_t l : left) CHECK(l == 0);
      const Errors e = errors(x);
      MESSAGE(int(rule), int(decay), " dq ", e.dq, " dk ", e.dk, " dv ", e.dv, " dbeta ", e.dbeta, " dg ", e.dg, " dh0 ", e.dh0);
    }
}
