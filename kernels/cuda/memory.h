#pragma once

// The cuda device's memory: one slab of device memory taken at start-up and given out in pieces, and pinned host memory
// that kernels can read in place.

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace spillway::cuda {

// Any thread.
class Slab : public std::enable_shared_from_this<Slab> {
 public:
  static constexpr std::size_t kAlignment = 256;

  // On the current device.
  static absl::StatusOr<std::shared_ptr<Slab>> Make(std::size_t size_bytes);
  ~Slab();
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // Zero-filled; returns to the slab with its last owner. First fit. RESOURCE_EXHAUSTED: no hole is large enough.
  absl::StatusOr<Buffer> Take(std::size_t size_bytes);
  std::size_t free_bytes() const;

 private:
  Slab(std::byte* base, std::size_t size_bytes);
  void Return(std::size_t offset, std::size_t size_bytes);

  std::byte* const base_;
  mutable std::mutex mutex_;
  std::map<std::size_t, std::size_t> holes_;  // offset -> bytes, no two adjacent; guarded by mutex_
};

// Page-locked, zero-filled, readable by kernels at the same address.
absl::StatusOr<Buffer> AllocatePinned(std::size_t size_bytes);

}  // namespace spillway::cuda
