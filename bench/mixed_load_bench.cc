// Long cached prefixes and fresh prompts at a paced link: kappa against fcfs, where fcfs is the same engine with
// asynchronous loads that overlap compute. A burst of 32 long-cached requests, then 32 fresh ones, in a device tier
// that holds four of the long ones. Prompts are seeded. Before anything is reported, outputs are checked to be equal.
//
// Fairness: a request's time to first token against that on a server of its own with 1/N of the link and of the
// compute, where N requests were active on average while it waited: N times what it takes alone.
//
//   mixed_load_bench [--json FILE]

#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "bench/paced_rig.h"

namespace spillway {
namespace {

constexpr int kLong = 32;
constexpr int kFresh = 32;
constexpr std::int32_t kCachedTokens = 2048;
constexpr std::int32_t kNewTokens = 12;  // less than a block, so that no run leaves more cached than it found
constexpr std::int32_t kFreshTokens = 256;
constexpr std::int32_t kOutputTokens = 4;
constexpr std::int64_t kDeviceBlocks = 4 * (kCachedTokens / kBlockTokens + 4);
constexpr double kLinkBytesPerSecond = 110e6;
constexpr std::uint32_t kSeed = 20260;

struct Workload {
  std::vector<std::vector<std::int32_t>> prefixes;
  std::vector<BenchRequest> requests;  // long ones, then fresh ones
};

Workload MakeWorkload() {
  std::mt19937 random(kSeed);
  const auto tokens = [&](std::int32_t count) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(count));
    for (std::int32_t& token : out) token = static_cast<std::int32_t>(3 + random() % 280);
    return out;
  };
  Workload workload;
  for (int i = 0; i < kLong; ++i) {
    workload.prefixes.push_back(tokens(kCachedTokens));
    std::vector<std::int32_t> prompt = workload.prefixes.back();
    const std::vector<std::int32_t> turn = tokens(kNewTokens);
    prompt.insert(prompt.end(), turn.begin(), turn.end());
    workload.requests.push_back({.prompt = std::move(prompt)});
  }
  for (int i = 0; i < kFresh; ++i) workload.requests.push_back({.prompt = tokens(kFreshTokens), .is_fresh = true});
  return workload;
}

double Percentile(std::vector<double> values, double part) {
  std::ranges::sort(values);
  return values[static_cast<std::size_t>(part * static_cast<double>(values.size() - 1))];
}

using Waiters = std::vector<std::shared_ptr<Waiter>>;

struct Alone {
  double of_long = 0;  // seconds until the first token, median
  double of_fresh = 0;
};

// Each kind on an idle engine, loading what is cached.
Alone MeasureAlone(PacedRig& rig, const Workload& workload, EngineOptions options) {
  options.link_bytes_per_second = kLinkBytesPerSecond;
  const std::unique_ptr<Engine> engine = rig.MakeEngine(options, kDeviceBlocks, nullptr);
  const auto median = [&](std::size_t first) {
    std::vector<double> seconds;
    for (std::size_t i = first; i < first + 5; ++i) {
      const Waiters waiters = PacedRig::Submit(*engine, {workload.requests[i]}, kOutputTokens);
      waiters.front()->Await();
      PacedRig::AwaitWriteThrough(*engine);
      seconds.push_back(waiters.front()->first_token_seconds());
    }
    return Percentile(std::move(seconds), 0.5);
  };
  median(kLong);  // warms up
  return {.of_long = median(0), .of_fresh = median(kLong)};
}

// Requests that were active on average between the request's submission and its first token, itself included.
double MeanActive(const Waiters& waiters, const Waiter& of) {
  double overlap = 0;
  for (const auto& each : waiters) {
    overlap +=
        std::max(0.0, std::min(each->ended_at, of.first_token_at()) - std::max(each->submitted_at, of.submitted_at));
  }
  return overlap / of.first_token_seconds();
}

// The largest of the requests' ratios.
double WorstAgainstShare(const Waiters& waiters, const Alone& alone) {
  double worst = 0;
  for (std::size_t i = 0; i < waiters.size(); ++i) {
    const double share = MeanActive(waiters, *waiters[i]) * (i < kLong ? alone.of_long : alone.of_fresh);
    worst = std::max(worst, waiters[i]->first_token_seconds() / share);
  }
  return worst;
}

struct Outcome {
  std::vector<std::vector<std::int32_t>> outputs;
  nlohmann::json row;
};

Outcome Measure(PacedRig& rig, const Workload& workload, const Alone& alone, EngineOptions options) {
  options.link_bytes_per_second = kLinkBytesPerSecond;
  StepSeconds steps;
  std::unique_ptr<Engine> engine = rig.MakeEngine(options, kDeviceBlocks, &steps);
  const double begin = Now();
  const auto waiters = PacedRig::Submit(*engine, workload.requests, kOutputTokens);
  for (const auto& waiter : waiters) waiter->Await();
  const double seconds = Now() - begin;
  const EngineStatus status = engine->status();
  engine.reset();  // joins its thread
  const double link_seconds = static_cast<double>(status.restored_bytes) / kLinkBytesPerSecond;
  const double bound = std::max(link_seconds, steps.total);
  Outcome outcome;
  std::vector<double> of_long;
  std::vector<double> of_fresh;
  for (std::size_t i = 0; i < waiters.size(); ++i) {
    outcome.outputs.push_back(waiters[i]->tokens);
    (i < kLong ? of_long : of_fresh).push_back(waiters[i]->first_token_seconds());
  }
  outcome.row = {{"policy", std::string(NameOf(options.scheduling_policy))},
                 {"load_choice", std::string(kLoadChoiceNames[static_cast<std::size_t>(options.load_choice)])},
                 {"seconds", seconds},
                 {"link_seconds", link_seconds},
                 {"compute_seconds", steps.total},
                 {"share_of_bound", bound / seconds},
                 {"restored_blocks", status.restored_blocks},
                 {"fresh_ttft_p50", Percentile(of_fresh, 0.5)},
                 {"fresh_ttft_p95", Percentile(of_fresh, 0.95)},
                 {"long_ttft_p50", Percentile(of_long, 0.5)},
                 {"long_ttft_p95", Percentile(of_long, 0.95)},
                 {"worst_ttft_of_share", WorstAgainstShare(waiters, alone)}};
  std::printf("%-6s %-6s %9.2f %9.2f %9.2f %8.1f %% %10.2f %10.2f %10.2f %10.2f %10.2f\n",
              outcome.row["policy"].get<std::string>().c_str(), outcome.row["load_choice"].get<std::string>().c_str(),
              seconds, link_seconds, steps.total, 100 * bound / seconds, Percentile(of_fresh, 0.5),
              Percentile(of_fresh, 0.95), Percentile(of_long, 0.5), Percentile(of_long, 0.95),
              outcome.row["worst_ttft_of_share"].get<double>());
  std::fflush(stdout);
  return outcome;
}

int Run(const std::string& json_path) {
  PacedRig rig({.seed = 5,
                .layers = 4,
                .hidden = 512,
                .inner = 1408,
                .heads = 8,
                .kv_heads = 8,
                .head_dim = 64,
                .vocab = 288,
                .max_positions = 4096,
                .dtype = DType::kBF16},
               kLong * (kCachedTokens + kNewTokens) / kBlockTokens + kFresh * kFreshTokens / kBlockTokens + 512);
  const Workload workload = MakeWorkload();
  EngineOptions options;
  options.max_model_len = kCachedTokens + 256;
  options.max_num_batched_tokens = 512;
  rig.Store(workload.prefixes, options, kDeviceBlocks);
  std::printf("%d cached x %d + %d tokens, then %d fresh x %d; link %.0f MB/s (paced), %zu KiB blocks, seed %u\n",
              kLong, kCachedTokens, kNewTokens, kFresh, kFreshTokens, kLinkBytesPerSecond / 1e6,
              rig.block_bytes() >> 10, kSeed);
  const Alone alone = MeasureAlone(rig, workload, options);
  std::printf("alone: long %.3f s, fresh %.3f s\n", alone.of_long, alone.of_fresh);
  std::printf("%-6s %-6s %9s %9s %9s %10s %10s %10s %10s %10s %10s\n", "policy", "choice", "seconds", "link s",
              "compute s", "of bound", "fresh p50", "fresh p95", "long p50", "long p95", "of share");
  nlohmann::json rows = nlohmann::json::array();
  std::vector<std::vector<std::int32_t>> expected;
  const std::vector<std::pair<SchedulingPolicy, LoadChoice>> cases = {{SchedulingPolicy::kFcfs, LoadChoice::kLoad},
                                                                      {SchedulingPolicy::kFcfs, LoadChoice::kAuto},
                                                                      {SchedulingPolicy::kKappa, LoadChoice::kLoad},
                                                                      {SchedulingPolicy::kKappa, LoadChoice::kAuto}};
  for (const auto& [policy, choice] : cases) {
    options.scheduling_policy = policy;
    options.load_choice = choice;
    const Outcome outcome = Measure(rig, workload, alone, options);
    if (expected.empty()) expected = outcome.outputs;
    SPILLWAY_CHECK(outcome.outputs == expected) << "outputs differ between policies";
    rows.push_back(outcome.row);
  }
  if (!json_path.empty()) std::ofstream(json_path) << rows.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  const bool has_json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc != 1 && !has_json) {
    std::fprintf(stderr, "usage: mixed_load_bench [--json FILE]\n");
    return 2;
  }
  return spillway::Run(has_json ? argv[2] : "");
}
