#pragma once

// A seeded Llama on the cpu device over a host tier, its link paced: what the scheduling benchmarks share. The host
// tier outlives the engines that are made over it, so that prompts are computed and stored once, and every engine
// begins with an empty device tier.

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench/waiter.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway {

// Seconds in which a step ran.
class StepSeconds : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override { total += report.seconds; }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}
  double total = 0;  // engine thread; read after its sequences have ended
};

struct BenchRequest {
  std::vector<std::int32_t> prompt;
  bool is_fresh = false;  // computed whatever is cached
};

class PacedRig {
 public:
  PacedRig(const RandomLlamaOptions& model, std::uint32_t host_blocks)
      : folder_(std::filesystem::temp_directory_path() / ("spillway_paced_rig_" + std::to_string(::getpid()))),
        device_(*MakeCpuDevice({})) {
    std::filesystem::create_directories(folder_);
    SPILLWAY_CHECK(WriteRandomLlama(folder_, model).ok());
    block_bytes_ = LoadModel()->kv_layout().block_bytes();
    host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, host_blocks * block_bytes_),
                         {.block_bytes = block_bytes_, .num_blocks = host_blocks});
  }
  ~PacedRig() { std::filesystem::remove_all(folder_); }

  std::unique_ptr<Engine> MakeEngine(EngineOptions options, std::int64_t device_blocks, EngineObserver* observer) {
    options.kv_cache_bytes = device_blocks * static_cast<std::int64_t>(block_bytes_);
    options.host_tier = host_.get();
    return *Engine::Make(*device_, LoadModel(), options, observer);
  }

  // Until nothing runs and every published block has been written through.
  static void AwaitWriteThrough(const Engine& engine) {
    while (true) {
      const EngineStatus status = engine.status();
      if (status.num_running == 0 && status.num_waiting == 0 && status.unstored_blocks == 0) return;
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  // Computes each prompt once and waits until the host tier has its full blocks.
  void Store(const std::vector<std::vector<std::int32_t>>& prompts, const EngineOptions& options,
             std::int64_t device_blocks) {
    std::unique_ptr<Engine> engine = MakeEngine(options, device_blocks, nullptr);
    for (const std::vector<std::int32_t>& prompt : prompts) {
      Submit(*engine, {{.prompt = prompt}}, 1).front()->Await();
      AwaitWriteThrough(*engine);
    }
  }

  // All at once, in order.
  static std::vector<std::shared_ptr<Waiter>> Submit(Engine& engine, const std::vector<BenchRequest>& wanted,
                                                     std::int32_t num_outputs) {
    static std::uint64_t next_id = 1;
    std::vector<std::shared_ptr<Waiter>> waiters;
    std::vector<SequenceRequest> requests;
    for (const BenchRequest& each : wanted) {
      waiters.push_back(std::make_shared<Waiter>());
      SequenceRequest request;
      request.id = next_id++;
      request.prompt = each.prompt;
      request.bypass_prefix_cache = each.is_fresh;
      request.sampling.temperature = 0;
      request.sampling.max_tokens = num_outputs;
      request.sampling.ignore_eos = true;
      request.sink = waiters.back();
      requests.push_back(std::move(request));
    }
    const double now = Now();
    for (const auto& waiter : waiters) waiter->submitted_at = now;
    SPILLWAY_CHECK(engine.Submit(std::move(requests)).ok());
    return waiters;
  }

  std::size_t block_bytes() const { return block_bytes_; }
  HostTier& host() { return *host_; }

 private:
  std::unique_ptr<Model> LoadModel() {
    return *Model::Load(folder_, DTypeChoice::kAuto, Quantization::kNone, *device_, nullptr);
  }

  const std::string folder_;
  std::unique_ptr<Device> device_;
  std::size_t block_bytes_ = 0;
  std::unique_ptr<HostTier> host_;
};

}  // namespace spillway
