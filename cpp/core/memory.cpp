#include "memory.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "error.hpp"
#include "validate.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace fwp::core {
namespace {

constexpr size_t kMegabyte = size_t{1} << 20;
constexpr size_t kDefaultLimit = 512 * kMegabyte;
constexpr size_t kLarge = kMegabyte;  // smaller blocks are malloc's business
constexpr size_t kHugePage = 2 * kMegabyte;
constexpr size_t kGranule = 64 * 1024;  // a multiple of every page size in use

// What lies in front of the memory that a caller gets.
struct alignas(kWorkspaceAlignment) Block {
  size_t bytes;  // this header included
  Block* next;   // while idle

  bool large() const { return bytes >= kLarge; }
  void* memory() { return this + 1; }
};

Block* block_of(void* memory) { return static_cast<Block*>(memory) - 1; }

#if defined(__unix__) || defined(__APPLE__)
void* map(size_t bytes) {
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* const mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (slack == 0) return mapped;
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(mapped) % kHugePage) % kHugePage;
  char* const begin = static_cast<char*>(mapped) + before;
  if (before > 0) munmap(mapped, before);
  if (before < slack) munmap(begin + bytes, slack - before);
#if defined(MADV_HUGEPAGE)
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  return begin;
}

void unmap(void* begin, size_t bytes) { munmap(begin, bytes); }
#else
void* map(size_t bytes) { return ::operator new(bytes, std::align_val_t{kWorkspaceAlignment}, std::nothrow); }

void unmap(void* begin, size_t) { ::operator delete(begin, std::align_val_t{kWorkspaceAlignment}); }
#endif

void release(Block* block) {
  while (block != nullptr) {
    Block* const next = block->next;
    unmap(block, block->bytes);
    block = next;
  }
}

class Cache;
Cache& cache();

// The large blocks that nobody uses, the one given back last in front.
class Cache {
 public:
  Cache() {
    if (const char* text = std::getenv("FWP_CACHE_MB"); text != nullptr && *text != '\0') read_limit(text);
#if defined(__unix__) || defined(__APPLE__)
    // Another thread may hold the lock while the process forks.
    pthread_atfork([] { cache().mutex_.lock(); }, [] { cache().mutex_.unlock(); }, [] { cache().mutex_.unlock(); });
#endif
  }

  bool valid() const { return valid_; }
  size_t limit() const { return limit_; }
  size_t idle() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_;
  }

  // An idle block of this size, or up to a quarter larger; null if there is none.
  Block* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Block** link = &first_; *link != nullptr; link = &(*link)->next)
      if ((*link)->bytes >= bytes && (*link)->bytes - bytes <= bytes / 4) return remove(link);
    return nullptr;
  }

  void give(Block* block) {
    Block* surplus = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      block->next = first_;
      first_ = block;
      idle_ += block->bytes;
      surplus = remove_beyond(limit_);
    }
    release(surplus);
  }

  void empty() {
    Block* all = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      all = remove_beyond(0);
    }
    release(all);
  }

 private:
  void read_limit(const char* text) {
    char* end = nullptr;
    errno = 0;
    const unsigned long long megabytes = std::strtoull(text, &end, 10);
    valid_ = *text >= '0' && *text <= '9' && *end == '\0' && errno == 0;
    limit_ = valid_ ? std::min<unsigned long long>(megabytes, SIZE_MAX / kMegabyte) * kMegabyte : 0;
  }

  Block* remove(Block** link) {
    Block* const block = *link;
    *link = block->next;
    block->next = nullptr;
    idle_ -= block->bytes;
    return block;
  }

  // The newest blocks that fit into the limit stay; returns the others, as a list.
  Block* remove_beyond(size_t limit) {
    Block* removed = nullptr;
    size_t kept = 0;
    for (Block** link = &first_; *link != nullptr;) {
      if ((*link)->bytes <= limit - kept) {
        kept += (*link)->bytes;
        link = &(*link)->next;
      } else {
        Block* const block = remove(link);
        block->next = removed;
        removed = block;
      }
    }
    return removed;
  }

  std::mutex mutex_;
  Block* first_ = nullptr;
  size_t idle_ = 0;
  size_t limit_ = kDefaultLimit;
  bool valid_ = true;
};

// Never destroyed: results may outlive every static object.
Cache& cache() {
  static Cache* const one = new Cache;
  return *one;
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

Block* large_block(size_t bytes) {
  cache_limit();
  if (Block* const warm = cache().take(bytes)) return warm;
  void* fresh = map(bytes);
  if (fresh == nullptr) {
    cache().empty();
    fresh = map(bytes);
  }
  return fresh != nullptr ? new (fresh) Block{bytes, nullptr} : nullptr;
}

Block* small_block(size_t bytes) {
  void* const fresh = std::aligned_alloc(kWorkspaceAlignment, bytes);
  return fresh != nullptr ? new (fresh) Block{bytes, nullptr} : nullptr;
}

}  // namespace

void* allocate(size_t bytes) {
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  const size_t needed = sizeof(Block) + bytes;
  Block* const block =
      needed >= kLarge ? large_block(round_up(needed, kGranule)) : small_block(round_up(needed, kWorkspaceAlignment));
  if (block == nullptr) throw std::bad_alloc();
  return block->memory();
}

void* reallocate(void* memory, size_t bytes) {
  Memory grown(allocate(bytes));
  if (memory != nullptr) std::memcpy(grown.get(), memory, std::min(bytes, block_of(memory)->bytes - sizeof(Block)));
  deallocate(memory);
  return grown.release();
}

void deallocate(void* memory) noexcept {
  if (memory == nullptr) return;
  Block* const block = block_of(memory);
  if (block->large())
    cache().give(block);
  else
    std::free(block);
}

size_t cache_limit() {
  if (!cache().valid())
    fail(FWP_ARGUMENT_ERROR, "FWP_CACHE_MB: expected a whole number of megabytes, got ", std::getenv("FWP_CACHE_MB"));
  return cache().limit();
}

size_t cache_idle() noexcept { return cache().idle(); }

void empty_cache() noexcept { cache().empty(); }

}  // namespace fwp::core
