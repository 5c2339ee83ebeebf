// The linear (additive, Hebbian) rule: write the value as it is.  Schlag, Irie, Schmidhuber 2021, eqs. 10 and 17.
//
//   e = v                        nothing is predicted
//   u = beta e                   what is written (beta = 1 unless given)
//
// write and read, shared by all rules, are in block.hpp. Gradient: the adjoint of e is the adjoint of v.
#pragma once

struct Linear {
  static constexpr bool predicts = false;

  template <int C, class P, class Square>
  FWP_HD static P error(int /*t*/, P v, P /*r*/, const Square& /*MP*/, const P* /*u*/) {
    return v;
  }

  template <int C, class P, class Square>
  FWP_HD static P written_adjoint(int /*t*/, P p, const Square& /*MP*/, const P* /*de*/) {
    return p;
  }
};
