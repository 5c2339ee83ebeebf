// From the structs of the C ABI to a fwp::Problem. Everything is checked here, before anything is computed.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "../scan/problem.hpp"
#include "fwp/fwp.h"
#include "tensor.hpp"

namespace fwp::core {

constexpr size_t kWorkspaceAlignment = 64;

// The memory of a call's tensors.
class CallMemory {
 public:
  enum class Access { read, write };

  void add(const Region& region, Access access);
  void need_contiguous_last_axis(const Tensor& x);

  // No output overlaps anything; then, last of all, every last axis is contiguous. A caller that can copy may thus
  // take FWP_UNSUPPORTED_ERROR to mean that copies with a contiguous last axis would be accepted.
  void check() const;

 private:
  static constexpr size_t kMaxRegions = 20;

  std::array<Region, kMaxRegions> regions_;
  std::array<Access, kMaxRegions> access_;
  size_t region_count_ = 0;
  const char* strided_ = nullptr;  // first argument whose last axis is not contiguous
};

// The problem of one C call, filled in steps: the constructor takes the inputs, then come the tensors of the direction
// called, then check_memory. A shape, dtype or value that is wrong throws Error where it is met.
class Call {
 public:
  Call(Rule rule, bool step, const fwp_options* options, const fwp_inputs* inputs);
  Call(const Call&) = delete;  // problem points into offsets_ and the memory of read_slots
  Call& operator=(const Call&) = delete;

  void add_outputs(const fwp_outputs* outputs);
  void add_step_outputs(const DLTensor* state, const DLTensor* o);
  void add_probes(const DLTensor* probes);
  void add_cotangents(const fwp_cotangents* cotangents);
  void add_gradients(const fwp_gradients* gradients);
  void add_workspace(void* workspace, size_t bytes, size_t needed);

  bool check_only() const { return check_only_; }
  void check_memory() const { memory_.check(); }

  // The slots of a step's sequences are copied and checked then, so that nobody can change one between check and use:
  // into memory of the caller on the CPU, where steps allocate nothing. To be called after check_memory; a wrong value
  // throws Error. Slots in the memory of a device are left to its kernels.
  size_t slot_bytes() const;
  void read_slots(void* memory);

  Problem problem;

 private:
  using Access = CallMemory::Access;

  void read_options(const fwp_options& settings);
  void read_heads(const fwp_inputs& in, const fwp_options& settings);
  void read_gates(const fwp_inputs& in);
  Tensor read(const char* name, const DLTensor* tensor, std::initializer_list<DType> dtypes,
              std::initializer_list<Axes> shapes, Access access);
  Tensor read(const char* name, const DLTensor* tensor, DType dtype, const Axes& axes, Access access);
  States read_states(const char* name, const DLTensor* tensor, Access access);
  void* read_checkpoints(const DLTensor* tensor, Access access);
  void read_sequences(const DLTensor* cu_seqlens);
  bool has_slots() const { return slots_.tensor.data != nullptr; }
  Integers read_integers(const char* name, const DLTensor* tensor, Axis axis);
  void check_sizes() const;
  void check_device(const Tensor& x) const;

  Axis key_axis() const;                   // of q and k
  Axes axes(Axis heads) const;             // [B,T,heads], or [B,heads] in a step of a single token
  Axes axes(Axis heads, Axis size) const;  // [B,T,heads,size]
  Rows rows(const Tensor& x);

  bool check_only_ = false;
  bool has_time_ = true;
  int64_t batch_ = -1;
  int64_t q_heads_ = 0, k_heads_ = 0, v_heads_ = 0;
  std::vector<int64_t> offsets_;
  Integers slots_;
  int64_t slot_count_ = 0;  // of the states
  CallMemory memory_;
};

// One feature map applied to rows by itself: x [M,n] to y [M,K], and back. problem.q is x and problem.o y, or
// problem.d_o d_y and problem.dq d_x.
class MapCall {
 public:
  MapCall(const fwp_feature_map* map, const DLTensor* x);

  void add_output(const DLTensor* y);
  void add_gradients(const DLTensor* d_y, const DLTensor* d_x);
  void check_memory() const { memory_.check(); }

  Problem problem;

 private:
  Rows rows(const char* name, const DLTensor* tensor, Axis size, CallMemory::Access access);

  CallMemory memory_;
};

// K of a map for rows of size n.
int64_t feature_size(const fwp_feature_map* map, int64_t n);

// Fails if FWP_ISA names no level that this machine has.
void check_isa();
std::string known_isas();

}  // namespace fwp::core
