// A scheduler's step without a device: Plan and Computed at 1,000 running and 10,000 waiting sequences, over a KvStore
// whose blocks hold next to nothing. Before it times anything it checks that the step is the one it means to time.
//
//   scheduler_bench [--json FILE]

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/scheduler.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "kvstore/kv_store.h"

namespace spillway {
namespace {

constexpr std::int32_t kRunning = 1000;
constexpr std::int32_t kWaiting = 10'000;
constexpr std::int32_t kPromptTokens = 512;
constexpr int kSteps = 400;
constexpr KvLayout kTinyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .dtype = DType::kF32};

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::unique_ptr<Sequence> MakeSequence(std::uint64_t id, bool shares_prefix) {
  auto sequence = std::make_unique<Sequence>();
  sequence->request.id = id;
  sequence->request.sampling.max_tokens = 1 << 20;
  sequence->request.tenant = std::to_string(id % 100);
  for (std::int32_t i = 0; i < kPromptTokens; ++i) {
    sequence->tokens.push_back(shares_prefix && i < kPromptTokens / 2 ? i : static_cast<std::int32_t>(id * 1009) + i);
  }
  sequence->num_prompt = kPromptTokens;
  return sequence;
}

struct Case {
  SchedulingPolicy policy;
  bool shares_prefix;  // every prompt begins with the same 256 tokens
};

nlohmann::json Measure(const Case& test) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  std::unique_ptr<HostTier> host = MakeNullHostTier();
  // Room for what runs and its outputs, and for nobody else.
  const std::uint32_t num_blocks = kRunning * (kPromptTokens / kBlockTokens + 2 * kSteps / kBlockTokens + 2);
  std::unique_ptr<KvStore> store = *KvStore::Make(
      *device, *host, {.layout = kTinyLayout, .num_blocks = num_blocks, .pacing = {}, .before_copy = {}}, [] {});
  const KeyChain chain("0");
  Scheduler scheduler(*store, chain,
                      {.max_num_seqs = kRunning, .max_num_batched_tokens = 1 << 20, .policy = test.policy}, nullptr);
  std::uint64_t id = 1;
  for (; id <= kRunning + kWaiting; ++id) scheduler.Add(MakeSequence(id, test.shares_prefix));
  std::vector<double> seconds;
  std::vector<double> plans;
  double now = 0;
  while (seconds.size() < kSteps) {
    const bool is_timed = scheduler.num_running() == kRunning;
    const double begin = Now();
    const StepPlan plan = scheduler.Plan(now += 0.01);
    const double planned = Now();
    scheduler.Computed(plan);
    const double end = Now();
    for (const PlannedSequence& each : plan.sequences) {
      if (each.samples) each.sequence->tokens.push_back(7);
    }
    if (!is_timed) continue;
    SPILLWAY_CHECK(plan.num_tokens == kRunning && scheduler.num_waiting() == kWaiting)
        << plan.num_tokens << " tokens planned, " << scheduler.num_waiting() << " waiting";
    seconds.push_back(end - begin);
    plans.push_back(planned - begin);
  }
  // One ends and another comes in each step.
  std::vector<double> turnover;
  for (int i = 0; i < kSteps; ++i) {
    scheduler.Remove(scheduler.All().front());
    scheduler.Add(MakeSequence(id++, test.shares_prefix));
    const double begin = Now();
    const StepPlan plan = scheduler.Plan(now += 0.01);
    scheduler.Computed(plan);
    turnover.push_back(Now() - begin);
    for (const PlannedSequence& each : plan.sequences) {
      if (each.samples) each.sequence->tokens.push_back(7);
    }
    SPILLWAY_CHECK(scheduler.num_running() >= kRunning - 1);
  }
  for (std::vector<double>* each : {&seconds, &plans, &turnover}) std::ranges::sort(*each);
  const auto at = [](const std::vector<double>& sorted, double part) {
    return sorted[static_cast<std::size_t>(part * static_cast<double>(sorted.size() - 1))];
  };
  std::printf("%-9s %-7s %12.1f %12.1f %12.1f %12.1f %12.1f\n", std::string(NameOf(test.policy)).c_str(),
              test.shares_prefix ? "shared" : "own", 1e6 * at(plans, 0.5), 1e6 * at(seconds, 0.5),
              1e6 * at(seconds, 0.99), 1e6 * at(turnover, 0.5), 1e6 * at(turnover, 0.99));
  return {{"policy", std::string(NameOf(test.policy))},
          {"shares_prefix", test.shares_prefix},
          {"running", kRunning},
          {"waiting", kWaiting},
          {"plan_seconds_median", at(plans, 0.5)},
          {"step_seconds_median", at(seconds, 0.5)},
          {"step_seconds_p99", at(seconds, 0.99)},
          {"turnover_step_seconds_median", at(turnover, 0.5)},
          {"turnover_step_seconds_p99", at(turnover, 0.99)}};
}

int Run(const std::string& json_path) {
  std::printf("%d running, %d waiting; microseconds of Plan, and of Plan and Computed; then with one ending a step\n",
              kRunning, kWaiting);
  std::printf("%-9s %-7s %12s %12s %12s %12s %12s\n", "policy", "prefix", "plan p50", "step p50", "step p99",
              "turnover p50", "p99");
  nlohmann::json rows = nlohmann::json::array();
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority, SchedulingPolicy::kKappa}) {
    for (const bool shares_prefix : {false, true}) {
      rows.push_back(Measure({.policy = policy, .shares_prefix = shares_prefix}));
    }
  }
  if (!json_path.empty()) std::ofstream(json_path) << rows.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  const bool has_json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc != 1 && !has_json) {
    std::fprintf(stderr, "usage: scheduler_bench [--json FILE]\n");
    return 2;
  }
  return spillway::Run(has_json ? argv[2] : "");
}
