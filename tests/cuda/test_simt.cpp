// The emulator: it finds each kind of fault, says where, and finds none where there is none.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "primitives/primitives.cuh"

using namespace fwp::cuda;
namespace simt = fwp::simt;

namespace {

constexpr simt::Order kOrders[] = {simt::Order::forward, simt::Order::reverse, simt::Order::random};

template <class Kernel>
simt::Report run(const Kernel& kernel, simt::Options options = {}, unsigned threads = 64, unsigned blocks = 2,
                 size_t shared_bytes = 1024) {
  return simt::launch({blocks, 1, 1}, threads, shared_bytes, options, kernel);
}

// What is wrong with a kernel, in any order of its threads; "" for nothing.
template <class Kernel>
std::string fault(const Kernel& kernel, simt::Options options = {}, unsigned threads = 64, unsigned blocks = 2) {
  std::string found;
  for (const simt::Order order : kOrders) {
    options.order = order;
    std::string what;
    try {
      run(kernel, options, threads, blocks);
    } catch (const simt::Fault& caught) {
      what = caught.what();
    }
    INFO("order ", static_cast<int>(order), ": ", what);
    if (order != simt::Order::forward) CHECK(what.empty() == found.empty());
    found = what;
  }
  return found;
}

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

float* shared_floats() { return static_cast<float*>(shared_memory()); }

template <class T>
simt::Range range(std::vector<T>& of, bool writable) {
  return {of.data(), of.size() * sizeof(T), writable};
}

}  // namespace

TEST_CASE("every thread of every block runs once") {
  for (const simt::Order order : kOrders) {
    std::vector<int> count(6 * 96);
    simt::Options options;
    options.order = order;
    simt::launch({3, 2, 1}, 96, 0, options, [&] {
      ++count[(block_index_y() * 3 + block_index_x()) * 96 + static_cast<unsigned>(thread_index())];
      CHECK(block_threads() == 96);
      CHECK(warp() * 32 + lane() == thread_index());
    });
    CHECK(count == std::vector<int>(6 * 96, 1));
  }
}

TEST_CASE("blocks are whole warps") {
  CHECK_THROWS_AS(simt::launch({}, 33, 0, {}, [] {}), simt::Fault);
  CHECK_THROWS_AS(simt::launch({}, 0, 0, {}, [] {}), simt::Fault);
  CHECK_THROWS_AS(simt::launch({}, 1056, 0, {}, [] {}), simt::Fault);
}

TEST_CASE("a barrier orders the threads of a block") {
  const auto reversed = [](bool barrier) {
    return [barrier] {
      float* const x = shared_floats();
      const int i = thread_index();
      store_shared(x + i, static_cast<float>(i));
      if (barrier) sync_block();
      const float y = load_shared(x + 63 - i);
      if (barrier) CHECK(y == static_cast<float>(63 - i));
    };
  };
  CHECK(fault(reversed(true)) == "");
  simt::Options forward;  // whatever the values are, nothing orders them
  CHECK_THROWS_WITH_AS(run([] {
                         float* const x = shared_floats();
                         store_shared(x + thread_index(), 1.0f);
                         load_shared(x + 63 - thread_index());
                       }),
                       doctest::Contains("race on shared memory"), simt::Fault);
}

TEST_CASE("a warp's barrier orders its lanes, not other warps") {
  const auto exchange = [](int distance) {
    return [distance] {
      float* const x = shared_floats();
      store_shared(x + thread_index(), 1.0f);
      sync_warp();
      load_shared(x + (thread_index() ^ distance));
    };
  };
  CHECK(fault(exchange(1)) == "");
  CHECK(fault(exchange(16)) == "");
  CHECK(has(fault(exchange(32)), "race on shared memory"));
}

TEST_CASE("a shuffle orders no memory") {
  const auto kernel = [] {
    float* const x = shared_floats();
    store_shared(x + thread_index(), 1.0f);
    shuffle(0, 0);
    load_shared(x + (thread_index() ^ 1));
  };
  CHECK(has(fault(kernel), "race on shared memory"));
}

TEST_CASE("a write races with any of several readers") {
  // Lanes 0 and 1 of warp 0 and a lane of warp 1 read; then one of them writes.
  for (const int writer : {0, 1, 32, 33}) {
    for (const bool warp_barrier : {false, true}) {
      const auto kernel = [writer, warp_barrier] {
        float* const x = shared_floats();
        if (thread_index() == 5) store_shared(x, 1.0f);
        sync_block();
        if (thread_index() == 0 || thread_index() == 32 || thread_index() == 1) load_shared(x);
        if (warp_barrier) sync_warp();
        if (thread_index() == writer) store_shared(x, 2.0f);
      };
      CHECK(has(fault(kernel), "race on shared memory"));
    }
  }
}

TEST_CASE("later reads of one warp do not hide a read of another") {
  // Where warp 0 goes first, thread 32 reads between threads 0 and 1, which a shuffle parts but does not order.
  const auto kernel = [] {
    float* const x = shared_floats();
    if (thread_index() == 5) store_shared(x, 1.0f);
    sync_block();
    if (thread_index() == 0 || thread_index() == 32) load_shared(x);
    shuffle(0, 0);
    if (thread_index() == 1) load_shared(x);
    sync_warp();
    if (thread_index() == 1) store_shared(x, 2.0f);
  };
  CHECK(has(fault(kernel), "thread 32 reads it"));
}

TEST_CASE("two writes race, also of the same value and of halves of a word") {
  CHECK(has(fault([] { store_shared(shared_floats(), 1.0f); }), "writes it by store_shared"));
  CHECK(fault([] { store_shared(static_cast<Half*>(shared_memory()) + thread_index(), Half{1}); }) == "");
}

TEST_CASE("a race names threads and lines") {
  const int line = __LINE__ + 1;
  const std::string what = fault([] { store_shared(shared_floats(), 1.0f); });
  CHECK(has(what, "store_shared at test_simt.cpp:" + std::to_string(line)));
  CHECK(has(what, "byte 0: thread "));
  CHECK(has(what, " writes it by store_shared at "));
  CHECK(has(what, "in block ("));
}

TEST_CASE("a barrier that some threads never reach") {
  const std::string ended = fault([] {
    if (thread_index() < 40) sync_block();
  });
  CHECK(has(ended, "ended while thread"));
  const std::string apart = fault([] {
    if (thread_index() < 40) {
      sync_block();
    } else {
      sync_block();
    }
  });
  CHECK(has(apart, "threads meet at different barriers"));
  const std::string stuck = fault([] {
    if (thread_index() < 32) {
      sync_block();
    } else if (thread_index() < 48) {
      sync_warp();
    }
    sync_block();
  });
  CHECK(has(stuck, "lanes of a warp") == false);
  CHECK(stuck != "");
}

TEST_CASE("a collective that some lanes never reach, or reach elsewhere") {
  CHECK(has(fault([] {
              if (lane() < 16) shuffle(1.0f, 0);
            }),
            "deadlock: "));
  const std::string apart = fault([] {
    if (lane() < 16) {
      shuffle(1.0f, 0);
    } else {
      shuffle(1.0f, 0);
    }
  });
  CHECK(has(apart, "lanes of a warp meet at different calls"));
  CHECK(fault([] {
          if (warp() == 0) shuffle(1.0f, 0);
        }) == "");
}

TEST_CASE("shared memory ends where it ends") {
  const auto at = [](int64_t byte, auto number) {
    return [byte, number] {
      using T = decltype(number);
      if (thread_index() == 7) load_shared(reinterpret_cast<T*>(static_cast<char*>(shared_memory()) + byte));
    };
  };
  CHECK(fault(at(1020, float{})) == "");
  CHECK(has(fault(at(1024, float{})), "touches bytes 1024 to 1027 of 1024"));
  CHECK(has(fault(at(-4, float{})), "touches bytes -4 to -1 of 1024"));
  CHECK(has(fault(at(1020, double{})), "not a multiple"));
  CHECK(has(fault(at(8, Quad{})), "not a multiple"));
  CHECK(fault(at(1008, Quad{})) == "");
}

TEST_CASE("shared memory starts as NaN, in every block") {
  run([] {
    CHECK(std::isnan(load_shared(shared_floats() + thread_index())));
    CHECK(std::isnan(to_float(load_shared(static_cast<Half*>(shared_memory()) + 300))));
    sync_block();
    store_shared(shared_floats() + thread_index(), 0.0f);
  });
}

TEST_CASE("global memory is what the launch was given") {
  std::vector<float> input(64), output(64);
  simt::Options options;
  options.global = {range(input, false), range(output, true)};
  const auto copy = [&](int shift, float* to) {
    return [&input, shift, to] {
      const int i = thread_index();
      if (block_index_x() == 0) store_global(to + i, load_global(input.data() + i + shift));
    };
  };
  CHECK(fault(copy(0, output.data()), options) == "");
  CHECK(has(fault(copy(1, output.data()), options), "reads 4 bytes outside every argument"));
  CHECK(has(fault(copy(1, output.data()), options), ", 0 bytes beyond the end of range 0"));
  CHECK(has(fault(copy(0, input.data()), options), "writes 4 bytes of an input"));
  CHECK(has(fault(copy(0, output.data() + 1), options), "writes 4 bytes outside every argument"));
}

TEST_CASE("blocks race on global memory") {
  std::vector<float> x(128);
  simt::Options options;
  options.global = {range(x, true)};
  const auto kernel = [&](unsigned stride) {
    return [&x, stride] { store_global(x.data() + block_index_x() * stride + thread_index(), 1.0f); };
  };
  CHECK(fault(kernel(64), options) == "");
  CHECK(has(fault(kernel(63), options), "race on global memory"));
  CHECK(has(fault(kernel(63), options), " of block "));
  CHECK(fault([&] { load_global(x.data()); }, options) == "");
}

TEST_CASE("asynchronous copies are there after their wait, and not before") {
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i) x[static_cast<size_t>(i)] = static_cast<float>(i);
  simt::Options options;
  options.global = {range(x, false)};
  enum Fault { none, no_wait, wait_for_another, no_barrier, read_early, write_early };
  const auto kernel = [&](Fault of) {
    return [&x, of] {
      float* const s = shared_floats();
      const int i = thread_index();
      if (i < 16) copy_async<16>(s + 4 * i, x.data() + 4 * i);
      commit_copies();
      if (i < 16) copy_async<4>(s + 64 + i, x.data() + i, i % 2 == 0 ? 4 : 0);
      commit_copies();
      if (of == read_early && i == 0) load_shared(s);
      if (of == write_early && i == 0) store_shared(s, 0.0f);
      if (of == wait_for_another) {
        wait_copies<2>();
      } else if (of != no_wait) {
        wait_copies<1>();
      }
      if (of != no_barrier) sync_block();
      const float first = load_shared(s + i);
      wait_copies<0>();
      sync_block();
      const float second = load_shared(s + 64 + i % 16);
      if (of == none) CHECK(first == static_cast<float>(i));
      if (of == none) CHECK(second == static_cast<float>(i % 2 == 0 ? i % 16 : 0));
    };
  };
  CHECK(fault(kernel(none), options) == "");
  CHECK(has(fault(kernel(no_wait), options), "during the copy_async"));
  CHECK(has(fault(kernel(wait_for_another), options), "during the copy_async"));
  CHECK(has(fault(kernel(no_barrier), options), "memory"));
  CHECK(has(fault(kernel(read_early), options), "during the copy_async"));
  CHECK(has(fault(kernel(write_early), options), "during the copy_async"));
  CHECK(has(fault([&] { copy_async<4>(shared_floats() + thread_index(), x.data()); }, options),
            "ended without a wait for its copy_async"));
  CHECK(has(fault(
                [&] {
                  copy_async<16>(shared_floats() + 4 * thread_index(), x.data() + 60, thread_index() == 3 ? 16 : 0);
                  copy_async<16>(shared_floats(), x.data() + 64);
                },
                options),
            "outside every argument"));
  CHECK(has(fault([&] { copy_async<16>(shared_floats() + 4 * thread_index(), x.data() + 1); }, options),
            "not a multiple"));
}

TEST_CASE("bank conflicts are counted") {
  const auto passes = [](auto number, int stride, int lanes) {
    const simt::Report report = run(
        [stride, lanes] {
          using T = decltype(number);
          if (lane() < lanes) load_shared(static_cast<T*>(shared_memory()) + lane() * stride);
        },
        {}, 32, 1, 65536);
    REQUIRE(report.shared.size() == 1);
    const simt::Traffic& traffic = report.shared.begin()->second;
    CHECK(traffic.requests == 1);
    return std::pair<uint64_t, uint64_t>{traffic.actual, traffic.ideal};
  };
  using P = std::pair<uint64_t, uint64_t>;
  CHECK(passes(float{}, 1, 32) == P{1, 1});
  CHECK(passes(float{}, 0, 32) == P{1, 1});
  CHECK(passes(float{}, 2, 32) == P{2, 1});
  CHECK(passes(float{}, 33, 32) == P{1, 1});
  CHECK(passes(float{}, 32, 32) == P{32, 1});
  CHECK(passes(float{}, 32, 5) == P{5, 1});
  CHECK(passes(Half{}, 1, 32) == P{1, 1});
  CHECK(passes(double{}, 1, 32) == P{2, 2});
  CHECK(passes(Quad{}, 1, 32) == P{4, 4});
  CHECK(passes(Quad{}, 8, 32) == P{32, 4});
}

TEST_CASE("traffic of global memory is counted") {
  std::vector<float> x(32 * 32);
  simt::Options options;
  options.global = {range(x, false)};
  const auto sectors = [&](int stride) {
    const simt::Report report = run([&] { load_global(x.data() + lane() * stride); }, options, 32, 1);
    REQUIRE(report.global.size() == 1);
    return report.global.begin()->second;
  };
  CHECK(sectors(1).ideal == 4);
  CHECK(sectors(1).actual <= 5);  // the vector may start anywhere
  CHECK(sectors(32).ideal == 4);
  CHECK(sectors(32).actual == 32);
}

TEST_CASE("a fault leaves the emulator usable") {
  for (int i = 0; i < 3; ++i) {
    CHECK(fault([] { store_shared(shared_floats(), 1.0f); }) != "");
    CHECK(fault([] { sync_block(); }) == "");
  }
}

TEST_CASE("without checks kernels give the same results") {
  std::vector<float> y(128);
  simt::Options options;
  options.check = false;
  for (const simt::Order order : kOrders) {
    options.order = order;
    const simt::Report report = run(
        [&] {
          float* const x = shared_floats();
          store_shared(x + thread_index(), static_cast<float>(thread_index()));
          sync_block();
          store_global(y.data() + block_index_x() * 64 + thread_index(), load_shared(x + 63 - thread_index()));
        },
        options);
    for (size_t i = 0; i < 128; ++i) CHECK(y[i] == static_cast<float>(63 - i % 64));
    CHECK(report.barriers == 2);
    CHECK(report.shared.empty());
  }
}
