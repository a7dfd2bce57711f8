#pragma once

// Working memory of one thread, kept between calls so that the hot path does not allocate.

#include <array>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "kernels/check.h"

namespace spillway::cpu {

// One thread at a time.
class Scratch {
 public:
  // 64-byte aligned, contents undefined; valid until the next Get or Split of the same object.
  std::byte* Get(std::size_t size_bytes) {
    if (size_bytes > size_bytes_) {
      size_bytes_ = Aligned(size_bytes + size_bytes / 2);
      data_.reset();
      data_.reset(static_cast<std::byte*>(std::aligned_alloc(64, size_bytes_)));
      SPILLWAY_CHECK(data_ != nullptr) << "scratch of " << size_bytes_ << " bytes";
    }
    return data_.get();
  }

  // Get of several parts, each aligned.
  template <std::size_t kParts>
  std::array<std::byte*, kParts> Split(const std::size_t (&sizes)[kParts]) {
    std::array<std::byte*, kParts> parts;
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += Aligned(size);
    std::byte* at = Get(total);
    for (std::size_t i = 0; i < kParts; ++i) {
      parts[i] = at;
      at += Aligned(sizes[i]);
    }
    return parts;
  }

 private:
  static constexpr std::size_t Aligned(std::size_t size) { return (size + 63) / 64 * 64; }

  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_bytes_ = 0;
};

}  // namespace spillway::cpu
