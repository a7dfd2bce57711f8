#pragma once

// Replay: a trace through the same Scheduler and KvStore bookkeeping that serve, on a virtual clock that CostModel
// advances instead of kernels and copies. It moves no bytes and computes nothing; every number is modelled.
//
// Deterministic: the same trace, model and options give the same result. One thread.

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cost_model.h"
#include "engine/scheduler.h"
#include "engine/trace.h"
#include "engine/virtual_link.h"

namespace spillway {

enum class Routing : std::uint8_t { kRoundRobin, kPrefix };

struct ReplayOptions {
  Scheduler::Options scheduling;
  std::uint32_t device_blocks = 0;  // of each replica
  std::uint32_t host_blocks = 0;    // of each replica; 0: no host tier
  VirtualLink::Lanes lanes = VirtualLink::Lanes::kTwo;
  std::int32_t replicas = 1;
  Routing routing = Routing::kRoundRobin;
  double time_scale = 1;   // arrivals come this many times as fast
  std::int32_t vocab = 0;  // see PromptOf
};

// Seconds since the first arrival.
struct ReplayedRequest {
  double arrived = 0;
  double first_token = 0;
  double finished = 0;
  std::int32_t replica = 0;
  std::int32_t prompt_tokens = 0;
  std::int32_t output_tokens = 0;
  std::int32_t cached_tokens = 0;        // of the prompt, found in any tier
  std::int32_t cached_below_tokens = 0;  // of these, restored
  bool is_refused = false;               // longer than a replica's device tier; nothing else is set
};

struct ReplayResult {
  std::vector<ReplayedRequest> requests;   // in the trace's order
  std::vector<float> inter_token_seconds;  // of all requests
  double seconds = 0;                      // until the last token
  // Summed over replicas, as are all below.
  double compute_seconds = 0;  // in which a step ran
  double restore_seconds = 0;  // in which blocks came up
  double store_seconds = 0;
  std::int64_t num_steps = 0;
  std::int64_t num_preempted = 0;
  bool is_overloaded = false;  // the backlog grew: waiting times say how long the trace is, not how good the machine
};

// `progress` (may be null) hears requests done and in total. INVALID_ARGUMENT names the option.
absl::StatusOr<ReplayResult> RunReplay(const Trace& trace, const CostModel& model, const ReplayOptions& options,
                                       const std::function<void(std::int64_t done, std::int64_t total)>& progress);

}  // namespace spillway
