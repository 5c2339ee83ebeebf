// Memory for results and workspaces. Large blocks are kept warm for the next call, because fresh pages cost as much as
// the arithmetic on them.
#pragma once

#include <cstddef>
#include <memory>

namespace fwp::core {

// Aligned as a workspace, contents unspecified; throws std::bad_alloc.
void* allocate(size_t bytes);
void* reallocate(void* memory, size_t bytes);
void deallocate(void* memory) noexcept;

struct Deallocate {
  void operator()(void* memory) const noexcept { deallocate(memory); }
};
using Memory = std::unique_ptr<void, Deallocate>;

size_t cache_limit();  // an error if FWP_CACHE_MB is not a number of megabytes
size_t cache_idle() noexcept;
void empty_cache() noexcept;

}  // namespace fwp::core
