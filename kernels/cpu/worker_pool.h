#pragma once

// Parallel-for over a range. The calling thread takes part; the others spin for a moment between calls, then sleep.
// A worker that wakes late finds the call closed and goes back to sleep: nobody waits for a thread that has not begun.

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "kernels/cpu/scratch.h"

namespace spillway::cpu {

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

  // Runs body for each item in [0, num_items), in no particular order, and returns when all are done. `scratch` is
  // the calling thread's. What a body writes is visible to the caller afterwards.
  void ParallelFor(std::int64_t num_items, Scratch& scratch, Body body);

 private:
  void Work();
  void RunItems(Scratch& scratch);

  // active_: number of threads inside the current call; kClosed while no further ones may enter. Opening it
  // publishes body_ and num_items_ and next_; they are rewritten only while it is closed and empty.
  static constexpr std::uint32_t kClosed = 1U << 31;

  std::mutex mutex_;  // held by the one caller the pool works for
  const Body* body_ = nullptr;
  std::int64_t num_items_ = 0;
  alignas(64) std::atomic<std::int64_t> next_{0};
  alignas(64) std::atomic<std::uint32_t> active_{kClosed};
  alignas(64) std::atomic<std::uint32_t> generation_{0};  // what idle workers wait on
  std::atomic<bool> stop_{false};
  std::vector<std::thread> threads_;
};

}  // namespace spillway::cpu
