#pragma once

// What crosses between front ends and the engine: plain values and the sink that receives tokens.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/kernels.h"
#include "kvstore/block_key.h"

namespace spillway {

// Validated by the caller (Service); ranges as stated.
struct SamplingParams {
  float temperature = 1;         // 0 = greedy
  float top_p = 1;               // (0, 1]
  float min_p = 0;               // [0, 1]
  std::int32_t top_k = 0;        // 0 = all
  std::uint64_t seed = 0;        // already drawn where the client gave none
  std::int32_t max_tokens = 16;  // >= 1; prompt + max_tokens <= max_model_len
  std::int32_t min_tokens = 0;   // <= max_tokens; end and stop tokens are banned before it
  bool ignore_eos = false;
  std::vector<std::int32_t> stop_token_ids;  // beside the model's end-of-sequence tokens
  std::int32_t num_logprobs = -1;            // -1 = none, 0 = the sampled token's only, at most kMaxLogprobs
};

enum class FinishReason : std::uint8_t { kStop, kLength, kAborted };

struct LogprobEntry {
  std::int32_t token = 0;
  float logprob = 0;
  std::int32_t rank = 0;
};

struct SampledToken {
  std::int32_t token = 0;
  float logprob = 0;      // where num_logprobs >= 0
  std::int32_t rank = 0;  // 1 = most likely
  std::vector<LogprobEntry> top{};
  std::uint64_t logits_hash = 0;  // where EngineOptions.hash_logits
};

struct Finish {
  FinishReason reason = FinishReason::kStop;
  // The token that ended it (end-of-sequence or a stop id; it is the last one reported), else none.
  std::optional<std::int32_t> stop_token{};
  bool is_eos = false;
};

// Receives one sequence's tokens, in order, on the engine thread: it must not block and must not call the engine back.
// Exactly one OnFinish or OnError ends it. Shared: the engine keeps it until then.
class TokenSink {
 public:
  virtual ~TokenSink() = default;
  // The first call that concerns a sequence; `num_cached` prompt tokens were served from the prefix cache.
  virtual void OnScheduled(std::int32_t num_cached) = 0;
  virtual void OnToken(const SampledToken& token) = 0;
  virtual void OnFinish(const Finish& finish) = 0;
  virtual void OnError(const absl::Status& status) = 0;
};

// One sequence to generate. A client's n choices are n of these, submitted together; they share prompt blocks.
struct SequenceRequest {
  std::uint64_t id = 0;              // unique in the process; names it in Cancel
  std::uint32_t choice = 0;          // 0 .. n-1
  std::vector<std::int32_t> prompt;  // >= 1 token, all within the vocabulary
  SamplingParams sampling;
  std::string cache_salt;  // prefix-cache entries are shared only within one salt
  // Of the prompt's full blocks; Engine::Submit makes them where there are none, on its caller's thread.
  std::vector<BlockKey> prompt_keys;
  bool bypass_prefix_cache = false;  // matches nothing; still publishes
  std::string tenant;                // whose share of the link its loads count against
  std::int32_t priority = 0;         // lower = earlier, under SchedulingPolicy::kPriority
  std::shared_ptr<TokenSink> sink;
};

}  // namespace spillway
