#include "kernels/cpu/worker_pool.h"

#include <cstddef>

#include "kernels/check.h"
#include "kernels/cpu/spin.h"

namespace spillway::cpu {

WorkerPool::WorkerPool(int num_workers) {
  SPILLWAY_CHECK(num_workers >= 1) << "num_workers is " << num_workers;
  threads_.reserve(static_cast<std::size_t>(num_workers - 1));
  for (int i = 1; i < num_workers; ++i) threads_.emplace_back([this] { Work(); });
}

WorkerPool::~WorkerPool() {
  stop_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::RunItems(Scratch& scratch) {
  const std::int64_t end = num_items_;
  for (std::int64_t item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < end;) (*body_)(item, scratch);
}

void WorkerPool::ParallelFor(std::int64_t num_items, Scratch& scratch, Body body) {
  if (num_items <= 1 || threads_.empty() || !mutex_.try_lock()) {
    for (std::int64_t item = 0; item < num_items; ++item) body(item, scratch);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_, std::adopt_lock);
  body_ = &body;
  num_items_ = num_items;
  next_.store(0, std::memory_order_relaxed);
  active_.store(0, std::memory_order_release);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();

  RunItems(scratch);

  active_.fetch_or(kClosed, std::memory_order_acq_rel);
  if (SpinUntil([this] { return active_.load(std::memory_order_acquire) == kClosed; })) return;
  for (std::uint32_t seen; (seen = active_.load(std::memory_order_acquire)) != kClosed;) active_.wait(seen);
}

void WorkerPool::Work() {
  Scratch scratch;
  std::uint32_t seen = 0;
  while (true) {
    const auto is_new = [this, &seen] { return generation_.load(std::memory_order_acquire) != seen; };
    if (!SpinUntil(is_new)) generation_.wait(seen, std::memory_order_acquire);
    seen = generation_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;

    std::uint32_t active = active_.load(std::memory_order_relaxed);
    while ((active & kClosed) == 0 && !active_.compare_exchange_weak(active, active + 1, std::memory_order_acquire)) {
    }
    if ((active & kClosed) != 0) continue;
    RunItems(scratch);
    if (active_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1U)) active_.notify_one();
  }
}

}  // namespace spillway::cpu
