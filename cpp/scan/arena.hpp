// Pieces of a workspace.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fwp {
namespace {

// Hands out 64-byte aligned pieces of a workspace; over a null base it only counts, up to what no machine has.
class Arena {
 public:
  static constexpr size_t kTooMuch = size_t{1} << 60;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    size_t bytes = 0;
    if (__builtin_mul_overflow(static_cast<size_t>(count), sizeof(T), &bytes) || bytes > kTooMuch - at)
      used_ = kTooMuch;
    else
      used_ += (bytes + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace fwp
