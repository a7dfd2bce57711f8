#pragma once

// Parallel-for over a range. The calling thread takes part; the others spin for a moment between calls, then sleep.
// A worker that wakes late finds the call closed and goes back to sleep: nobody waits for a thread that has not begun.
//
// Each worker has a share of neighbouring items, the same part of every range, so that what it reads and writes stays
// in its caches from call to call, and what comes next is known. Whoever is done takes from the ends of the others'
// shares.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/cpu/scratch.h"

namespace spillway::cpu {

// What the items of a later call read from memory: item i the bytes from data + i * item_bytes on, whole lines.
struct UpcomingReads {
  const std::byte* data = nullptr;
  std::int64_t item_bytes = 0;
  std::int64_t num_items = 0;  // 0: not known
};

// Any thread may call; a call that finds the pool busy runs on its own thread alone.
class WorkerPool {
 public:
  // num_workers counts the calling thread: num_workers - 1 threads are started.
  explicit WorkerPool(int num_workers);
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;
  ~WorkerPool();

  int num_workers() const { return static_cast<int>(threads_.size()) + 1; }

  // The item and working memory of the thread that runs it.
  using Body = absl::FunctionRef<void(std::int64_t item, Scratch& scratch)>;

  // Runs body for each item in [0, num_items), fewer than 2^32, and returns when all are done. A worker runs the items
  // of its share in ascending order. `scratch` is the calling thread's. What a body writes is visible to the caller
  // afterwards. Workers that wait, for others to be done or for the next call, fetch the beginning of their shares of
  // `upcoming` into their caches; the memory is not touched otherwise, and may be gone by then.
  void ParallelFor(std::int64_t num_items, Scratch& scratch, Body body, const UpcomingReads& upcoming = {});

  // Likewise for several neighbouring items at once, [begin, end): up to `most` of them while there are many, one at a
  // time in the end, so that workers are done together. A thread that runs a call alone takes all at once.
  using RangeBody = absl::FunctionRef<void(std::int64_t begin, std::int64_t end, Scratch& scratch)>;
  void ParallelForRanges(std::int64_t num_items, std::int64_t most, Scratch& scratch, RangeBody body,
                         const UpcomingReads& upcoming = {});

  // Whether some worker's share of a range begins with the item: no worker runs it right behind the one before.
  bool BeginsShare(std::int64_t item, std::int64_t num_items) const {
    const std::int64_t next_worker = (item * num_workers() + num_items - 1) / num_items;
    return ShareBegin(num_items, next_worker) == item;
  }

 private:
  // What is left of a share: [begin in the low half, end in the high half).
  struct alignas(64) Share {
    std::atomic<std::uint64_t> items{0};
  };

  // What a worker has still to fetch.
  struct Unfetched {
    const std::byte* at = nullptr;
    const std::byte* end = nullptr;

    // A few lines; false if there are none.
    bool FetchSome();
  };

  Unfetched UnfetchedOf(std::size_t worker) const;
  std::int64_t ShareBegin(std::int64_t num_items, std::int64_t worker) const {
    return num_items * worker / num_workers();
  }
  void Work(std::size_t worker);
  void RunItems(std::size_t worker, Scratch& scratch);

  // active_: number of threads inside the current call; kClosed while no further ones may enter. Opening it
  // publishes body_, most_, upcoming_ and shares_; they are rewritten only while it is closed and empty.
  static constexpr std::uint32_t kClosed = 1U << 31;

  std::mutex mutex_;  // held by the one caller the pool works for
  const RangeBody* body_ = nullptr;
  std::int64_t most_ = 1;
  UpcomingReads upcoming_;
  std::vector<Share> shares_;  // by worker, the caller's first
  alignas(64) std::atomic<std::uint32_t> active_{kClosed};
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // what idle workers wait on
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace spillway::cpu
