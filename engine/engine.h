#pragma once

// Engine: one model on one device, on one thread. Its mailbox is the only way in; TokenSinks are the way out.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/activation_recompute.h"
#include "engine/cost_model.h"
#include "engine/request.h"
#include "engine/scheduling_policy.h"
#include "kernels/device.h"
#include "kvstore/copy_stats.h"
#include "kvstore/lookup_stats.h"

namespace spillway {

class HostTier;
class Model;
struct Transfer;

struct EngineOptions {
  std::int64_t kv_cache_bytes = 0;                // device tier; must hold at least one block
  std::int32_t max_model_len = 0;                 // prompt + output of one sequence, tokens
  std::int32_t max_num_seqs = 256;                // sequences running at once
  std::int32_t max_num_batched_tokens = 2048;     // token budget of a step
  std::int32_t long_prefill_token_threshold = 0;  // most prefill tokens of one sequence in a step; 0 = the budget
  std::int32_t max_queued_requests = 4096;        // waiting sequences beyond those running
  SchedulingPolicy scheduling_policy = SchedulingPolicy::kFcfs;
  LoadChoice load_choice = LoadChoice::kLoad;
  bool enable_prefix_caching = true;
  bool overlap_steps = false;  // a step that only goes on with what runs is launched while the one before it runs
  bool hash_logits = false;    // identity tests: SampledToken.logits_hash is filled
  std::string prefix_hash_seed = "0";                // first parent of the key chain (vLLM: PYTHONHASHSEED)
  absl::Duration stall_timeout = absl::Seconds(60);  // a step that takes longer is a stall
  HostTier* host_tier = nullptr;                     // outlives the engine, shared by several; null: offloading off
  // Engines over host_tier: each may use its share of the slots for blocks that running sequences have there alone.
  std::int32_t num_engines = 1;
  // Those blocks are copied to the device, so many at a time, where kernels cannot read them in place, and where this
  // says so: benchmarks and tests.
  std::int32_t staging_blocks = 256;  // a multiple of kSegmentTokens / kBlockTokens
  bool stages_always = false;
  std::int32_t activation_recompute = kRecomputeOff;  // activation_recompute.h; else blocks at home are staged
  LayerLoads layer_loads = LayerLoads::kHidden;       // kNever where copies are capped, and on the cuda device
  double link_bytes_per_second = 0;  // paces copies to and from the host tier (LinkPacing); 0: not paced
  double link_latency_seconds = 0;
  double max_transfer_bytes_per_second = 0;                  // caps copies to and from the host tier; 0: no cap
  double calibration_seconds = 0.15;                         // of CalibrationOptions
  std::function<absl::Status(const Transfer&)> before_copy;  // fault injection for tests, see TransferOptions
};

// One step, reported on the engine thread.
struct StepReport {
  double seconds = 0;         // of an overlapped one: since the step before it was digested
  double plan_seconds = 0;    // until the step was planned,
  double launch_seconds = 0;  // to lay out its metadata and queue its work,
  double digest_seconds = 0;  // and after its results were back
  double idle_seconds = 0;  // of the device: from the last kernel of the step before, where work went on, to its first
  bool is_overlapped = false;   // planned and launched while the step before it ran
  std::int32_t num_tokens = 0;  // rows computed
  std::int32_t num_prefill_tokens = 0;
  std::int32_t num_generated = 0;
  std::int32_t num_preempted = 0;
};

// One finished sequence.
struct SequenceReport {
  FinishReason reason = FinishReason::kStop;
  bool failed = false;
  std::int32_t prompt_tokens = 0;
  std::int32_t cached_tokens = 0;        // of the prompt, found in any tier
  std::int32_t cached_below_tokens = 0;  // of these, restored from below the device tier
  std::int32_t generated_tokens = 0;
  std::int32_t max_tokens = 0;
  double queue_seconds = 0;        // submitted -> first scheduled
  double first_token_seconds = 0;  // submitted -> first token; 0 if none
  double prefill_seconds = 0;      // first scheduled -> first token
  double decode_seconds = 0;       // first token -> last token
  double total_seconds = 0;        // submitted -> finished
  double kappa = 0;                // tokens restored / prompt tokens computed
  double link_overhead = 0;        // P_OH: predicted seconds of the restore / of the prefill
};

// Called on the engine thread; must not block. Metrics implements it.
class EngineObserver {
 public:
  virtual ~EngineObserver() = default;
  virtual void OnStep(const StepReport& report) = 0;
  // Of the device tier, when a sequence is first admitted; then of the tiers below it.
  virtual void OnPrefixQuery(std::int64_t queried_tokens, std::int64_t hit_tokens) = 0;
  virtual void OnPrefixQueryBelow(std::int64_t /*queried_tokens*/, std::int64_t /*hit_tokens*/) {}
  virtual void OnFirstToken(double seconds_since_submit) = 0;
  virtual void OnInterToken(double seconds) = 0;
  virtual void OnSequenceDone(const SequenceReport& report) = 0;
};

// A snapshot; any thread.
struct EngineStatus {
  std::int32_t num_running = 0;
  std::int32_t num_waiting = 0;
  std::int64_t kv_blocks_total = 0;
  std::int64_t kv_blocks_used = 0;    // held by sequences
  std::int64_t kv_blocks_cached = 0;  // held by none, findable
  double kv_usage = 0;                // used / total
  std::int64_t restored_blocks = 0;   // from the host tier to the device, since start
  std::int64_t restored_bytes = 0;
  double restore_seconds = 0;
  std::int64_t stored_blocks = 0;  // from the device to the host tier
  std::int64_t stored_bytes = 0;
  std::int64_t unstored_blocks = 0;  // published, their write-through not done yet
  double store_seconds = 0;
  CopySizes restore_copies{};  // the same, by the size of a copy
  CopySizes store_copies{};
  BatchSizes store_batches{};
  std::int64_t restoring_blocks = 0;  // on their way up now
  std::int64_t storing_blocks = 0;    // on their way down
  LookupStats lookups;                // of prefixes in lower tiers
  std::int64_t evicted_blocks = 0;    // forgotten by the device tier for others, since start
  std::int64_t home_blocks = 0;       // host slots that running sequences hold
  std::int64_t home_blocks_max = 0;   // 0: sequences do not exceed the device tier
  std::int64_t moved_home_bytes = 0;
  double move_home_seconds = 0;
  std::int64_t home_buffer_bytes = 0;     // reserved on the device to attend to home blocks
  std::int64_t streamed_bytes = 0;        // of home blocks and kept inputs, that attention has read
  std::int64_t kept_input_slots = 0;      // host slots with layer inputs of running sequences
  std::int64_t kept_input_slots_max = 0;  // 0: they are not kept
  std::int64_t projected_tokens = 0;      // whose keys and values were projected from kept inputs, of all steps
  double compute_seconds = 0;             // in which a step ran, since start
  std::optional<CostModel> cost_model;    // as of the last step; nullopt: an engine that has none
  bool is_alive = true;                   // false: stopped, failed or stalled beyond stall_timeout
  std::string failure;                    // why, where it is not
};

class Engine {
 public:
  // `device` and `observer` (may be null) outlive the engine. Allocates everything and starts the thread.
  static absl::StatusOr<std::unique_ptr<Engine>> Make(Device& device, std::unique_ptr<Model> model,
                                                      const EngineOptions& options, EngineObserver* observer);
  virtual ~Engine() = default;  // cancels what runs, joins the thread

  // All or none. Any thread; never blocks for long. On error no sink is called.
  //   RESOURCE_EXHAUSTED  the queue is full
  //   OUT_OF_RANGE        can never fit: names the lengths and the limit
  //   UNAVAILABLE         the engine has stopped or failed
  virtual absl::Status Submit(std::vector<SequenceRequest> requests) = 0;

  // The sequence ends with kAborted within one step, its blocks freed. Unknown or finished ids are ignored. Any thread.
  virtual void Cancel(std::uint64_t id) = 0;

  virtual EngineStatus status() const = 0;  // any thread
  virtual const Model& model() const = 0;
  virtual const EngineOptions& options() const = 0;
  virtual std::int64_t capacity_tokens() const = 0;  // of the device tier

  // Drops every cached block that no sequence holds; false if sequences were running (their blocks stay findable).
  virtual bool ResetPrefixCache() = 0;
};

}  // namespace spillway
