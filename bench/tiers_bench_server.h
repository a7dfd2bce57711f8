#pragma once

// An engine on the cpu device over a host tier of its own or none, and the sessions that ask it.

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench/tiers_bench.h"
#include "bench/waiter.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"

namespace spillway::tiers_bench {

inline constexpr std::int32_t kPromptTokens = 1024;
inline constexpr std::int32_t kOutputTokens = 8;
inline constexpr std::int64_t kFourSessions = 4 * (kPromptTokens / kBlockTokens) + 8;  // blocks
inline constexpr double kPacedBytesPerSecond = 500e6;

// Seconds of the steps that prefill nothing.
class StepTimes : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    const std::lock_guard lock(mutex_);
    if (report.num_prefill_tokens == 0) decode_.push_back(report.seconds);
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

  std::vector<double> Take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(decode_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<double> decode_;
};

struct Setup {
  std::string folder;
  std::int64_t device_blocks = kFourSessions;
  std::uint32_t host_blocks = 0;  // 0: no tier
  double link_bytes_per_second = 0;
  LayerLoads layer_loads = LayerLoads::kHidden;
  std::int32_t max_step_tokens = EngineOptions().max_num_batched_tokens;
};

class Server {
 public:
  explicit Server(const Setup& setup) : device_(*MakeCpuDevice({})) {
    std::unique_ptr<Model> model =
        *Model::Load(setup.folder, DTypeChoice::kAuto, Quantization::kNone, *device_, nullptr);
    block_bytes_ = model->kv_layout().block_bytes();
    host_ = MakeNullHostTier();
    if (setup.host_blocks > 0) {
      host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, setup.host_blocks * block_bytes_),
                           {.block_bytes = block_bytes_, .num_blocks = setup.host_blocks});
    }
    EngineOptions options;
    options.kv_cache_bytes = setup.device_blocks * static_cast<std::int64_t>(block_bytes_);
    options.max_model_len = 2 * kPromptTokens;
    options.host_tier = host_.get();
    options.link_bytes_per_second = setup.link_bytes_per_second;
    options.layer_loads = setup.layer_loads;
    options.max_num_batched_tokens = setup.max_step_tokens;
    engine_ = *Engine::Make(*device_, std::move(model), options, &steps_);
  }

  struct Answer {
    double first_token_seconds = 0;
    std::int32_t cached = 0;
    std::vector<std::int32_t> tokens;
  };
  Answer Ask(std::vector<std::int32_t> prompt, std::int32_t max_tokens = kOutputTokens) {
    auto waiter = std::make_shared<Waiter>();
    std::vector<SequenceRequest> one(1);
    one[0].id = next_id_++;
    one[0].prompt = std::move(prompt);
    one[0].sampling.temperature = 0;
    one[0].sampling.max_tokens = max_tokens;
    one[0].sampling.ignore_eos = true;
    one[0].sink = waiter;
    const double submitted = Now();
    SPILLWAY_CHECK(engine_->Submit(std::move(one)).ok());
    waiter->Await();
    return {waiter->first_token_at() - submitted, waiter->cached, waiter->tokens};
  }
  // Until everything published so far is in the host tier.
  void AwaitStores() const {
    while (engine_->status().num_running > 0 || engine_->status().unstored_blocks > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
  EngineStatus status() const { return engine_->status(); }
  TierStats tier() const { return host_->stats(); }
  std::size_t block_bytes() const { return block_bytes_; }
  std::vector<double> TakeDecodeSteps() { return steps_.Take(); }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostTier> host_;
  StepTimes steps_;
  std::size_t block_bytes_ = 0;
  std::unique_ptr<Engine> engine_;
  std::uint64_t next_id_ = 1;
};

inline std::vector<std::int32_t> PromptOf(int session, int length = kPromptTokens) {
  std::vector<std::int32_t> prompt(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<std::int32_t>((i * 7919 + static_cast<std::size_t>(session) * 104729 + (i >> 3)) % 280);
  }
  return prompt;
}

}  // namespace spillway::tiers_bench
