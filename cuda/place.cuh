// Where numbers lie that threads work on: shared memory, or the workspace where there are too many of them for that.
#pragma once

#include "primitives/primitives.cuh"

namespace fwp::cuda {

struct InShared {
  static constexpr bool shared = true;
  using Index = int;  // of channels
  template <class X>
  FWP_DEVICE static X load(const X* p) {
    return load_shared(p);
  }
  template <class X>
  FWP_DEVICE static void store(X* p, X x) {
    store_shared(p, x);
  }
};
struct InWorkspace {
  static constexpr bool shared = false;
  using Index = int64_t;
  template <class X>
  FWP_DEVICE static X load(const X* p) {
    return load_global(p);
  }
  template <class X>
  FWP_DEVICE static void store(X* p, X x) {
    store_global(p, x);
  }
};

}  // namespace fwp::cuda
