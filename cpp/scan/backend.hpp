// What cpp/core sees of a back end: functions that run problems that have been validated.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.hpp"

namespace fwp {

enum class Outcome { done, interrupted, failed };

// Nothing here throws. Workspaces are aligned to 64 bytes, in the memory that the arrays are in.
struct Backend {
  // Guards against a plugin of another build: FWP_LAYOUT, the build's digest of this header and of what it includes,
  // and what another compiler would change.
  uint64_t layout;
  size_t backend_bytes, problem_bytes;
  // "available", "emulated" (device memory is the host's), or why it cannot be used, in words.
  const char* (*state)();

  // Bytes of workspace that the call takes for this problem.
  size_t (*forward_workspace)(const Problem&);  // of steps, too
  size_t (*backward_workspace)(const Problem&);
  size_t (*diagnose_workspace)(const Problem&);
  size_t (*map_workspace)(const Problem&);
  // Elements, in the accumulation type, of Problem::checkpoints.
  int64_t (*checkpoint_elements)(const Problem&);

  Outcome (*forward)(const Problem&, void* workspace);
  Outcome (*backward)(const Problem&, void* workspace);
  // The probes of every token and head, in problem.o [B,T,H,kProbes].
  Outcome (*diagnose)(const Problem&, void* workspace);
  // A feature map by itself: rows problem.q [T][features.inputs] into problem.o [T][K], or, where problem.d_o is given,
  // that into problem.dq.
  Outcome (*map_rows)(const Problem&, void* workspace);
  // Fails where kernels of earlier calls have found something wrong that no call has failed for yet. Waits for nothing.
  Outcome (*check)(int device);
  // What went wrong in this thread's last call that failed.
  const char* (*error)();

  // Memory for work on this stream of this device; done without any: there is none.
  Outcome (*allocate)(int device, size_t bytes, void* stream, void** memory);
  void (*deallocate)(int device, void* memory, void* stream);
  // In the order of this stream: bytes from memory of the device or the host to memory of either.
  Outcome (*copy)(int device, void* to, const void* from, size_t bytes, void* stream);
  // What is put on the stream `to` from now on waits for what is on `from`.
  Outcome (*wait)(int device, void* from, void* to);
  void (*empty_cache)();  // hands idle memory back to the system
};
}  // namespace fwp
