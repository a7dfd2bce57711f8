#pragma once

// Waiter: waits for one sequence of a benchmark, and notes its tokens and when they came.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "absl/status/status.h"
#include "engine/request.h"
#include "kernels/check.h"

namespace spillway {

inline double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The engine's thread writes; read after Await. A sequence that fails ends the benchmark.
class Waiter : public TokenSink {
 public:
  void OnScheduled(std::int32_t num_cached) override { cached = num_cached; }
  void OnToken(const SampledToken& token) override {
    tokens.push_back(token.token);
    times.push_back(Now());
  }
  void OnFinish(const Finish&) override {
    const std::lock_guard lock(mutex_);
    ended_at = Now();
    is_done_ = true;
    ended_.notify_one();
  }
  void OnError(const absl::Status& status) override { SPILLWAY_CHECK(false) << status; }
  void Await() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return is_done_; });
  }

  double first_token_at() const { return times.front(); }
  double first_token_seconds() const { return first_token_at() - submitted_at; }

  std::vector<std::int32_t> tokens;
  std::vector<double> times;  // of the tokens
  std::int32_t cached = 0;
  double submitted_at = 0;  // by whoever submits
  double ended_at = 0;

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  bool is_done_ = false;
};

}  // namespace spillway
