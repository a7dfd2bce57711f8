#include "kernels/cuda/memory.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/errors.h"
#include "kernels/status_macros.h"

namespace spillway::cuda {
namespace {

constexpr std::size_t RoundUp(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

}  // namespace

absl::StatusOr<std::shared_ptr<Slab>> Slab::Make(std::size_t size_bytes) {
  size_bytes = size_bytes / kAlignment * kAlignment;
  void* base = nullptr;
  RETURN_IF_ERROR(ToStatus(cudaMalloc(&base, size_bytes), absl::StrCat("taking a slab of ", size_bytes, " bytes")));
  return std::shared_ptr<Slab>(new Slab(static_cast<std::byte*>(base), size_bytes));
}

Slab::Slab(std::byte* base, std::size_t size_bytes) : base_(base), holes_{{0, size_bytes}} {}

Slab::~Slab() { cudaFree(base_); }

absl::StatusOr<Buffer> Slab::Take(std::size_t size_bytes) {
  if (size_bytes > std::numeric_limits<std::size_t>::max() / 2) {
    return absl::ResourceExhaustedError(absl::StrCat("device memory: ", size_bytes, " bytes asked for"));
  }
  const std::size_t taken = RoundUp(std::max<std::size_t>(size_bytes, 1), kAlignment);
  std::size_t offset = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto hole =
        std::find_if(holes_.begin(), holes_.end(), [taken](const auto& each) { return each.second >= taken; });
    if (hole == holes_.end()) {
      std::size_t free = 0;
      std::size_t largest = 0;
      for (const auto& each : holes_) {
        free += each.second;
        largest = std::max(largest, each.second);
      }
      return absl::ResourceExhaustedError(absl::StrCat("device memory: ", size_bytes, " bytes asked for, ", free,
                                                       " left, the largest piece ", largest));
    }
    offset = hole->first;
    const std::size_t rest = hole->second - taken;
    holes_.erase(hole);
    if (rest > 0) holes_[offset + taken] = rest;
  }
  std::byte* const data = base_ + offset;
  Buffer buffer{std::shared_ptr<std::byte>(
                    data, [slab = shared_from_this(), offset, taken](std::byte*) { slab->Return(offset, taken); }),
                size_bytes};
  // Our streams do not wait for the legacy one that cudaMemset runs on.
  RETURN_IF_ERROR(ToStatus(cudaMemset(data, 0, taken), "clearing device memory"));
  RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "clearing device memory"));
  return buffer;
}

void Slab::Return(std::size_t offset, std::size_t size_bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto next = holes_.lower_bound(offset);
  if (next != holes_.end() && next->first == offset + size_bytes) {
    size_bytes += next->second;
    holes_.erase(next);
  }
  const auto after = holes_.lower_bound(offset);
  if (after != holes_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      before->second += size_bytes;
      return;
    }
  }
  holes_[offset] = size_bytes;
}

std::size_t Slab::free_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::size_t free = 0;
  for (const auto& each : holes_) free += each.second;
  return free;
}

absl::StatusOr<Buffer> AllocatePinned(std::size_t size_bytes) {
  void* data = nullptr;
  // Portable: pinned for every device. Under unified addressing the device's address is the host's.
  const cudaError_t error =
      cudaHostAlloc(&data, std::max<std::size_t>(size_bytes, 1), cudaHostAllocMapped | cudaHostAllocPortable);
  RETURN_IF_ERROR(ToStatus(error, absl::StrCat("pinning ", size_bytes, " bytes of host memory")));
  std::memset(data, 0, size_bytes);
  return Buffer{
      std::shared_ptr<std::byte>(static_cast<std::byte*>(data), [](std::byte* pages) { cudaFreeHost(pages); }),
      size_bytes};
}

}  // namespace spillway::cuda
