#pragma once

// The memory of the cpu device: anonymous pages, populated when first touched, charged to a budget.

#include <atomic>
#include <cstddef>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/device.h"

namespace spillway::cpu {

// Bytes that may be allocated in all. Any thread; shared by the buffers, which give back what they took.
class MemoryBudget {
 public:
  // 0: unbounded.
  explicit MemoryBudget(std::size_t limit_bytes);
  bool Take(std::size_t size_bytes);
  void Return(std::size_t size_bytes) { free_bytes_.fetch_add(size_bytes, std::memory_order_relaxed); }
  std::size_t free_bytes() const { return free_bytes_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::size_t> free_bytes_;
};

// Page-aligned (to 2 MiB from that size on, for huge pages) and zero-filled. `budget` may be null: not charged.
absl::StatusOr<Buffer> MapPages(std::size_t size_bytes, const std::shared_ptr<MemoryBudget>& budget);

}  // namespace spillway::cpu
