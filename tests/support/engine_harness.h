#pragma once

// Runs requests through an Engine and collects what their sinks hear. For tests.

#include <atomic>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/model.h"
#include "gtest/gtest.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"

namespace spillway::testing {

struct Collected {
  std::vector<SampledToken> tokens;
  std::int32_t num_cached = 0;
  std::optional<Finish> finish;
  absl::Status error;

  std::vector<std::int32_t> ids() const {
    std::vector<std::int32_t> out;
    for (const SampledToken& token : tokens) out.push_back(token.token);
    return out;
  }
  std::vector<std::uint64_t> hashes() const {
    std::vector<std::uint64_t> out;
    for (const SampledToken& token : tokens) out.push_back(token.logits_hash);
    return out;
  }
};

class CollectingSink : public TokenSink {
 public:
  void OnScheduled(std::int32_t num_cached) override { collected_.num_cached = num_cached; }
  void OnToken(const SampledToken& token) override {
    collected_.tokens.push_back(token);
    if (on_token) on_token(collected_);
  }
  void OnFinish(const Finish& finish) override {
    collected_.finish = finish;
    done_.set_value(collected_);
  }
  void OnError(const absl::Status& status) override {
    collected_.error = status;
    done_.set_value(collected_);
  }
  std::future<Collected> Result() { return done_.get_future(); }

  std::function<void(const Collected&)> on_token;  // on the engine thread

 private:
  Collected collected_;
  std::promise<Collected> done_;
};

inline std::uint64_t NextId() {
  static std::atomic<std::uint64_t> next{1};
  return next.fetch_add(1);
}

inline SequenceRequest MakeRequest(std::vector<std::int32_t> prompt, std::int32_t max_tokens) {
  SequenceRequest request;
  request.id = NextId();
  request.prompt = std::move(prompt);
  request.sampling.temperature = 0;
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

// A device, a model on it and an engine; torn down in order.
struct Rig {
  std::unique_ptr<Device> device;
  std::unique_ptr<HostTier> host;  // where one was asked for
  std::unique_ptr<Engine> engine;

  using MakeHost = std::function<std::unique_ptr<HostTier>(Device&, const KvLayout&)>;

  static Rig Make(const std::string& folder, EngineOptions options, const CpuDeviceOptions& device_options = {},
                  DTypeChoice dtype = DTypeChoice::kAuto, EngineObserver* observer = nullptr,
                  const MakeHost& make_host = nullptr, Quantization quantization = Quantization::kNone) {
    Rig rig;
    absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice(device_options);
    SPILLWAY_CHECK(device.ok()) << device.status();
    rig.device = *std::move(device);
    absl::StatusOr<std::unique_ptr<Model>> model = Model::Load(folder, dtype, quantization, *rig.device, nullptr);
    SPILLWAY_CHECK(model.ok()) << model.status();
    if (options.max_model_len == 0) options.max_model_len = (*model)->config().max_positions;
    if (options.kv_cache_bytes == 0) options.kv_cache_bytes = 64LL << 20;
    if (make_host) {
      rig.host = make_host(*rig.device, (*model)->kv_layout());
      options.host_tier = rig.host.get();
    }
    absl::StatusOr<std::unique_ptr<Engine>> engine = Engine::Make(*rig.device, *std::move(model), options, observer);
    SPILLWAY_CHECK(engine.ok()) << engine.status();
    rig.engine = *std::move(engine);
    return rig;
  }

  // kv_cache_bytes for a pool of so many blocks of `folder`'s model.
  static std::int64_t BlockBytes(const std::string& folder, DTypeChoice dtype = DTypeChoice::kAuto) {
    absl::StatusOr<ModelConfig> config = ReadModelConfig(folder);
    SPILLWAY_CHECK(config.ok()) << config.status();
    const bool is_bf16 =
        dtype == DTypeChoice::kBFloat16 || (dtype == DTypeChoice::kAuto && config->weight_dtype == DType::kBF16);
    const KvLayout layout{.num_layers = config->num_layers,
                          .num_kv_heads = config->num_kv_heads,
                          .head_dim = config->head_dim,
                          .dtype = is_bf16 ? DType::kBF16 : DType::kF32};
    return static_cast<std::int64_t>(layout.block_bytes());
  }

  // Submits all at once and waits for all.
  std::vector<Collected> Run(std::vector<SequenceRequest> requests) {
    std::vector<std::future<Collected>> results;
    for (SequenceRequest& request : requests) {
      auto sink = std::make_shared<CollectingSink>();
      results.push_back(sink->Result());
      request.sink = std::move(sink);
    }
    const absl::Status status = engine->Submit(std::move(requests));
    SPILLWAY_CHECK(status.ok()) << status;
    std::vector<Collected> collected;
    collected.reserve(results.size());
    for (auto& result : results) collected.push_back(result.get());
    return collected;
  }
  Collected RunOne(SequenceRequest request) {
    std::vector<SequenceRequest> one;
    one.push_back(std::move(request));
    return Run(std::move(one)).front();
  }
};

}  // namespace spillway::testing
