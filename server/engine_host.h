#pragma once

// All that stands below the front ends, built from Options: devices, tokenizer, model, engines, service.

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/tokenizer.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "server/chat_template.h"
#include "server/machine_memory.h"
#include "server/metrics.h"
#include "server/options.h"
#include "server/service.h"

namespace spillway {

// Built from the first member down, destroyed from the last one up.
struct EngineHost {
  std::string folder;                            // the model's
  std::vector<std::unique_ptr<Device>> devices;  // one per engine
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<HostTier> host_tier;
  std::unique_ptr<Tier> file_tier;  // below host_tier, and gone before it: its writes read host slots
  std::unique_ptr<Engine> engine;   // with --data-parallel-size above 1 a group of them
  std::unique_ptr<Service> service;

  const Device& device() const { return *devices.front(); }
};

// Blocks while the weights are packed and shows progress on stderr. Errors name the option or file at fault.
absl::StatusOr<EngineHost> MakeEngineHost(const Options& options, const Environment& environment);

// What takes host memory beside the host tier, of all engines together.
struct MemoryInUse {
  std::int64_t weight_bytes = 0;
  std::int64_t kv_cache_bytes = 0;
  std::int64_t workspace_bytes = 0;  // of steps
};

// INVALID_ARGUMENT: a host tier of so many bytes would not fit once it is full, beside those and what else the process
// needs; says why, with every number.
absl::Status CheckRoom(std::int64_t host_bytes, const MachineMemory& memory, const MemoryInUse& used);

// Names all that the bytes of a block depend on beside the tokens: KV that outlives the process is served only in the
// space that it was made in.
std::string KvSpace(std::string_view model_digest, DType dtype, std::string_view quantization,
                    std::string_view compute);

// How long a sequence may be, and how large the KV cache is; split off for tests.
struct CapacityRequest {
  std::int64_t kv_cache_bytes = 0;  // asked for; 0: none
  std::int64_t max_model_len = 0;   // asked for; 0: none
  std::int64_t default_kv_cache_bytes = 0;
  std::int64_t block_bytes = 0;
  std::int64_t max_positions = 0;  // the model's
  std::int64_t home_tokens = 0;    // what the host tier holds of sequences beyond the KV cache
};
struct Capacity {
  std::int64_t kv_cache_bytes = 0;
  std::int64_t max_model_len = 0;
};
absl::StatusOr<Capacity> PlanCapacity(const CapacityRequest& request);

}  // namespace spillway
