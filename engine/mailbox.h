#pragma once

// Mailbox: the only way into the engine thread. Any thread posts; the engine thread takes everything at once and sleeps
// only here.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/request.h"

namespace spillway {

struct Mail {
  std::vector<SequenceRequest> submitted;
  std::vector<double> submitted_at;  // one per request
  std::vector<std::uint64_t> cancelled;
  bool has_transfers = false;  // the KvStore has something to collect
  bool reset_prefix_cache = false;
  bool stop = false;

  bool empty() const {
    return submitted.empty() && cancelled.empty() && !has_transfers && !reset_prefix_cache && !stop;
  }
};

class Mailbox {
 public:
  enum class Accepted : std::uint8_t { kYes, kFull, kClosed };

  // All of `requests` or none: at most `limit` of them wait, those the engine has taken and not yet scheduled included.
  Accepted Submit(std::vector<SequenceRequest>& requests, double now, std::int32_t limit) {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return Accepted::kClosed;
    const std::size_t waiting = mail_.submitted.size() + static_cast<std::size_t>(num_waiting_);
    if (waiting + requests.size() > static_cast<std::size_t>(limit)) return Accepted::kFull;
    for (SequenceRequest& request : requests) {
      mail_.submitted.push_back(std::move(request));
      mail_.submitted_at.push_back(now);
    }
    changed_.notify_one();
    return Accepted::kYes;
  }
  void Cancel(std::uint64_t id) {
    Post([&](Mail& mail) { mail.cancelled.push_back(id); });
  }
  void TransferDone() {
    Post([](Mail& mail) { mail.has_transfers = true; });
  }
  void ResetPrefixCache() {
    Post([](Mail& mail) { mail.reset_prefix_cache = true; });
  }
  void Stop() {
    Post([](Mail& mail) { mail.stop = true; });
  }
  void StepDone() {
    const std::lock_guard lock(mutex_);
    ++num_steps_done_;
    step_done_.notify_one();
  }

  // Engine thread. Sleeps until there is mail.
  void Await() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !mail_.empty(); });
  }
  // False if there was none in time.
  bool AwaitFor(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, timeout, [this] { return !mail_.empty(); });
  }
  // Of steps in the order of their launch; false if the next one was not done in time.
  bool AwaitStep(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    if (!step_done_.wait_for(lock, timeout, [this] { return num_steps_done_ > 0; })) return false;
    --num_steps_done_;
    return true;
  }
  Mail Take() {
    const std::lock_guard lock(mutex_);
    num_waiting_ += static_cast<std::int32_t>(mail_.submitted.size());
    return std::exchange(mail_, Mail{});
  }
  // How many taken requests still wait to be scheduled.
  void SetWaiting(std::int32_t num_waiting) {
    const std::lock_guard lock(mutex_);
    num_waiting_ = num_waiting;
  }
  // Refuses further requests and returns those that were not taken.
  Mail Close() {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    return std::exchange(mail_, Mail{});
  }
  std::int32_t num_waiting() const {
    const std::lock_guard lock(mutex_);
    return num_waiting_ + static_cast<std::int32_t>(mail_.submitted.size());
  }

 private:
  template <typename Write>
  void Post(const Write& write) {
    const std::lock_guard lock(mutex_);
    write(mail_);
    changed_.notify_one();
  }

  mutable std::mutex mutex_;           // guards all below
  std::condition_variable changed_;    // mail_
  std::condition_variable step_done_;  // apart, so that mail does not wake an engine that waits for its step
  Mail mail_;
  std::int32_t num_waiting_ = 0;
  int num_steps_done_ = 0;  // not awaited yet
  bool is_closed_ = false;
};

}  // namespace spillway
