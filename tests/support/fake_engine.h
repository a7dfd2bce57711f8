#pragma once

// An engine without a model: its own thread, tokens from a script, and hooks to hold, fail or stall it.

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "tests/support/fake_model.h"

namespace spillway {

class FakeEngine : public Engine {
 public:
  explicit FakeEngine(FakeEngineOptions options)
      : options_(std::move(options)), model_(options_.defaults), is_open_(options_.gate_is_open) {
    thread_ = std::thread([this] { Run(); });
  }
  ~FakeEngine() override {
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  absl::Status Submit(std::vector<SequenceRequest> requests) override {
    const std::lock_guard lock(mutex_);
    if (!failure_.ok()) return failure_;
    const EngineOptions& limits = options_.engine;
    for (const SequenceRequest& request : requests) {
      const auto length = static_cast<std::int64_t>(request.prompt.size()) + request.sampling.max_tokens;
      if (length > limits.max_model_len) {
        return absl::OutOfRangeError(absl::StrCat(length, " tokens exceed max_model_len ", limits.max_model_len));
      }
    }
    const auto room = static_cast<std::size_t>(limits.max_num_seqs + limits.max_queued_requests);
    if (num_live_ + requests.size() > room) return absl::ResourceExhaustedError("the queue is full");
    num_live_ += requests.size();
    for (SequenceRequest& request : requests) {
      submitted_.push_back(request);
      submitted_.back().sink = nullptr;
      waiting_.push_back(Sequence{std::move(request), 0, false});
    }
    changed_.notify_all();
    return absl::OkStatus();
  }

  void Cancel(std::uint64_t id) override {
    const std::lock_guard lock(mutex_);
    cancelled_.insert(id);
    changed_.notify_all();
  }

  EngineStatus status() const override {
    const std::lock_guard lock(mutex_);
    EngineStatus status;
    status.num_running = static_cast<std::int32_t>(num_running_);
    status.num_waiting = static_cast<std::int32_t>(num_live_ - num_running_);
    status.kv_blocks_total = 100;
    status.kv_usage = static_cast<double>(num_running_) / 100;
    status.cost_model = options_.cost_model;
    status.is_alive = failure_.ok() && !is_stalled_;
    status.failure = is_stalled_ ? "the engine has stalled" : std::string(failure_.message());
    return status;
  }
  const Model& model() const override { return model_; }
  const EngineOptions& options() const override { return options_.engine; }
  std::int64_t capacity_tokens() const override { return 1600; }
  bool ResetPrefixCache() override {
    const std::lock_guard lock(mutex_);
    ++num_resets_;
    return num_running_ == 0;
  }

  // Hooks. Any thread.
  void OpenGate() { Set(is_open_, true); }
  void CloseGate() { Set(is_open_, false); }
  void AllowSteps(int count) {
    const std::lock_guard lock(mutex_);
    allowed_steps_ += count;
    changed_.notify_all();
  }
  void Stall() { Set(is_stalled_, true); }  // does nothing any more, cancelling included
  void Resume() { Set(is_stalled_, false); }
  // Every sequence ends with `status`, and new ones are refused with it.
  void Fail(const absl::Status& status) { Set(failure_, status); }

  void AwaitLive(std::size_t count) {  // exactly this many are submitted and unfinished
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_live_ == count; });
  }
  void AwaitSubmitted(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return submitted_.size() >= count; });
  }
  std::vector<SequenceRequest> submitted() const {  // all so far, without their sinks
    const std::lock_guard lock(mutex_);
    return submitted_;
  }
  int num_resets() const {  // of the prefix cache
    const std::lock_guard lock(mutex_);
    return num_resets_;
  }
  std::int64_t num_tokens() const {  // produced so far
    const std::lock_guard lock(mutex_);
    return num_tokens_;
  }

 private:
  struct Sequence {
    SequenceRequest request;
    std::int32_t num_tokens = 0;
    bool is_done = false;
  };

  template <typename Field>
  void Set(Field& field, const Field& value) {
    const std::lock_guard lock(mutex_);
    field = value;
    changed_.notify_all();
  }

  void Run() {
    std::unique_lock lock(mutex_);
    std::list<Sequence> running;  // touched by this thread alone
    while (true) {
      changed_.wait(lock, [&] {
        if (is_stopping_) return true;
        if (is_stalled_) return false;
        const bool has_room = running.size() < static_cast<std::size_t>(options_.engine.max_num_seqs);
        return !cancelled_.empty() || (!failure_.ok() && num_live_ > 0) || (has_room && !waiting_.empty()) ||
               (!running.empty() && (is_open_ || allowed_steps_ > 0));
      });
      std::list<Sequence> begun;
      while (!waiting_.empty() &&
             running.size() + begun.size() < static_cast<std::size_t>(options_.engine.max_num_seqs)) {
        begun.splice(begun.end(), waiting_, waiting_.begin());
      }
      std::list<Sequence> ended;  // without having run
      const absl::Status failure = is_stopping_ ? absl::OkStatus() : failure_;
      const bool ends_all = is_stopping_ || !failure.ok();
      const std::set<std::uint64_t> cancelled = std::exchange(cancelled_, {});
      for (auto it = waiting_.begin(); it != waiting_.end();) {
        const auto next = std::next(it);
        if (ends_all || cancelled.contains(it->request.id)) ended.splice(ended.end(), waiting_, it);
        it = next;
      }
      const bool stops = is_stopping_;
      const bool steps = !ends_all && (is_open_ || allowed_steps_ > 0) && !(running.empty() && begun.empty());
      if (steps && !is_open_) --allowed_steps_;
      num_running_ = running.size() + begun.size();
      lock.unlock();
      for (Sequence& sequence : begun) sequence.request.sink->OnScheduled(options_.num_cached);
      running.splice(running.end(), begun);
      std::int32_t num_generated = 0;
      for (Sequence& sequence : running) {
        if (ends_all || cancelled.contains(sequence.request.id)) {
          End(sequence, failure);
        } else if (steps) {
          ++num_generated;
          Produce(sequence);
        }
      }
      for (Sequence& sequence : ended) End(sequence, failure);
      const auto num_ended =
          running.remove_if([](const Sequence& sequence) { return sequence.is_done; }) + ended.size();
      if (steps && options_.observer != nullptr) {
        options_.observer->OnStep({.seconds = 0.01, .num_tokens = num_generated, .num_generated = num_generated});
      }
      ended.clear();
      lock.lock();
      num_running_ = running.size();
      num_live_ -= num_ended;
      num_tokens_ += num_generated;
      changed_.notify_all();
      if (stops && running.empty() && waiting_.empty()) return;
    }
  }

  void Produce(Sequence& sequence);
  void End(Sequence& sequence, const absl::Status& failure) {
    sequence.is_done = true;
    if (!failure.ok()) return sequence.request.sink->OnError(failure);
    sequence.request.sink->OnFinish({.reason = FinishReason::kAborted, .stop_token = std::nullopt});
    Report(sequence, FinishReason::kAborted);
  }
  void Report(const Sequence& sequence, FinishReason reason) {
    if (options_.observer == nullptr) return;
    options_.observer->OnSequenceDone({.reason = reason,
                                       .prompt_tokens = static_cast<std::int32_t>(sequence.request.prompt.size()),
                                       .cached_tokens = options_.num_cached,
                                       .generated_tokens = sequence.num_tokens,
                                       .max_tokens = sequence.request.sampling.max_tokens});
  }

  const FakeEngineOptions options_;
  const FakeModel model_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::list<Sequence> waiting_;
  std::set<std::uint64_t> cancelled_;
  std::vector<SequenceRequest> submitted_;
  std::size_t num_live_ = 0;
  std::size_t num_running_ = 0;
  std::int64_t num_tokens_ = 0;
  std::int64_t allowed_steps_ = 0;
  int num_resets_ = 0;
  absl::Status failure_;
  bool is_open_;
  bool is_stalled_ = false;
  bool is_stopping_ = false;
  std::thread thread_;
};

inline void FakeEngine::Produce(Sequence& sequence) {
  const SamplingParams& sampling = sequence.request.sampling;
  const auto ends_it = [&](std::int32_t token) {
    return (token == kFakeEos && !sampling.ignore_eos) || std::ranges::count(sampling.stop_token_ids, token) > 0;
  };
  SampledToken sampled;
  sampled.token = options_.script(sequence.request, sequence.num_tokens);
  if (sequence.num_tokens < sampling.min_tokens && ends_it(sampled.token)) sampled.token = '.';  // banned
  if (sampling.num_logprobs >= 0) {
    sampled.logprob = -0.25F * static_cast<float>(1 + sequence.num_tokens % 8);
    sampled.rank = 1;
    for (int rank = 1; rank <= sampling.num_logprobs; ++rank) {
      sampled.top.push_back(
          {(sampled.token + rank - 1) % kFakeVocab, sampled.logprob - 0.5F * static_cast<float>(rank - 1), rank});
    }
  }
  if (++sequence.num_tokens == 1 && options_.observer != nullptr) options_.observer->OnFirstToken(0.01);
  sequence.request.sink->OnToken(sampled);
  Finish finish;
  if (ends_it(sampled.token)) {
    finish = {FinishReason::kStop, sampled.token, sampled.token == kFakeEos && !sampling.ignore_eos};
  } else if (sequence.num_tokens == sampling.max_tokens) {
    finish = {FinishReason::kLength, std::nullopt, false};
  } else {
    return;
  }
  sequence.is_done = true;
  sequence.request.sink->OnFinish(finish);
  Report(sequence, finish.reason);
}

}  // namespace spillway
