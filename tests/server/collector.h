#pragma once

// Listens to one generation and checks the order of what it hears.

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "server/service.h"

namespace spillway {

class Collector : public GenerationListener {
 public:
  struct Choice {
    std::string text;
    std::vector<SampledToken> tokens;
    std::optional<OutputFinish> finish;
    int num_chunks = 0;
  };

  void OnPrompt(const PromptInfo& prompt) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(has_prompt_ || is_done_);
    has_prompt_ = true;
    prompt_ = prompt;
    changed_.notify_all();
  }
  void OnChunk(OutputChunk chunk) override {
    const std::lock_guard lock(mutex_);
    EXPECT_TRUE(has_prompt_ && !is_done_);
    Choice& choice = choices_[chunk.index];
    EXPECT_FALSE(choice.finish);
    choice.text += chunk.text;
    choice.tokens.insert(choice.tokens.end(), chunk.tokens.begin(), chunk.tokens.end());
    choice.finish = std::move(chunk.finish);
    ++choice.num_chunks;
    changed_.notify_all();
  }
  void OnDone(const absl::Status& status) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(is_done_);
    is_done_ = true;
    status_ = absl::Status(status.code(), status.message());  // not shared with the thread that made it
    field_ = FieldOf(status).value_or("");
    for (const auto& [index, choice] : choices_) {
      if (status.ok()) {
        EXPECT_TRUE(choice.finish) << "choice " << index;
      }
    }
    changed_.notify_all();
  }

  const absl::Status& Await() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return is_done_; });
    return status_;
  }
  // Returns early if it is done.
  void AwaitTokens(std::int32_t choice, std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return is_done_ || choices_[choice].tokens.size() >= count; });
  }
  void AwaitPrompt() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return has_prompt_; });
  }
  bool is_done() const {
    const std::lock_guard lock(mutex_);
    return is_done_;
  }
  bool has_prompt() const { return has_prompt_; }  // once done
  const std::string& field() const { return field_; }
  const PromptInfo& prompt() const { return prompt_; }
  const Choice& choice(std::int32_t index = 0) { return choices_[index]; }
  std::size_t num_choices() const { return choices_.size(); }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool has_prompt_ = false;
  bool is_done_ = false;
  absl::Status status_;
  std::string field_;
  PromptInfo prompt_;
  std::map<std::int32_t, Choice> choices_;
};

}  // namespace spillway
