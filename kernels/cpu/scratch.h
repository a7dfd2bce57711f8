#pragma once

// Working memory of one thread, kept between calls so that the hot path does not allocate.

#include <cstddef>
#include <cstdlib>
#include <memory>

#include "kernels/check.h"

namespace spillway::cpu {

// One thread at a time.
class Scratch {
 public:
  // 64-byte aligned, contents undefined; valid until the next Get of the same object.
  std::byte* Get(std::size_t size_bytes) {
    if (size_bytes > size_bytes_) {
      size_bytes_ = (size_bytes + size_bytes / 2 + 63) / 64 * 64;
      data_.reset();
      data_.reset(static_cast<std::byte*>(std::aligned_alloc(64, size_bytes_)));
      SPILLWAY_CHECK(data_ != nullptr) << "scratch of " << size_bytes_ << " bytes";
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_bytes_ = 0;
};

}  // namespace spillway::cpu
