// Reading one DLTensor: device, dtype, shape and memory are checked here, by themselves.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../scan/problem.hpp"
#include "fwp/fwp.h"
#include "overlap.hpp"

namespace fwp::core {

// Far above any memory, and low enough that sums and products of a few sizes stay within 64 bits.
constexpr int64_t kMaxElements = int64_t{1} << 55;

// One axis as error messages print it: "T=16", or "Hk" where any size will do.
struct Axis {
  const char* name;
  int64_t size = -1;
};

struct Axes {
  int rank = 0;
  Axis axis[kMaxRank] = {};
  Axes(std::initializer_list<Axis> list) {
    for (const Axis& a : list) axis[rank++] = a;
  }
};

struct Tensor {
  const char* name = "";
  char* data = nullptr;  // never null, also when empty
  DType dtype = DType::f32;
  int device = kHost;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements; 0 on axes of size 1, and on all axes of an empty tensor
  Region region;
  bool last_axis_contiguous() const { return region.item == 0 || shape[rank - 1] <= 1 || stride[rank - 1] == 1; }
};

// A tensor of one of the given dtypes and of one of the given shapes.
Tensor read_tensor(const char* name, const DLTensor* tensor, std::initializer_list<DType> dtypes,
                   std::initializer_list<Axes> shapes);
// An int32 or int64 tensor of one axis.
struct Integers {
  Tensor tensor;
  bool wide = false;  // int64
  int64_t count() const { return tensor.shape[0]; }
  int64_t at(int64_t i) const;  // of the host's memory
};
Integers read_integers(const char* name, const DLTensor* tensor, Axis axis);

// Fails unless the product of the sizes, zeros counted as one, is at most kMaxElements.
void check_count(const char* name, const int64_t* sizes, int rank);

}  // namespace fwp::core
