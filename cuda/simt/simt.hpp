// CUDA kernels on the host, to find out where there is no GPU whether they are right: each thread of a block is a
// fiber, and what threads do to each other goes through the functions below, which watch. Kernels do not see them: they
// call cuda/primitives, which is these functions here and PTX on a device.
//
// What is found, as a Fault that names threads and source lines: races on shared and on global memory; a barrier or a
// warp's collective that some threads never reach, or reach at different lines; memory touched outside what the launch
// was given, or not aligned to its size; asynchronous copies used before their wait, or never waited for. Shared memory
// starts as NaN. What is counted, line by line: how many bank conflicts, and how much more of global memory is moved
// than used.
//
// What is not found: effects of weak memory order, timing, occupancy, what a compiler does. Memory is sequentially
// consistent here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace fwp::simt {

constexpr int kWarp = 32;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// A call of a primitive in a kernel.
struct Site {
  const char* name;
  const char* file;
  int line;
};

// Which of the threads that can go on does so, at every switch. Results must not depend on it. Asynchronous copies are
// done as late as possible, at once, or at either time.
enum class Order { forward, reverse, random };

struct Range {
  const void* begin;
  size_t bytes;
  bool writable;
};

struct Options {
  Order order = Order::forward;
  unsigned seed = 1;
  bool check = true;          // races, bounds and traffic; without it several times faster
  std::vector<Range> global;  // what global memory a kernel may touch
};

// Requests of warps at one line. Shared memory serves a request in at least `ideal` passes, global memory in at least
// `ideal` sectors of 32 bytes; `actual` is what the addresses need.
struct Traffic {
  uint64_t requests = 0, ideal = 0, actual = 0;
};

// FWP_SIMT_CHECK=0 checks nothing; FWP_SIMT_ORDER=forward, reverse or random.
Options options_from_environment();

struct Report {
  uint64_t switches = 0, barriers = 0;
  std::map<std::string, uint64_t> collectives;    // by name: "mma_f16", "shuffle", ...
  std::map<std::string, Traffic> shared, global;  // by "file:line"
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Runs kernel() as every thread of every block, block after block. Throws Fault at the first thing that is wrong.
Report launch(Dim3 grid, unsigned threads, size_t shared_bytes, const Options& options,
              const std::function<void()>& kernel);

// The rest is for cuda/primitives, inside a kernel.

unsigned thread_index();
unsigned block_threads();
Dim3 block_index();
Dim3 grid_size();
void* shared_memory();

void sync_block(const Site& site);
void sync_warp(const Site& site);

// All threads of the warp meet; the last one calls run(arguments of the lanes in order).
void meet(const Site& site, void* arguments, void (*run)(void* const* lanes));
// raise: a write of what every other writer writes, which nothing need order.
enum class Access { read, write, raise };
void touch_shared(const void* p, size_t bytes, Access access, const Site& site);
void touch_global(const void* p, size_t bytes, Access access, const Site& site);

// cp.async: copies `bytes` to shared memory, the first `valid` of them from global memory, zeros after them.
void copy_async(void* to, const void* from, size_t bytes, size_t valid, const Site& site);
void commit_copies();
void wait_copies(int groups_left);

}  // namespace fwp::simt
