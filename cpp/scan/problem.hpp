// One validated call in plain numbers and pointers: what cpp/core hands to a back end.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../features/features.hpp"
#include "dtype.hpp"

namespace fwp {

enum class Rule : int { linear, delta };
enum class Decay : int { none, scalar, channel };

// A tensor [B,T,heads,n], last axis contiguous, or [B,T,heads] (n = 1). Strides count elements. Head h of the
// recurrence reads head h / group: grouped heads share a row. data == nullptr: absent.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t b = 0, t = 0, h = 0;
  int64_t group = 1;
};

// States [slots,H,K,V] in the accumulation type, last axis contiguous; sequence n has slot n, or the one that
// Problem::state_indices gives it. With attention_norm they are [slots,H,K,V+1], and z is the last column.
struct States {
  void* data = nullptr;
  int64_t n = 0, h = 0, k = 0;
};

// Asked for by the calling thread every few milliseconds; non-zero stops the call.
struct Interrupt {
  int (*poll)(void* data) = nullptr;
  void* data = nullptr;
};

// Integers in the memory of a device, where only kernels can check them; data == nullptr: absent.
struct DeviceIntegers {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;  // int64, else int32
};

inline constexpr int kHost = -1;  // Problem::device of arrays in the memory of the CPU
inline constexpr int64_t kNoSlot = -1;
inline constexpr int kProbes = 13;  // numbers per token and head of a diagnosis, fwp.h

struct Problem {
  Rule rule = Rule::linear;
  Decay decay = Decay::none;
  DType dtype = DType::f32;  // of q, k, v, o; accumulation and states are in accumulation(dtype)
  bool step = false;         // decoding: hT is h0, updated in place
  int64_t N = 0, T = 0, H = 0, K = 0, V = 0;
  const int64_t* cu_seqlens = nullptr;  // N+1 offsets into the T axis of batch 0; nullptr: sequence n is batch n
  // In kernels, where a back end lays the rows of all batches one after the other: the tokens of a batch; cu_seqlens
  // count those of all, and after them come the batches [N]. 0: not so.
  int64_t batch_tokens = 0;
  const int64_t* state_indices = nullptr;  // [N], in a step: slots in the states; kNoSlot: leave the sequence out
  Features features;                       // what makes keys and queries of size K from the rows of q and k
  bool attention_norm = false;
  double eps = 0;  // of attention_norm
  double scale = 1;
  int level = 0;  // of the CPU: instruction set level and threads, fixed when the call is validated
  int threads = 1;
  int device = kHost;      // number of the CUDA device whose memory every array is in, and
  void* stream = nullptr;  // the stream that the work is put on
  DeviceIntegers device_cu_seqlens, device_state_indices;  // in place of the host's
  int64_t slots = 0;                                       // of the states of a step
  Interrupt interrupt;

  Rows q, k, v, beta, g;
  States h0;

  Rows o;  // forward
  States hT;
  void* checkpoints = nullptr;  // written by forward, read by backward; nullptr: backward makes its own

  Rows d_o;  // backward
  States d_hT;
  Rows dq, dk, dv, dbeta, dg;
  States dh0;

  int64_t key_size() const { return features.active() ? features.inputs : K; }  // of a row of q or k
};

}  // namespace fwp
