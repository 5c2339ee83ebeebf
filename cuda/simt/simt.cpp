#include "simt.hpp"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <tuple>
#include <unordered_map>

#include "fiber.hpp"

namespace fwp::simt {
namespace {

std::string place(const Site& site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}
std::string text(const Site& site) { return std::string(site.name) + " at " + place(site); }
bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.name, b.name) == 0 && std::strcmp(a.file, b.file) == 0;
}
std::string text(int thread) { return "thread " + std::to_string(thread); }

// When an access happened, as far as the order between threads goes: barriers of the block order all threads, those of
// a warp its own.
struct Moment {
  int16_t thread = -1;
  uint16_t site = 0;   // number in Sites
  uint32_t block = 0;  // which block of the grid
  uint32_t barriers = 0, warp_barriers = 0;

  int warp() const { return thread / kWarp; }
};

bool before(const Moment& then, const Moment& now) {
  if (then.block != now.block) return false;
  return then.thread == now.thread || then.barriers < now.barriers ||
         (then.warp() == now.warp() && then.warp_barriers < now.warp_barriers);
}

// Who touched two bytes of memory last. Three readers that nothing orders are enough to find a write that races with
// any of them: one, another lane of its warp, and one of another warp.
struct Cell {
  Moment writer;
  std::array<Moment, 3> readers;
  int16_t copying = -1;  // the thread whose asynchronous copy is under way
  uint16_t copy = 0;

  void read(const Moment& now) {
    Moment& first = readers[0];
    if (first.thread < 0 || before(first, now)) {
      first = now;
    } else {
      readers[first.block == now.block && first.warp() == now.warp() ? 1 : 2] = now;
    }
  }
};

// Numbers for sites, to keep cells small.
class Sites {
 public:
  uint16_t number(const Site& site) {
    const auto found = numbers_.try_emplace({site.file, site.line, site.name}, static_cast<uint16_t>(sites_.size()));
    if (found.second) sites_.push_back(site);
    return found.first->second;
  }
  const Site& operator[](uint16_t number) const { return sites_[number]; }

 private:
  std::map<std::tuple<const char*, int, const char*>, uint16_t> numbers_;
  std::vector<Site> sites_;
};

struct Copy {
  char* to;
  const char* from;
  size_t bytes, valid;
  uint16_t site;
  bool done;
};

// One access of one lane, kept until its warp meets: the lanes of a warp run one after the other here, on a device
// together.
struct Request {
  uint16_t site;
  uintptr_t address;
  size_t bytes;
  bool shared;
};

enum class State { ready, at_barrier, in_warp, done };

struct Thread {
  Fiber fiber;
  int index = 0;
  State state = State::ready;
  Site at{};
  void* arguments = nullptr;
  std::deque<std::vector<Copy>> copies;  // committed groups, and the open one at the end
  std::vector<Request> requests;
};

struct Warp {
  uint32_t barriers = 0;
  int arrived = 0;
};

constexpr size_t kGrain = 2;  // bytes of a cell: the smallest thing kernels store

class Block {
 public:
  Block(Dim3 size, unsigned threads, size_t shared_bytes, const Options& options, const std::function<void()>& kernel)
      : grid(size),
        options_(options),
        kernel_(kernel),
        threads_(threads),
        warps_(threads / kWarp),
        shared_bytes_(shared_bytes),
        shared_cells_(options.check ? (shared_bytes + kGrain - 1) / kGrain : 0),
        random_(options.seed) {
    shared_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, rounded(shared_bytes))));
    if (shared_ == nullptr) throw std::bad_alloc();
  }

  void run(Dim3 at, uint32_t number) {
    index = at;
    number_ = number;
    std::memset(shared_.get(), 0xff, shared_bytes_);
    std::fill(shared_cells_.begin(), shared_cells_.end(), Cell{});
    std::fill(warps_.begin(), warps_.end(), Warp{});
    barriers_ = at_barrier_ = 0;
    live_ = static_cast<int>(threads_.size());
    ready_.clear();
    for (int i = 0; i < live_; ++i) {
      Thread& thread = threads_[static_cast<size_t>(i)];
      thread.index = i;
      thread.state = State::ready;
      thread.copies.assign(1, {});
      thread.requests.clear();
      thread.fiber.restart([](void* block) { static_cast<Block*>(block)->body(); }, this);
      ready_.push_back(i);
    }
    while (live_ > 0) {
      if (ready_.empty()) stuck();
      current_ = &threads_[static_cast<size_t>(next())];
      ++report.switches;
      current_->fiber.resume();
      if (!fault_.empty()) throw Fault(fault_);
    }
    for (size_t w = 0; w < warps_.size(); ++w) settle(static_cast<int>(w));
  }

  Thread& current() { return *current_; }
  size_t thread_count() const { return threads_.size(); }
  void* shared() { return shared_.get(); }

  void sync_block(const Site& site) {
    wait(State::at_barrier, site);
    ++at_barrier_;
    release_barrier();
    current_->fiber.suspend();
  }

  void meet(const Site& site, void* arguments, void (*act)(void* const*), bool orders_memory) {
    const int w = current_->index / kWarp;
    Warp& warp = warps_[static_cast<size_t>(w)];
    wait(State::in_warp, site);
    current_->arguments = arguments;
    check_lanes(w, site);
    if (++warp.arrived == kWarp) {
      void* lanes[kWarp];
      for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = thread(w, lane).arguments;
      if (act != nullptr) act(lanes);
      ++report.collectives[site.name];
      warp.barriers += orders_memory;
      warp.arrived = 0;
      settle(w);
      for (int lane = 0; lane < kWarp; ++lane) make_ready(thread(w, lane));
    }
    current_->fiber.suspend();
  }

  void touch_shared(const void* p, size_t bytes, Access access, const Site& site) {
    if (!options_.check) return;
    const size_t offset = static_cast<size_t>(static_cast<const char*>(p) - shared_.get());
    check_alignment("shared", offset, bytes, site);
    if (offset + bytes > shared_bytes_ || offset > shared_bytes_) outside("shared", offset, bytes, shared_bytes_, site);
    for (size_t c = offset / kGrain; c * kGrain < offset + bytes; ++c)
      touch("shared", c * kGrain, shared_cells_[c], access, now(site));
    current_->requests.push_back({sites_.number(site), offset, bytes, true});
  }

  void touch_global(const void* p, size_t bytes, Access access, const Site& site) {
    if (!options_.check) return;
    const auto address = reinterpret_cast<uintptr_t>(p);
    check_alignment("global", address, bytes, site);
    check_range(address, bytes, access, site);
    if (access == Access::raise) return;
    for (uintptr_t c = address / kGrain; c * kGrain < address + bytes; ++c)
      touch("global", c * kGrain, global_cells_[c], access, now(site));
    current_->requests.push_back({sites_.number(site), address, bytes, false});
  }

  void copy_async(void* to, const void* from, size_t bytes, size_t valid, const Site& site) {
    if (valid > 0) touch_global_part(from, bytes, valid, site);
    touch_shared(to, bytes, Access::write, site);
    Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, sites_.number(site), false};
    mark(copy, current_->index);
    if (options_.order == Order::reverse || (options_.order == Order::random && random_() % 2 == 0)) finish(copy);
    current_->copies.back().push_back(copy);
  }

  void commit_copies() { current_->copies.emplace_back(); }

  void wait_copies(int groups_left) {
    auto& groups = current_->copies;
    while (static_cast<int>(groups.size()) - 1 > groups_left) {
      for (Copy& copy : groups.front()) {
        finish(copy);
        mark(copy, -1);
      }
      groups.pop_front();
    }
  }

  // Ends the launch: body() takes it from here to run(), on another stack.
  [[noreturn]] void fail(const std::string& what) { throw Fault(what + in_block()); }

  Dim3 index{};
  const Dim3 grid;
  Report report;

 private:
  static constexpr size_t kAlignment = 1024;
  static size_t rounded(size_t bytes) {
    return std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  }

  Thread& thread(int warp, int lane) { return threads_[static_cast<size_t>(warp * kWarp + lane)]; }

  void body() {
    try {
      kernel_();
      end();
    } catch (const Fault& fault) {
      fault_ = fault.what();
    }
    for (;;) current_->fiber.suspend();
  }

  void end() {
    Thread& thread = *current_;
    for (const auto& group : thread.copies)
      if (!group.empty())
        fail(text(thread.index) + " ended without a wait for its " + text(sites_[group.front().site]));
    thread.state = State::done;
    --live_;
    release_barrier();
  }

  std::string in_block() const {
    return ", in block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
           ")";
  }

  int next() {
    const size_t last = ready_.size() - 1;
    const size_t pick = options_.order == Order::forward   ? 0
                        : options_.order == Order::reverse ? last
                                                           : random_() % (last + 1);
    const int chosen = ready_[pick];
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(pick));
    return chosen;
  }

  void wait(State state, const Site& site) {
    current_->state = state;
    current_->at = site;
  }

  void make_ready(Thread& thread) {
    thread.state = State::ready;
    ready_.push_back(thread.index);
  }

  // A barrier holds until all threads that have not ended are at it.
  void release_barrier() {
    if (at_barrier_ == 0 || at_barrier_ < live_) return;
    const Thread* first = nullptr;
    for (Thread& thread : threads_) {
      if (thread.state == State::done) fail_barrier(thread);
      if (first == nullptr) first = &thread;
      if (!same(first->at, thread.at))
        fail("threads meet at different barriers: " + text(first->index) + " at " + place(first->at) + ", " +
             text(thread.index) + " at " + place(thread.at));
    }
    at_barrier_ = 0;
    ++barriers_;
    ++report.barriers;
    for (size_t w = 0; w < warps_.size(); ++w) settle(static_cast<int>(w));
    for (Thread& thread : threads_) make_ready(thread);
  }

  [[noreturn]] void fail_barrier(const Thread& ended) {
    const auto waits = std::find_if(threads_.begin(), threads_.end(),
                                    [](const Thread& thread) { return thread.state == State::at_barrier; });
    fail(text(ended.index) + " ended while " + text(waits->index) + " waits at " + text(waits->at));
  }

  void check_lanes(int w, const Site& site) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const Thread& other = thread(w, lane);
      if (other.state == State::in_warp && !same(other.at, site))
        fail("lanes of a warp meet at different calls: " + text(current_->index) + " at " + text(site) + ", " +
             text(other.index) + " at " + text(other.at));
    }
  }

  // Nobody can go on.
  [[noreturn]] void stuck() {
    std::string what = "deadlock:";
    std::set<std::string> seen;
    for (const Thread& thread : threads_) {
      const std::string where = thread.state == State::done ? "has ended" : "waits at " + text(thread.at);
      if (seen.insert(where).second) what += (seen.size() > 1 ? "; " : " ") + text(thread.index) + " " + where;
    }
    fail(what);
  }

  Moment now(const Site& site) {
    const int t = current_->index;
    return {static_cast<int16_t>(t), sites_.number(site), number_, barriers_,
            warps_[static_cast<size_t>(t / kWarp)].barriers};
  }

  void touch(const char* memory, size_t address, Cell& cell, Access access, const Moment& moment) {
    if (cell.copying >= 0)
      fail(std::string(memory) + " memory: " + text(moment.thread) + " touches byte " + std::to_string(address) +
           " by " + text(sites_[moment.site]) + " during the " + text(sites_[cell.copy]) + " of " + text(cell.copying));
    check_order(memory, address, cell.writer, moment, "writes");
    if (access == Access::write) {
      for (const Moment& reader : cell.readers) check_order(memory, address, reader, moment, "reads");
      cell.writer = moment;
      cell.readers = {};
    } else {
      cell.read(moment);
    }
  }

  void check_order(const char* memory, size_t address, const Moment& then, const Moment& moment, const char* does) {
    if (then.thread < 0 || before(then, moment)) return;
    const std::string other = then.block == moment.block ? "" : " of block " + std::to_string(then.block);
    fail(std::string("race on ") + memory + " memory, byte " + std::to_string(address) + ": " + text(then.thread) +
         other + " " + does + " it by " + text(sites_[then.site]) + ", " + text(moment.thread) + " touches it by " +
         text(sites_[moment.site]) + ", and nothing orders them");
  }

  void check_alignment(const char* memory, size_t address, size_t bytes, const Site& site) {
    if (address % bytes != 0)
      fail(std::string(memory) + " memory: " + text(current_->index) + " touches " + std::to_string(bytes) +
           " bytes at " + std::to_string(address) + ", not a multiple of them, by " + text(site));
  }

  [[noreturn]] void outside(const char* memory, size_t offset, size_t bytes, size_t size, const Site& site) {
    fail(std::string(memory) + " memory: " + text(current_->index) + " touches bytes " +
         std::to_string(static_cast<int64_t>(offset)) + " to " +
         std::to_string(static_cast<int64_t>(offset + bytes) - 1) + " of " + std::to_string(size) + " by " +
         text(site));
  }

  void check_range(uintptr_t address, size_t bytes, Access access, const Site& site) {
    bool readable = false;
    for (const Range& range : options_.global) {
      const auto begin = reinterpret_cast<uintptr_t>(range.begin);
      if (address < begin || address + bytes > begin + range.bytes) continue;
      if (access == Access::read || range.writable) return;
      readable = true;
    }
    fail(std::string("global memory: ") + text(current_->index) + (access == Access::read ? " reads " : " writes ") +
         std::to_string(bytes) + " bytes " + (readable ? "of an input" : "outside every argument") + " by " +
         text(site) + nearest(address));
  }

  std::string nearest(uintptr_t address) const {
    std::string found;
    uintptr_t best = 4096;
    for (size_t i = 0; i < options_.global.size(); ++i) {
      const uintptr_t end = reinterpret_cast<uintptr_t>(options_.global[i].begin) + options_.global[i].bytes;
      if (address >= end && address - end < best) {
        best = address - end;
        found = ", " + std::to_string(best) + " bytes beyond the end of range " + std::to_string(i);
      }
    }
    return found;
  }

  // The part of a copy's source that is read at all.
  void touch_global_part(const void* from, size_t bytes, size_t valid, const Site& site) {
    if (!options_.check) return;
    check_alignment("global", reinterpret_cast<uintptr_t>(from), bytes, site);
    for (size_t i = 0; i < valid; i += kGrain)
      touch_global(static_cast<const char*>(from) + i, kGrain, Access::read, site);
    auto& requests = current_->requests;
    requests.resize(requests.size() - (valid + kGrain - 1) / kGrain);
    requests.push_back({sites_.number(site), reinterpret_cast<uintptr_t>(from), bytes, false});
  }

  // The copy's memory is nobody's while it is under way (thread >= 0); after the wait (-1) it was written then.
  void mark(const Copy& copy, int thread) {
    if (!options_.check) return;
    const size_t offset = static_cast<size_t>(copy.to - shared_.get());
    for (size_t c = offset / kGrain; c * kGrain < offset + copy.bytes; ++c) {
      shared_cells_[c].copying = static_cast<int16_t>(thread);
      shared_cells_[c].copy = copy.site;
      if (thread < 0) touch("shared", c * kGrain, shared_cells_[c], Access::write, now(sites_[copy.site]));
    }
  }

  static void finish(Copy& copy) {
    if (copy.done) return;
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    copy.done = true;
  }

  // Counts the requests of a warp since it last met. Lanes that took the same way have the same lines in the same
  // order; where they parted, those with the same next line are taken together.
  void settle(int w) {
    std::array<size_t, kWarp> at{};
    for (;;) {
      const Request* first = nullptr;
      std::vector<const Request*> together;
      for (int lane = 0; lane < kWarp; ++lane) {
        const auto& requests = thread(w, lane).requests;
        if (at[static_cast<size_t>(lane)] == requests.size()) continue;
        const Request& request = requests[at[static_cast<size_t>(lane)]];
        if (first == nullptr) first = &request;
        if (first->site != request.site || first->bytes != request.bytes) continue;
        ++at[static_cast<size_t>(lane)];
        together.push_back(&request);
      }
      if (first == nullptr) break;
      first->shared ? count_shared(together) : count_global(together);
    }
    for (int lane = 0; lane < kWarp; ++lane) thread(w, lane).requests.clear();
  }

  // 32 banks of 4 bytes; of wider accesses as many lanes go together as fill them. Lanes that read one word share it.
  void count_shared(const std::vector<const Request*>& requests) {
    Traffic& traffic = report.shared[place(sites_[requests[0]->site])];
    ++traffic.requests;
    const size_t group = std::min<size_t>(kWarp, 128 / std::max<size_t>(4, requests[0]->bytes));
    for (size_t begin = 0; begin < requests.size(); begin += group) {
      std::array<std::set<uintptr_t>, 32> banks;
      for (size_t i = begin; i < std::min(begin + group, requests.size()); ++i)
        for (uintptr_t word = requests[i]->address / 4; word * 4 < requests[i]->address + requests[i]->bytes; ++word)
          banks[word % 32].insert(word);
      size_t passes = 0;
      for (const auto& words : banks) passes = std::max(passes, words.size());
      traffic.ideal += 1;
      traffic.actual += passes;
    }
  }

  void count_global(const std::vector<const Request*>& requests) {
    Traffic& traffic = report.global[place(sites_[requests[0]->site])];
    ++traffic.requests;
    std::set<uintptr_t> sectors, granules;
    for (const Request* request : requests) {
      for (uintptr_t s = request->address / 32; s * 32 < request->address + request->bytes; ++s) sectors.insert(s);
      for (uintptr_t g = request->address / 2; g * 2 < request->address + request->bytes; ++g) granules.insert(g);
    }
    traffic.ideal += (granules.size() * 2 + 31) / 32;
    traffic.actual += sectors.size();
  }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  const Options& options_;
  const std::function<void()>& kernel_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  size_t shared_bytes_;
  std::unique_ptr<char, Free> shared_;
  std::vector<Cell> shared_cells_;
  std::unordered_map<uintptr_t, Cell> global_cells_;
  Sites sites_;
  std::mt19937 random_;
  std::vector<int> ready_;
  Thread* current_ = nullptr;
  uint32_t number_ = 0, barriers_ = 0;
  int at_barrier_ = 0, live_ = 0;
  std::string fault_;
};

thread_local Block* block = nullptr;

}  // namespace

Options options_from_environment() {
  const auto setting = [](const char* name) {
    const char* const value = std::getenv(name);
    return std::string(value != nullptr ? value : "");
  };
  Options options;
  options.check = setting("FWP_SIMT_CHECK") != "0";
  const std::string order = setting("FWP_SIMT_ORDER");
  if (order == "reverse") options.order = Order::reverse;
  if (order == "random") options.order = Order::random;
  return options;
}

Report launch(Dim3 grid, unsigned threads, size_t shared_bytes, const Options& options,
              const std::function<void()>& kernel) {
  if (threads == 0 || threads % kWarp != 0 || threads > 1024)
    throw Fault("launch: expected whole warps, up to 1024 threads, got " + std::to_string(threads));
  Block state(grid, threads, shared_bytes, options, kernel);
  block = &state;
  const struct Reset {
    ~Reset() { block = nullptr; }
  } reset;
  std::vector<uint32_t> order(size_t{grid.x} * grid.y * grid.z);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (options.order == Order::random) std::shuffle(order.begin(), order.end(), std::mt19937(options.seed));
  for (const uint32_t i : order) state.run({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y}, i);
  return state.report;
}

unsigned thread_index() { return static_cast<unsigned>(block->current().index); }
unsigned block_threads() { return static_cast<unsigned>(block->thread_count()); }
Dim3 block_index() { return block->index; }
Dim3 grid_size() { return block->grid; }
void* shared_memory() { return block->shared(); }
void sync_block(const Site& site) { block->sync_block(site); }
void sync_warp(const Site& site) { block->meet(site, nullptr, nullptr, true); }
void meet(const Site& site, void* arguments, void (*run)(void* const*)) { block->meet(site, arguments, run, false); }
void touch_shared(const void* p, size_t bytes, Access access, const Site& site) {
  block->touch_shared(p, bytes, access, site);
}
void touch_global(const void* p, size_t bytes, Access access, const Site& site) {
  block->touch_global(p, bytes, access, site);
}
void copy_async(void* to, const void* from, size_t bytes, size_t valid, const Site& site) {
  block->copy_async(to, from, bytes, valid, site);
}
void commit_copies() { block->commit_copies(); }
void wait_copies(int groups_left) { block->wait_copies(groups_left); }

}  // namespace fwp::simt
