#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <utility>

#include "absl/strings/str_split.h"
#include "engine/hardware.h"
#include "engine/scheduling_policy.h"
#include "kernels/status_macros.h"
#include "server/bench_report.h"
#include "server/commands.h"
#include "server/hardware_file.h"
#include "server/log.h"
#include "server/modelled_choice.h"
#include "server/progress.h"
#include "server/replay_report.h"

// `spillway replay`: a trace through the scheduler on a described machine, in modelled time.

namespace spillway {
namespace {

using nlohmann::ordered_json;
using Results = std::vector<std::pair<std::string, ReplayResult>>;

constexpr double kMostBlocks = 1 << 28;

std::uint32_t BlocksOf(double tokens) {
  return static_cast<std::uint32_t>(std::clamp(std::floor(tokens / kBlockTokens), 0.0, kMostBlocks));
}

ReplayOptions ReplayOptionsOf(const Options& options, const Hardware& hardware, const ModelCosts& costs) {
  ReplayOptions replay;
  replay.scheduling.max_num_seqs = static_cast<std::int32_t>(options.scheduling.max_num_seqs);
  replay.scheduling.max_num_batched_tokens = static_cast<std::int32_t>(options.scheduling.max_num_batched_tokens);
  replay.scheduling.long_prefill_token_threshold =
      static_cast<std::int32_t>(options.scheduling.long_prefill_token_threshold);
  replay.scheduling.load_choice = LoadChoiceNamed(options.scheduling.load_choice).value();
  replay.scheduling.enable_prefix_caching = options.cache.enable_prefix_caching;
  const auto tokens_in = [&](std::int64_t bytes) { return static_cast<double>(bytes) / costs.kv_bytes_per_token; };
  const CacheChoice& cache = options.cache;
  replay.device_blocks = BlocksOf(cache.kv_cache_memory_bytes > 0 ? tokens_in(cache.kv_cache_memory_bytes)
                                                                  : DeviceTokens(hardware, costs));
  replay.host_blocks =
      BlocksOf(cache.kv_offloading_size >= 0 ? tokens_in(cache.kv_offloading_size) : HostTokens(hardware, costs));
  replay.replicas = static_cast<std::int32_t>(
      options.modelled.replicas > 0 ? static_cast<double>(options.modelled.replicas) : hardware.replicas);
  replay.routing = options.modelled.routing == "prefix" ? Routing::kPrefix : Routing::kRoundRobin;
  replay.time_scale = options.modelled.time_scale;
  return replay;
}

absl::StatusOr<ReplayOptions> WithPolicy(ReplayOptions options, const std::string& name) {
  const std::optional<SchedulingPolicy> policy = SchedulingPolicyNamed(name);
  if (policy == SchedulingPolicy::kPriority) {
    return absl::InvalidArgumentError("--policy: priority: the requests of a trace have no priorities");
  }
  if (!policy) {
    return absl::InvalidArgumentError(
        fmt::format("--policy: '{}' is not one of {}", name, fmt::join(kSchedulingPolicyNames, ", ")));
  }
  options.scheduling.policy = *policy;
  return options;
}

absl::Status Write(const ModelledChoice& choice, const ordered_json& report, const Results& results) {
  if (!choice.json.empty()) RETURN_IF_ERROR(WriteReport(choice.json, report.dump(2) + "\n"));
  if (!choice.csv.empty()) RETURN_IF_ERROR(WriteReport(choice.csv, ReplayCsv(results)));
  if (!choice.html.empty()) RETURN_IF_ERROR(WriteReport(choice.html, ReplayPage(report, results)));
  return absl::OkStatus();
}

bool IsForStdout(const ModelledChoice& choice) {
  constexpr std::string_view kStdout = "/dev/stdout";
  return choice.json == kStdout || choice.csv == kStdout || choice.html == kStdout;
}

absl::Status Replay(const Options& options, const Environment& environment) {
  const ModelledChoice& choice = options.modelled;
  const std::string model_name = options.model.model.empty() ? "llama-3.1-70b" : options.model.model;
  const std::string hardware_name = choice.hardware.empty() ? "4x8xh100" : choice.hardware;
  ASSIGN_OR_RETURN(const std::vector<double> percentiles, ParsePercentiles(options.workload.metric_percentiles));
  ASSIGN_OR_RETURN(const Slo slo, ParseSlo(choice.goodput));
  ASSIGN_OR_RETURN(const Hardware hardware, ReadHardware(hardware_name));
  ASSIGN_OR_RETURN(const ModelCosts costs, ReadModelCosts(model_name, environment));
  if (choice.trace.empty()) return absl::InvalidArgumentError("TRACE is missing");
  ASSIGN_OR_RETURN(const Trace trace, ReadTrace(choice.trace));
  const ReplayOptions replay = ReplayOptionsOf(options, hardware, costs);
  const CostModel model = CostModelOf(hardware, costs);

  Results results;
  ordered_json report = {{"trace", trace.name},
                         {"requests", trace.requests.size()},
                         {"time_scale", replay.time_scale},
                         {"model", model_name},
                         {"hardware", hardware.label.empty() ? hardware.name : hardware.label},
                         {"replicas", replay.replicas},
                         {"routing", choice.routing},
                         {"kv_load_choice", options.scheduling.load_choice},
                         {"device_tokens", std::int64_t{replay.device_blocks} * kBlockTokens},
                         {"host_tokens", std::int64_t{replay.host_blocks} * kBlockTokens},
                         {"kappa_crit", model.kappa_crit()},
                         {"policies", ordered_json::array()}};
  for (const std::string& policy : std::vector<std::string>(absl::StrSplit(choice.policy, ','))) {
    ASSIGN_OR_RETURN(const ReplayOptions of_policy, WithPolicy(replay, policy));
    ProgressBar bar(fmt::format("replaying {}", policy), "requests");
    ASSIGN_OR_RETURN(
        ReplayResult result,
        RunReplay(trace, model, of_policy, [&](std::int64_t done, std::int64_t total) { bar.Show(done, total); }));
    report["policies"].push_back(ReplayReport(policy, result, slo, replay.replicas, percentiles));
    results.emplace_back(policy, std::move(result));
  }
  if (!IsForStdout(choice)) fmt::print("{}", ShowReplay(report));
  return Write(choice, report, results);
}

}  // namespace

int ReplayCommand(const Options& options, const Environment& environment) {
  const absl::Status status = Replay(options, environment);
  if (status.ok()) return 0;
  Log(LogLevel::kError, std::string(status.message()));
  return kExitFailed;
}

}  // namespace spillway
