#pragma once

// Service: what both front ends stand on. It validates, tokenizes on its own threads, submits, turns tokens into text
// (stop strings, held-back text), cancels, drains. No transport, no inference.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "engine/tokenizer.h"

namespace spillway {

struct ServiceOptions {
  std::vector<std::string> model_names;   // the served name and its aliases; the first is reported
  int num_threads = 2;                    // tokenizing, detokenizing
  int max_choices = 128;                  // n
  bool takes_generation_defaults = true;  // those of the model's generation_config.json
  bool cache_salt_by_tenant = false;      // prefix-cache entries are shared within a tenant only
  std::size_t max_prompt_bytes = 16U << 20U;
  // A client that lets this much text wait is too slow: its generation is cancelled.
  std::size_t max_pending_bytes = 4U << 20U;
};

// Unset fields take the service's generation defaults, then the protocol's.
struct GenerationRequest {
  std::string request_id;  // unique among live ones; empty: the Service makes one
  std::string model;       // empty: the served one
  std::variant<std::string, std::vector<std::int32_t>> prompt;
  SpecialTokens special_tokens = SpecialTokens::kAdd;  // for a text prompt
  std::optional<double> temperature, top_p, min_p;
  std::optional<std::int64_t> top_k;  // -1 and 0 = all
  std::optional<std::int64_t> seed;
  std::optional<std::int64_t> max_tokens;  // unset: up to max_model_len
  std::int64_t min_tokens = 0;
  std::int64_t n = 1;
  std::vector<std::string> stop;
  std::vector<std::int64_t> stop_token_ids;
  bool include_stop_in_output = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  std::optional<std::int64_t> logprobs;                // the N most likely beside the sampled one
  std::optional<std::int64_t> truncate_prompt_tokens;  // keep the last N
  std::string cache_salt;
  bool bypass_prefix_cache = false;
  std::int64_t priority = 0;
  std::string tenant = "default";  // see TenantOf
};

struct PromptInfo {
  std::string request_id;
  std::vector<std::int32_t> tokens;
};

struct OutputFinish {
  FinishReason reason = FinishReason::kStop;
  std::variant<std::monostate, std::int32_t, std::string> stop;  // stop token id or stop string, where one ended it
  bool is_eos = false;
  std::int32_t num_output_tokens = 0;
  std::int32_t num_cached_tokens = 0;  // prompt tokens served from the prefix cache
};

// A piece of one choice. Text may lag behind tokens: what may begin a stop string, or is half a code point, is held
// back.
struct OutputChunk {
  std::int32_t index = 0;
  std::string text;
  std::vector<SampledToken> tokens;
  std::optional<OutputFinish> finish;  // the last chunk of this choice
};

// Called on Service threads, one call at a time for one generation, in order: OnPrompt once, chunks, OnDone once
// (last).
class GenerationListener {
 public:
  virtual ~GenerationListener() = default;
  virtual void OnPrompt(const PromptInfo& prompt) = 0;
  virtual void OnChunk(OutputChunk chunk) = 0;
  // OK after every choice has finished; else what went wrong (nothing else follows).
  virtual void OnDone(const absl::Status& status) = 0;
};

// A field that is wrong: the Status carries it, front ends report it (HTTP `param`).
absl::Status InvalidField(const std::string& field, const std::string& message);
std::optional<std::string> FieldOf(const absl::Status& status);

// One live generation. Dropping the handle does not cancel it.
class Generation {
 public:
  virtual ~Generation() = default;
  virtual const std::string& request_id() const = 0;
  virtual void Cancel() = 0;  // any thread, any number of times; choices end with kAborted, then OnDone(OK)
};

// Any thread. Outlived by the engine and the tokenizer.
class Service {
 public:
  static std::unique_ptr<Service> Make(Engine& engine, const Tokenizer& tokenizer, const ServiceOptions& options);
  virtual ~Service() = default;

  // Cheap checks at once, the rest (tokenizing, submitting) on a Service thread: its errors arrive by OnDone before
  // OnPrompt.
  //   INVALID_ARGUMENT (with field)  a bad parameter      NOT_FOUND  unknown model      OUT_OF_RANGE  over-long prompt
  //   RESOURCE_EXHAUSTED  queue full      ALREADY_EXISTS  request_id is live      UNAVAILABLE  draining, or engine dead
  virtual std::shared_ptr<Generation> Start(GenerationRequest request,
                                            std::shared_ptr<GenerationListener> listener) = 0;

  // Cancels every choice of a live request by its id; unknown ids are ignored.
  virtual void Abort(const std::string& request_id) = 0;

  virtual absl::Status CheckModel(const std::string& model) const = 0;  // NOT_FOUND names what is served
  // Runs `work` on a Service thread (tokenize, detokenize, chat templates).
  virtual void Post(std::function<void()> work) = 0;

  virtual bool is_ready() const = 0;  // engine alive and not draining
  virtual bool is_alive() const = 0;  // engine alive
  virtual std::int64_t num_live() const = 0;

  // Refuses new work from now on and waits until all generations are done or `deadline` passed; then aborts the rest.
  virtual void Drain(absl::Time deadline) = 0;
  // Ends every generation with `status`, without the engine's help (it may be stalled).
  virtual void FailAll(const absl::Status& status) = 0;

  virtual Engine& engine() = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const ServiceOptions& options() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;  // of fields that a request leaves unset
};

}  // namespace spillway
