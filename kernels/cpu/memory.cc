#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace spillway::cpu {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

constexpr std::size_t RoundUp(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

MemoryBudget::MemoryBudget(std::size_t limit_bytes)
    : free_bytes_(limit_bytes == 0 ? std::numeric_limits<std::size_t>::max() : limit_bytes) {}

bool MemoryBudget::Take(std::size_t size_bytes) {
  std::size_t free = free_bytes_.load(std::memory_order_relaxed);
  do {
    if (size_bytes > free) return false;
  } while (!free_bytes_.compare_exchange_weak(free, free - size_bytes, std::memory_order_relaxed));
  return true;
}

absl::StatusOr<Buffer> MapPages(std::size_t size_bytes, const std::shared_ptr<MemoryBudget>& budget) {
  if (size_bytes > std::numeric_limits<std::size_t>::max() / 2) {
    return absl::ResourceExhaustedError(absl::StrCat("device memory: ", size_bytes, " bytes asked for"));
  }
  if (budget != nullptr && !budget->Take(size_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("device memory: ", size_bytes, " bytes asked for, ", budget->free_bytes(), " left"));
  }
  const std::size_t alignment = size_bytes >= kHugePageBytes ? kHugePageBytes : kPageBytes;
  const std::size_t mapped_bytes = RoundUp(std::max<std::size_t>(size_bytes, 1), kPageBytes);
  const std::size_t reserved_bytes = mapped_bytes + alignment - kPageBytes;
  void* const reserved =
      mmap(nullptr, reserved_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) {
    if (budget != nullptr) budget->Return(size_bytes);
    return absl::ResourceExhaustedError(absl::StrCat("device memory: the system refused ", size_bytes, " bytes"));
  }
  // Gives back what lies before and behind the aligned part.
  auto* const begin = static_cast<std::byte*>(reserved);
  const std::size_t skipped =
      RoundUp(reinterpret_cast<std::uintptr_t>(begin), alignment) - reinterpret_cast<std::uintptr_t>(begin);
  if (skipped != 0) munmap(begin, skipped);
  if (const std::size_t rest = reserved_bytes - skipped - mapped_bytes; rest != 0) {
    munmap(begin + skipped + mapped_bytes, rest);
  }
  std::byte* const data = begin + skipped;
  if (alignment == kHugePageBytes) madvise(data, mapped_bytes, MADV_HUGEPAGE);

  const auto release = [budget, mapped_bytes, size_bytes](std::byte* pages) {
    munmap(pages, mapped_bytes);
    if (budget != nullptr) budget->Return(size_bytes);
  };
  return Buffer{std::shared_ptr<std::byte>(data, release), size_bytes};
}

}  // namespace spillway::cpu
