#include "threads.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>

#include <csignal>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace fwp::cpu {
namespace {

constexpr int kMaxWorkers = 256;

// Lets another thread of the same core go first while this one spins.
void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A job's indices are given out from one counter, and so are its places, while it is open. It is closed when no index
// is left: a worker that has not been woken by then, since others need its core, is not waited for.
class Pool {
 public:
  // Serves one caller at a time.
  bool try_begin() { return !busy_.exchange(true, std::memory_order_acquire); }
  void end() { busy_.store(false, std::memory_order_release); }

  void run(int threads, int64_t count, const Loop& loop) {
    start_workers(threads - 1);
    const int wanted = std::min(threads - 1, workers_);
    const Job job{loop, count, wanted};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      entry_.store(static_cast<uint32_t>(wanted) * kPlace, std::memory_order_release);
      posted_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(job, 0);
    entry_.fetch_and(kPlace - 1, std::memory_order_acq_rel);
    wait(loop);
  }

 private:
  struct Job {
    Loop loop;
    int64_t count;
    int places;
  };

  void start_workers(int wanted) {
    while (workers_ < std::min(wanted, kMaxWorkers)) {
#if defined(__unix__) || defined(__APPLE__)
      sigset_t all, before;  // signals are the calling threads' business
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
      bool started = true;
      try {
        std::thread(&Pool::serve, this, posted_.load(std::memory_order_relaxed)).detach();
      } catch (...) {  // out of threads or memory: do with those there are
        started = false;
      }
#if defined(__unix__) || defined(__APPLE__)
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
      if (!started) return;
      ++workers_;
    }
  }

  void serve(uint64_t seen) {
    for (;;) {
      wait_for_job(seen);
      for (uint32_t entry = entry_.load(std::memory_order_acquire); entry >= kPlace;) {
        if (!entry_.compare_exchange_weak(entry, entry - kPlace + 1, std::memory_order_acq_rel)) continue;
        work(job_, job_.places + 1 - static_cast<int>(entry / kPlace));
        if (entry_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
          std::lock_guard<std::mutex> lock(mutex_);
          done_.notify_one();
        }
        break;
      }
    }
  }

  void work(const Job& job, int worker) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < job.count;)
      job.loop.body(job.loop.context, i, worker);
  }

  // Jobs often follow each other closely, as steps of decoding do, and to be woken takes as long as many of them: look
  // some tens of microseconds before going to sleep.
  void wait_for_job(uint64_t& seen) {
    for (int i = 0; i < kSpins && posted_.load(std::memory_order_acquire) == seen; ++i) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait(lock, [&] { return posted_.load(std::memory_order_relaxed) != seen; });
    seen = posted_.load(std::memory_order_relaxed);
  }

  void wait(const Loop& loop) {
    const auto finished = [&] { return entry_.load(std::memory_order_acquire) == 0; };
    for (int i = 0; i < kSpins; ++i) {
      if (finished()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!done_.wait_for(lock, std::chrono::milliseconds(5), finished)) {
      lock.unlock();
      loop.idle(loop.context);
      lock.lock();
    }
  }

  static constexpr int kSpins = 4000;
  static constexpr uint32_t kPlace = 1 << 16;

  std::atomic<bool> busy_{false};
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> posted_{0};  // jobs so far
  Job job_{};                        // changes only while no worker has a place
  std::atomic<int64_t> next_{0};
  std::atomic<uint32_t> entry_{0};  // how many workers have a place, and kPlace for each that is free
  int workers_ = 0;
};

// A forked child has none of its parent's workers and makes a pool of its own. Pools are never destroyed: workers may
// still sit in them when the process ends.
struct PoolOfProcess {
  long process;
  Pool pool;
};
std::atomic<PoolOfProcess*> current_pool{nullptr};

long process_id() {
#if defined(__unix__) || defined(__APPLE__)
  return static_cast<long>(getpid());
#else
  return 0;
#endif
}

Pool* pool() {
  PoolOfProcess* found = current_pool.load(std::memory_order_acquire);
  if (found && found->process == process_id()) return &found->pool;
  PoolOfProcess* made = new (std::nothrow) PoolOfProcess{process_id(), {}};
  if (!made) return nullptr;
  if (current_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return &made->pool;
  delete made;  // another thread was faster
  return &found->pool;
}

// 0: not set, or not a whole number above 0. OMP_NUM_THREADS may be a list, of which the first counts.
int threads_from(const char* variable) {
  const char* text = std::getenv(variable);
  if (!text) return 0;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (end == text || (*end != '\0' && *end != ',') || n <= 0) return 0;
  return static_cast<int>(std::min<long>(n, kMaxWorkers));
}

// CPUs that the cgroup's quota (version 2, then 1) amounts to; 0: no limit found.
int cgroup_cpus() {
  double quota = -1, period = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    if (std::fscanf(f, "%lf %lf", &quota, &period) != 2) quota = -1;
    std::fclose(f);
  } else {
    if (FILE* q = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
      if (std::fscanf(q, "%lf", &quota) != 1) quota = -1;
      std::fclose(q);
    }
    if (FILE* p = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (std::fscanf(p, "%lf", &period) != 1) period = 0;
      std::fclose(p);
    }
  }
  return quota > 0 && period > 0 ? std::max(1, static_cast<int>(quota / period)) : 0;
}

int affinity_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

}  // namespace

void parallel_for(int threads, int64_t count, const Loop& loop) {
  threads = static_cast<int>(std::min<int64_t>(threads, count));
  Pool* p = threads > 1 ? pool() : nullptr;
  if (p && p->try_begin()) {
    p->run(threads, count, loop);
    p->end();
    return;
  }
  for (int64_t i = 0; i < count; ++i) loop.body(loop.context, i, 0);
}

int default_num_threads() {
  if (const int n = threads_from("FWP_NUM_THREADS")) return n;
  if (const int n = threads_from("OMP_NUM_THREADS")) return n;
  const int quota = cgroup_cpus(), cpus = std::min(affinity_cpus(), kMaxWorkers);
  return quota ? std::min(quota, cpus) : cpus;
}

}  // namespace fwp::cpu
