#pragma once

// The cpu device's stream: a FIFO of closures run by a thread of its own, so that a missing wait shows.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/work_item.h"
#include "kernels/cpu/worker_pool.h"
#include "kernels/device.h"

namespace spillway::cpu {

class CpuEvent final : public Event {
 public:
  bool Ready() const override { return done_.load(std::memory_order_acquire) != 0; }
  // The status of the stream at the recorded point.
  absl::Status Await() override;
  double SecondsSince(const Event& earlier) const override;

  // Once, by the stream's thread.
  void Set(absl::Status status);

 private:
  std::atomic<std::uint32_t> done_{0};
  absl::Status status_;                            // written before done_
  std::chrono::steady_clock::time_point reached_;  // likewise
};

// What a kernel finds on the stream's thread.
struct WorkPlace {
  WorkerPool& pool;
  Scratch& call;    // shared by the workers of one call
  Scratch& worker;  // of this thread, to be passed to the pool
};

class CpuStream final : public Stream {
 public:
  // The pool outlives the stream.
  CpuStream(WorkerPool& pool, std::function<void()> before_item, IgnoredOrder ignored_order);
  ~CpuStream() override;

  void Copy(std::byte* to, const std::byte* from, std::size_t size_bytes) override;
  void Gather(std::byte* to, std::span<const std::byte* const> from, std::size_t offset,
              std::size_t size_bytes) override;
  std::shared_ptr<Event> Record() override;
  std::shared_ptr<Event> RecordTime() override { return Record(); }
  // If the awaited work failed, this stream takes over its error: what follows would read garbage.
  void Wait(const std::shared_ptr<Event>& event) override;
  void Hold() override;
  void Resume() override;
  // With IgnoredOrder::kWaitAndNotify: runs `reached` before it returns.
  void Notify(std::function<void()> reached) override;
  absl::Status status() const override;

  // Queues a kernel. Skipped after an error; its own error becomes the stream's.
  // `work` returns a status and takes a const WorkPlace&.
  template <typename Work>
  void Enqueue(Work work) {
    Push(WorkItem([this, work = std::move(work)] {
      if (failed_) return;
      absl::Status status = work(WorkPlace{pool_, call_scratch_, worker_scratch_});
      if (!status.ok()) Fail(std::move(status));
    }));
  }

 private:
  void Push(WorkItem item);
  void Run();
  void Fail(absl::Status status);

  WorkerPool& pool_;
  const std::function<void()> before_item_;
  const IgnoredOrder ignored_order_;

  // Whoever queues.
  bool is_holding_ = false;
  std::vector<WorkItem> held_;

  // Stream's thread only.
  Scratch call_scratch_;
  Scratch worker_scratch_;
  bool failed_ = false;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<WorkItem> queue_;         // guarded by mutex_
  absl::Status status_;                 // guarded by mutex_
  bool stop_ = false;                   // guarded by mutex_
  std::atomic<bool> has_items_{false};  // a hint for the spin; the queue decides

  std::thread thread_;
};

}  // namespace spillway::cpu
