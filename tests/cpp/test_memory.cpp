// Memory of the library: small blocks, large ones that stay warm, growth, failure, and many threads at once.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "fwp/fwp.h"

namespace {

constexpr size_t kMegabyte = size_t{1} << 20;

bool holds(const void* memory, size_t bytes, unsigned char value) {
  const auto* p = static_cast<const unsigned char*>(memory);
  return bytes == 0 || (p[0] == value && std::memcmp(p, p + 1, bytes - 1) == 0);
}

}  // namespace

TEST_CASE("memory is aligned and can be written to its end") {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{63}, size_t{4096}, kMegabyte - 64, kMegabyte - 63, kMegabyte,
                             2 * kMegabyte - 64, 3 * kMegabyte + 5}) {
    CAPTURE(bytes);
    void* const memory = fwp_allocate(bytes);
    REQUIRE(memory != nullptr);
    CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0);
    std::memset(memory, 1, bytes);
    fwp_free(memory);
  }
  fwp_free(nullptr);
  fwp_empty_cache();
}

TEST_CASE("only large blocks stay, until the cache is emptied") {
  fwp_empty_cache();
  fwp_free(fwp_allocate(kMegabyte / 2));
  CHECK(fwp_cache_idle() == 0);
  void* const memory = fwp_allocate(4 * kMegabyte);
  CHECK(fwp_cache_idle() == 0);
  fwp_free(memory);
  CHECK(fwp_cache_idle() >= 4 * kMegabyte);
  CHECK(fwp_allocate(7 * kMegabyte / 2) == memory);
  CHECK(fwp_cache_idle() == 0);
  fwp_free(memory);
  fwp_empty_cache();
  CHECK(fwp_cache_idle() == 0);
}

TEST_CASE("growing and shrinking keep the contents") {
  size_t held = 0;
  void* memory = nullptr;
  for (const size_t bytes : {size_t{100}, size_t{5000}, 2 * kMegabyte, 9 * kMegabyte, 3 * kMegabyte, size_t{7}}) {
    CAPTURE(bytes);
    memory = fwp_reallocate(memory, bytes);
    REQUIRE(memory != nullptr);
    CHECK(holds(memory, bytes < held ? bytes : held, 3));
    std::memset(memory, 3, bytes);
    held = bytes;
  }
  fwp_free(memory);
}

TEST_CASE("too much is refused, and what there is stays") {
  fwp_free(fwp_allocate(2 * kMegabyte));
  char small[] = "unchanged";
  void* const memory = fwp_allocate(sizeof small);
  std::memcpy(memory, small, sizeof small);
  for (const size_t bytes : {SIZE_MAX, SIZE_MAX - 100, SIZE_MAX / 2, SIZE_MAX / 4}) {
    CHECK(fwp_allocate(bytes) == nullptr);
    CHECK(fwp_last_status() == FWP_OUT_OF_MEMORY);
    CHECK(std::string(fwp_last_error()).find("memory") != std::string::npos);
    CHECK(fwp_reallocate(memory, bytes) == nullptr);
  }
  CHECK(std::memcmp(memory, small, sizeof small) == 0);
  fwp_free(memory);
}

TEST_CASE("memory of a device that is not there is no lack of memory") {
  CHECK(fwp_device_allocate(1 << 20, 64, nullptr) == nullptr);
  const std::string state = fwp_cuda_state();
  CHECK(fwp_last_status() == (state == "available" || state == "emulated" ? FWP_CUDA_ERROR : FWP_DEVICE_ERROR));
}

TEST_CASE("the limit is known, its place is required") {
  size_t limit = 0;
  CHECK(fwp_cache_limit(&limit) == FWP_OK);
  CHECK(limit > 0);
  CHECK(fwp_cache_limit(nullptr) == FWP_ARGUMENT_ERROR);
}

TEST_CASE("threads do not get each other's blocks") {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (size_t i = 0; i < wrong.size(); ++i)
    threads.emplace_back([i, &wrong] {
      const auto value = static_cast<unsigned char>(i + 1);
      for (size_t round = 0; round < 30; ++round) {
        const size_t bytes = kMegabyte + (round % 3) * kMegabyte / 2;
        void* const memory = fwp_allocate(bytes);
        std::memset(memory, value, bytes);
        if (round % 8 == 7) fwp_empty_cache();
        wrong[i] += !holds(memory, bytes, value);
        fwp_free(memory);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
  size_t limit = 0;
  fwp_cache_limit(&limit);
  CHECK(fwp_cache_idle() <= limit);
}

TEST_CASE("forked children allocate, whatever other threads were doing") {
  std::atomic<bool> stop{false};
  std::thread other([&stop] {
    while (!stop) fwp_free(fwp_allocate(2 * kMegabyte));
  });
  int failed = 0;
  for (int i = 0; i < 30; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // ends a child that waits for a lock
      fwp_free(fwp_allocate(2 * kMegabyte));
      fwp_empty_cache();
      _exit(fwp_cache_idle() == 0 ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    failed += status != 0;
  }
  stop = true;
  other.join();
  CHECK(failed == 0);
}
