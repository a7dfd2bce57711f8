#pragma once

// How a FakeEngine is set up: what it says about its model, and scripts of the tokens it "generates".

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/model.h"
#include "engine/request.h"
#include "tests/support/fake_tokenizer.h"

namespace spillway {

class FakeModel : public Model {
 public:
  explicit FakeModel(GenerationDefaults defaults) : defaults_(std::move(defaults)) {
    config_.architecture = "FakeForCausalLM";
    config_.vocab = kFakeVocab;
    config_.bos_token = kFakeBos;
    config_.eos_tokens = {kFakeEos};
  }
  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  DType dtype() const override { return DType::kF32; }
  KvLayout kv_layout() const override { return {}; }
  std::size_t weight_bytes() const override { return 0; }
  absl::Status Reserve(std::int64_t, std::int64_t) override { return absl::OkStatus(); }
  const float* Forward(Stream&, const StepArrays&, const KvView&) override { return nullptr; }

 private:
  ModelConfig config_;
  GenerationDefaults defaults_;
};

// The token at `index` of a sequence's output.
using TokenScript = std::function<std::int32_t(const SequenceRequest& request, int index)>;

// Letters that depend on prompt, choice and index; never ends by itself.
inline std::int32_t LetterScript(const SequenceRequest& request, int index) {
  std::uint32_t hash = request.choice * 7U;
  for (const std::int32_t token : request.prompt) hash = hash * 31U + static_cast<std::uint32_t>(token);
  return 'a' + static_cast<std::int32_t>((hash + static_cast<std::uint32_t>(index) * 5U) % 26U);
}

// These tokens, then end of sequence.
inline TokenScript FixedScript(std::vector<std::int32_t> tokens) {
  return [tokens = std::move(tokens)](const SequenceRequest&, int index) {
    return static_cast<std::size_t>(index) < tokens.size() ? tokens[static_cast<std::size_t>(index)] : kFakeEos;
  };
}

inline TokenScript TextScript(std::string_view text) {
  std::vector<std::int32_t> tokens;
  for (const char byte : text) tokens.push_back(static_cast<unsigned char>(byte));
  return FixedScript(std::move(tokens));
}

inline EngineOptions FakeEngineLimits() {
  EngineOptions limits;
  limits.max_model_len = 4096;
  return limits;
}

struct FakeEngineOptions {
  EngineOptions engine = FakeEngineLimits();  // queue capacity: max_num_seqs + max_queued_requests live sequences
  TokenScript script = LetterScript;
  GenerationDefaults defaults{};
  std::int32_t num_cached = 0;  // reported by OnScheduled
  bool gate_is_open = true;     // closed: a step happens only as AllowSteps lets it
  EngineObserver* observer = nullptr;
  std::optional<CostModel> cost_model = std::nullopt;
};

}  // namespace spillway
