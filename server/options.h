#pragma once

// What the user asked for. One table of rows (option_table.cc) drives parsing, --help, the resolved configuration that
// is logged at start, and docs/from-vllm.md. A value comes from a flag, else SPILLWAY_<NAME>, else the --config file,
// else the default that these structs show. Ranges are in the table.

#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace spillway {

enum class Command : unsigned {
  kServe = 1,
  kRun = 2,
  kBenchThroughput = 4,
  kBenchServe = 8,
  kCheck = 16,
  kFromVllm = 32,  // prints docs/from-vllm.md
  kPlan = 64,
  kReplay = 128,
};

struct ModelChoice {
  std::string model;  // a folder or a Hub id
  std::vector<std::string> served_names;
  std::string dtype = "auto";
  std::string quantization = "none";
  std::string generation_config = "auto";
  std::int64_t max_model_len = 0;  // 0: the model's own, less where the KV cache is smaller
};

struct DeviceChoice {
  std::string device = "auto";
  std::string cpu_target = "auto";
  std::string cpu_gemm = "auto";
  std::int64_t threads = 0;           // 0: the cores this process may run on
  double gpu_memory_utilization = 0;  // 0: the cuda device's own default
  bool batch_invariant = false;
  bool enforce_eager = false;
  std::int64_t data_parallel_size = 1;
};

struct CacheChoice {
  std::int64_t kv_cache_memory_bytes = 0;  // 0: by the rule of DefaultKvCacheBytes
  std::int64_t block_size = 16;
  bool enable_prefix_caching = true;
  std::string prefix_hash_seed = "0";
  std::int64_t kv_offloading_size = -1;  // the host tier's bytes; -1: by the rule of DefaultHostTierBytes; 0: off
  std::int64_t kv_store_threshold = 1;
  bool kv_verify = false;
  std::string kv_file_directory;  // empty: no file tier
  std::int64_t kv_file_size = std::int64_t{16} << 30;
  std::int64_t cpu_link_bandwidth = 0;       // bytes per second; 0: not paced
  double cpu_link_latency = 0;               // seconds
  std::int64_t kv_offloading_bandwidth = 0;  // bytes per second; 0: no cap
  std::int64_t kv_activation_recompute = 0;  // tokens; -1: auto; 0: off
  bool cache_salt_by_tenant = false;
};

struct SchedulingChoice {
  std::string policy = "fcfs";
  std::string load_choice = "load";
  std::int64_t max_num_seqs = 256;
  std::int64_t max_num_batched_tokens = 2048;
  std::int64_t long_prefill_token_threshold = 0;  // 0: the whole budget
  std::int64_t max_num_queued_reqs = 4096;
  std::optional<bool> async_scheduling;  // unset: on the cuda device
};

struct ListenChoice {
  std::string host = "0.0.0.0";
  std::int64_t port = 8000;     // 0: any free one
  std::int64_t grpc_port = -1;  // -1: no gRPC; 0: any free one
  std::vector<std::string> api_keys;
  std::string admin_api_key;
  std::int64_t admin_port = -1;  // -1: none; 0: any free one
};

struct LimitChoice {
  std::int64_t max_connections = 16384;
  std::int64_t max_body_bytes = 32 << 20;
  std::int64_t max_header_bytes = 64 << 10;
  double header_timeout = 30;  // seconds, as all below
  double idle_timeout = 75;
  double write_timeout = 30;
  std::int64_t max_json_depth = 64;
};

struct LifeChoice {
  double shutdown_timeout = 30;
  double engine_stall_timeout = 60;
  std::string log_level = "auto";
  std::string log_format = "auto";
  std::string config;
};

struct PromptChoice {
  std::string prompt;
  std::optional<std::int64_t> max_tokens;
  std::optional<double> temperature, top_p, min_p;
  std::optional<std::int64_t> top_k;
  std::optional<std::int64_t> seed;
};

struct BenchChoice {
  std::string host = "127.0.0.1";
  std::int64_t port = 8000;
  std::string model;  // of the requests; empty: what /v1/models lists first
  std::string api_key;
  std::int64_t num_prompts = 1000;
  double request_rate = std::numeric_limits<double>::infinity();  // per second
  std::int64_t max_concurrency = 0;                               // 0: no bound
  std::int64_t seed = 0;
};

struct WorkloadChoice {
  std::int64_t input_len = 1024;
  std::int64_t output_len = 128;
  bool ignore_eos = false;
  std::string metric_percentiles = "99";
  bool save_result = false;
  std::string result_filename;
};

// Of `plan` and `replay`.
struct ModelledChoice {
  std::string hardware;  // a built-in name, a YAML file, or (plan) "this"; empty: see the commands
  std::int64_t cached_tokens = 8192;
  std::int64_t new_tokens = 256;
  std::string trace;
  std::string policy = "fcfs";
  std::string routing = "round-robin";
  std::int64_t replicas = 0;  // 0: as the hardware says
  double time_scale = 1;
  std::vector<std::string> goodput;
  std::string json;
  std::string csv;
  std::string html;
};

struct Options {
  ModelChoice model;
  DeviceChoice device;
  CacheChoice cache;
  SchedulingChoice scheduling;
  ListenChoice listen;
  LimitChoice limit;
  LifeChoice life;
  PromptChoice prompt;
  BenchChoice bench;
  WorkloadChoice workload;
  ModelledChoice modelled;
};

struct CommandLine {
  Command command = Command::kServe;
  Options options;
  std::vector<std::string> warnings;
  std::string text;  // not empty: print this and exit 0 (--help, --version)
};

using Environment = std::map<std::string, std::string>;

// `arguments` without the program's name. Errors are one line that names flag (or variable, or file), value and limit.
absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments, const Environment& environment);

// {name, value} of every option of `command`, in the table's order; keys are shown as "(set)".
std::vector<std::pair<std::string, std::string>> ResolvedConfiguration(Command command, const Options& options);

// docs/from-vllm.md.
std::string FromVllmPage();

}  // namespace spillway
