// The thread pool: every index once, from any number of callers, with any sequence of thread counts, and after fork.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cpu/threads.hpp"

namespace {

// Counts how often each index was visited, and by which workers.
struct Visits {
  explicit Visits(int64_t count) : counts(static_cast<size_t>(count)) {}

  std::vector<std::atomic<int>> counts;
  std::atomic<int> highest_worker{0};
  std::chrono::microseconds work{0};

  void run(int threads) {
    const auto body = [](void* context, int64_t index, int worker) {
      auto* self = static_cast<Visits*>(context);
      self->counts[static_cast<size_t>(index)].fetch_add(1);
      int highest = self->highest_worker.load();
      while (worker > highest && !self->highest_worker.compare_exchange_weak(highest, worker)) {
      }
      if (self->work.count() > 0) std::this_thread::sleep_for(self->work);
    };
    fwp::cpu::parallel_for(threads, static_cast<int64_t>(counts.size()), {body, [](void*) {}, this});
  }

  bool each_visited(int times) const {
    for (const auto& count : counts)
      if (count.load() != times) return false;
    return true;
  }
};

class Environment {
 public:
  Environment(const char* name, const char* value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    setenv(name, value, 1);
  }
  ~Environment() { before_.empty() ? unsetenv(name_) : setenv(name_, before_.c_str(), 1); }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::string before_;
};

TEST_CASE("every index is visited once by a worker in range") {
  for (int threads : {1, 2, 3, 8}) {
    for (int64_t count : {0, 1, 2, 7, 1000}) {
      Visits visits(count);
      visits.run(threads);
      CHECK(visits.each_visited(1));
      CHECK(visits.highest_worker < threads);
    }
  }
}

TEST_CASE("several workers share long work") {
  Visits visits(64);
  visits.work = std::chrono::milliseconds(1);
  visits.run(4);
  CHECK(visits.each_visited(1));
  CHECK(visits.highest_worker > 0);
}

// A worker that was not wanted in one job must not count itself in twice for the next one.
TEST_CASE("changing thread counts lose and repeat nothing") {
  for (int round = 0; round < 20000; ++round) {
    Visits visits(round % 5 + 2);
    visits.run(round % 4 + 1);
    REQUIRE(visits.each_visited(1));
  }
}

TEST_CASE("callers on several threads do not disturb each other") {
  std::vector<std::thread> callers;
  std::atomic<int> faults{0};
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&faults] {
      for (int round = 0; round < 500; ++round) {
        Visits visits(37);
        visits.run(3);
        faults += !visits.each_visited(1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(faults == 0);
}

TEST_CASE("a nested loop runs, on fewer workers") {
  Visits inner[3] = {Visits(10), Visits(10), Visits(10)};
  const auto body = [](void* context, int64_t index, int) { static_cast<Visits*>(context)[index].run(3); };
  fwp::cpu::parallel_for(3, 3, {body, [](void*) {}, inner});
  for (const Visits& each : inner) CHECK(each.each_visited(1));
}

TEST_CASE("idle is called while others work") {
  std::atomic<int> idle_calls{0};
  const auto body = [](void*, int64_t, int worker) {
    std::this_thread::sleep_for(std::chrono::milliseconds(worker == 0 ? 2 : 60));
  };
  const auto idle = [](void* context) { ++*static_cast<std::atomic<int>*>(context); };
  // The caller may take every index itself, hence several tries.
  for (int attempt = 0; attempt < 50 && idle_calls == 0; ++attempt)
    fwp::cpu::parallel_for(2, 2, {body, idle, &idle_calls});
  CHECK(idle_calls > 0);
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow threads across a fork
TEST_CASE("a forked child computes") {
  Visits before(100);
  before.run(3);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);  // a hanging child is a failed child
    Visits visits(100);
    visits.run(3);
    _exit(visits.each_visited(1) ? 0 : 1);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  Visits after(100);
  after.run(3);
  CHECK(after.each_visited(1));
}
#endif

TEST_CASE("the default number of threads comes from the environment first") {
  {
    Environment omp("OMP_NUM_THREADS", "5");
    CHECK(fwp::cpu::default_num_threads() == 5);
    Environment own("FWP_NUM_THREADS", "3");
    CHECK(fwp::cpu::default_num_threads() == 3);
  }
  Environment own("FWP_NUM_THREADS", "nonsense");
  CHECK(fwp::cpu::default_num_threads() >= 1);
}

}  // namespace
