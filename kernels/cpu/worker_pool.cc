#include "kernels/cpu/worker_pool.h"

#include <algorithm>
#include <cstddef>

#include "kernels/check.h"
#include "kernels/cpu/spin.h"

namespace spillway::cpu {

namespace {

// A part of a second-level cache, beside what a worker has there.
constexpr std::int64_t kFetchBytes = std::int64_t{256} << 10;

// What is taken at once is such a part of what a share still has.
constexpr std::uint64_t kRangesPerShare = 4;

constexpr std::uint64_t SharePacked(std::uint64_t begin, std::uint64_t end) { return end << 32U | begin; }

struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Takes items off an end of a share; an empty range: none is left.
Range TakeItems(std::atomic<std::uint64_t>& share, bool is_own, std::int64_t most) {
  std::uint64_t left = share.load(std::memory_order_relaxed);
  while (true) {
    const std::uint64_t begin = left & 0xffffffffU;
    const std::uint64_t end = left >> 32U;
    if (begin >= end) return {};
    const std::uint64_t count =
        std::clamp<std::uint64_t>((end - begin) / kRangesPerShare, 1, static_cast<std::uint64_t>(most));
    const std::uint64_t rest = is_own ? SharePacked(begin + count, end) : SharePacked(begin, end - count);
    if (share.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
      const auto from = static_cast<std::int64_t>(is_own ? begin : end - count);
      return {from, from + static_cast<std::int64_t>(count)};
    }
  }
}

std::size_t CheckedCount(int num_workers) {
  SPILLWAY_CHECK(num_workers >= 1) << "num_workers is " << num_workers;
  return static_cast<std::size_t>(num_workers);
}

}  // namespace

WorkerPool::WorkerPool(int num_workers) : shares_(CheckedCount(num_workers)) {
  threads_.reserve(shares_.size() - 1);
  for (std::size_t worker = 1; worker < shares_.size(); ++worker) {
    threads_.emplace_back([this, worker] { Work(worker); });
  }
}

WorkerPool::~WorkerPool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool WorkerPool::Unfetched::FetchSome() {
  if (at >= end) return false;
  for (int line = 0; line < 8; ++line, at += 64) __builtin_prefetch(at, 0, 2);
  return true;
}

WorkerPool::Unfetched WorkerPool::UnfetchedOf(std::size_t worker) const {
  const auto w = static_cast<std::int64_t>(worker);
  const std::int64_t begin = ShareBegin(upcoming_.num_items, w);
  const std::int64_t share_bytes = (ShareBegin(upcoming_.num_items, w + 1) - begin) * upcoming_.item_bytes;
  const std::byte* const at = upcoming_.data + begin * upcoming_.item_bytes;
  return {at, at + std::min(share_bytes, kFetchBytes)};
}

void WorkerPool::RunItems(std::size_t worker, Scratch& scratch) {
  for (std::size_t i = 0; i < shares_.size(); ++i) {
    std::atomic<std::uint64_t>& share = shares_[(worker + i) % shares_.size()].items;
    for (Range range; (range = TakeItems(share, i == 0, most_)).begin < range.end;) {
      (*body_)(range.begin, range.end, scratch);
    }
  }
}

void WorkerPool::ParallelFor(std::int64_t num_items, Scratch& scratch, Body body, const UpcomingReads& upcoming) {
  const auto one = [&body](std::int64_t begin, std::int64_t end, Scratch& of_worker) {
    for (std::int64_t item = begin; item < end; ++item) body(item, of_worker);
  };
  ParallelForRanges(num_items, 1, scratch, one, upcoming);
}

void WorkerPool::ParallelForRanges(std::int64_t num_items, std::int64_t most, Scratch& scratch, RangeBody body,
                                   const UpcomingReads& upcoming) {
  if (num_items <= 1 || threads_.empty() || !mutex_.try_lock()) {
    if (num_items > 0) body(0, num_items, scratch);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_, std::adopt_lock);
  body_ = &body;
  most_ = most;
  upcoming_ = upcoming;
  for (std::size_t worker = 0; worker < shares_.size(); ++worker) {
    const auto w = static_cast<std::int64_t>(worker);
    const auto begin = static_cast<std::uint64_t>(ShareBegin(num_items, w));
    const auto end = static_cast<std::uint64_t>(ShareBegin(num_items, w + 1));
    shares_[worker].items.store(SharePacked(begin, end), std::memory_order_relaxed);
  }
  active_.store(0, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();

  RunItems(0, scratch);

  active_.fetch_or(kClosed, std::memory_order_acq_rel);
  Unfetched unfetched = UnfetchedOf(0);
  const auto is_done = [this] { return active_.load(std::memory_order_acquire) == kClosed; };
  if (SpinUntil(is_done, [&unfetched] { return unfetched.FetchSome(); })) return;
  for (std::uint32_t seen; (seen = active_.load(std::memory_order_acquire)) != kClosed;) active_.wait(seen);
}

void WorkerPool::Work(std::size_t worker) {
  Scratch scratch;
  Unfetched unfetched;
  std::uint32_t seen = 0;
  while (true) {
    const auto is_new = [this, &seen] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!SpinUntil(is_new, [&unfetched] { return unfetched.FetchSome(); })) {
      generation_.wait(seen, std::memory_order_acquire);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;

    std::uint32_t active = active_.load(std::memory_order_relaxed);
    while ((active & kClosed) == 0 && !active_.compare_exchange_weak(active, active + 1, std::memory_order_acquire)) {
    }
    if ((active & kClosed) != 0) continue;
    RunItems(worker, scratch);
    if (upcoming_.num_items > 0) unfetched = UnfetchedOf(worker);
    if (active_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1U)) active_.notify_one();
  }
}

}  // namespace spillway::cpu
