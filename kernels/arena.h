#pragma once

// Bump allocator over memory owned elsewhere. With a null base it only counts, so that the code that will allocate also
// computes how much it needs. Rewound, never freed piecewise. One thread.

#include <cstddef>
#include <cstdint>

#include "kernels/check.h"

namespace spillway {

class Arena {
 public:
  static constexpr std::size_t kAlignment = 64;

  Arena() = default;  // counts only
  Arena(std::byte* base, std::size_t capacity) : base_(base), capacity_(capacity) {}

  // `count` elements, 64-byte aligned; null while counting.
  template <typename T>
  T* Take(std::size_t count) {
    const std::size_t begin = used_;
    used_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    if (base_ == nullptr) return nullptr;
    SPILLWAY_CHECK(used_ <= capacity_) << "arena of " << capacity_ << " bytes, wanted " << used_;
    return reinterpret_cast<T*>(base_ + begin);
  }

  void Rewind() { used_ = 0; }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t used_ = 0;
};

}  // namespace spillway
