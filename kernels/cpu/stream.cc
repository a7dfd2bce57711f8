#include "kernels/cpu/stream.h"

#include <utility>

#include "kernels/cpu/copy.h"
#include "kernels/cpu/spin.h"

namespace spillway::cpu {

absl::Status CpuEvent::Await() {
  if (!SpinUntil([this] { return Ready(); })) done_.wait(0, std::memory_order_acquire);
  return status_;
}

double CpuEvent::SecondsSince(const Event& earlier) const {
  const auto& from = static_cast<const CpuEvent&>(earlier);
  if (!Ready() || !from.Ready()) return 0;
  return std::chrono::duration<double>(reached_ - from.reached_).count();
}

void CpuEvent::Set(absl::Status status) {
  status_ = std::move(status);
  reached_ = std::chrono::steady_clock::now();
  done_.store(1, std::memory_order_release);
  done_.notify_all();
}

CpuStream::CpuStream(WorkerPool& pool, std::function<void()> before_item, IgnoredOrder ignored_order)
    : pool_(pool), before_item_(std::move(before_item)), ignored_order_(ignored_order), thread_([this] { Run(); }) {}

CpuStream::~CpuStream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void CpuStream::Push(WorkItem item) {
  if (is_holding_) {
    held_.push_back(std::move(item));
    return;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(item));
  }
  has_items_.store(true, std::memory_order_relaxed);
  wake_.notify_one();
}

void CpuStream::Hold() { is_holding_ = true; }

void CpuStream::Resume() {
  is_holding_ = false;
  if (held_.empty()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (WorkItem& item : held_) queue_.push_back(std::move(item));
  }
  held_.clear();
  has_items_.store(true, std::memory_order_relaxed);
  wake_.notify_one();
}

void CpuStream::Run() {
  std::vector<WorkItem> items;
  while (true) {
    SpinUntil([this] { return has_items_.load(std::memory_order_relaxed); });
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) return;
      items.swap(queue_);
      has_items_.store(false, std::memory_order_relaxed);
    }
    for (WorkItem& queued : items) {
      WorkItem item = std::move(queued);  // what it holds is released in order, not with the batch
      if (before_item_) before_item_();
      item();
    }
    items.clear();
  }
}

void CpuStream::Fail(absl::Status status) {
  failed_ = true;
  const std::lock_guard<std::mutex> lock(mutex_);
  status_ = std::move(status);
}

absl::Status CpuStream::status() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

void CpuStream::Copy(std::byte* to, const std::byte* from, std::size_t size_bytes) {
  Push(WorkItem([this, to, from, size_bytes] {
    if (!failed_) CopySpan(to, from, size_bytes);
  }));
}

void CpuStream::Gather(std::byte* to, std::span<const std::byte* const> from, std::size_t offset,
                       std::size_t size_bytes) {
  Push(WorkItem([this, to, from, offset, size_bytes] {
    if (!failed_) GatherSpans(to, from, offset, size_bytes);
  }));
}

std::shared_ptr<Event> CpuStream::Record() {
  auto event = std::make_shared<CpuEvent>();
  Push(WorkItem([this, event] { event->Set(status()); }));
  return event;
}

void CpuStream::Wait(const std::shared_ptr<Event>& event) {
  if (ignored_order_ != IgnoredOrder::kNone) return;
  Push(WorkItem([this, event] {
    if (failed_) return;
    absl::Status status = event->Await();
    if (!status.ok()) Fail(std::move(status));
  }));
}

void CpuStream::Notify(std::function<void()> reached) {
  if (ignored_order_ == IgnoredOrder::kWaitAndNotify) {
    reached();
    return;
  }
  Push(WorkItem(std::move(reached)));
}

}  // namespace spillway::cpu
