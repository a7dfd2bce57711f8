#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <thread>
#include <utility>

#include "bench/papers_bench.h"
#include "engine/replay.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;

constexpr double kSliceSeconds = 600;
constexpr std::int32_t kCut = 16;  // lengths are divided by it
constexpr std::size_t kEvery = 4;  // one request of so many
constexpr double kTimeScale = 6;
constexpr std::int32_t kMaxTokens = 8000;
constexpr std::uint32_t kDeviceBlocks = 768;
constexpr double kLinkBytesPerSecond = 110e6;
constexpr std::int32_t kVocab = 256;

Trace Slice(const Trace& trace) {
  Trace slice{.name = trace.name, .id_tokens = kTraceIdTokens / kCut, .requests = {}};
  for (std::size_t i = 0; i < trace.requests.size(); i += kEvery) {
    TraceRequest request = trace.requests[i];
    if (request.arrival_seconds >= kSliceSeconds) break;
    request.prompt_tokens = (request.prompt_tokens + kCut - 1) / kCut;
    request.output_tokens = std::max(1, request.output_tokens / kCut);
    if (request.prompt_tokens + request.output_tokens <= kMaxTokens) slice.requests.push_back(std::move(request));
  }
  return slice;
}

struct Summary {
  double p50_ttft = 0;
  double p95_ttft = 0;
  double requests_per_second = 0;
  double device_hits = 0;
  double host_hits = 0;
};

Summary Summarize(std::vector<double> ttft, double seconds, double device_hits, double host_hits) {
  std::ranges::sort(ttft);
  const auto at = [&](double share) {
    return ttft[static_cast<std::size_t>(share * static_cast<double>(ttft.size() - 1))];
  };
  return {.p50_ttft = at(0.5),
          .p95_ttft = at(0.95),
          .requests_per_second = static_cast<double>(ttft.size()) / seconds,
          .device_hits = device_hits,
          .host_hits = host_hits};
}

// Engine thread, then read after the last sequence is done.
class Reports : public EngineObserver {
 public:
  void OnStep(const StepReport&) override {}
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double seconds) override { ttft.push_back(seconds); }
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport& report) override {
    host_hits += report.cached_below_tokens;
    device_hits += report.cached_tokens - report.cached_below_tokens;
  }

  std::vector<double> ttft;
  double device_hits = 0;
  double host_hits = 0;
};

// What cost models say, on average: a machine that others share computes faster and slower by turns, and a replay has
// one speed for all of it.
class MeanModel {
 public:
  void Add(const CostModel& model) {
    for (const SizedSpeed::Point& point : model.products().Points()) {
      Sum& sum = products_[std::ilogb(point.size)];
      sum.size += point.size;
      sum.seconds += point.seconds;
      ++sum.count;
    }
    floor_ += model.compute().step_floor_seconds;
    per_linear_flop_ += 1 / model.compute().linear_flops_per_second;
    per_attention_flop_ += 1 / model.compute().attention_flops_per_second;
    per_kv_byte_ += 1 / model.compute().kv_bytes_per_second;
    ++count_;
  }
  // With the link of `last`.
  CostModel Mean(const CostModel& last) const {
    SizedSpeed products;
    for (const auto& [size_class, sum] : products_) {
      products.Measure(sum.size / sum.count, sum.size / sum.count, sum.seconds / sum.count, 1);
    }
    const ComputeSpeed compute{.linear_flops_per_second = count_ / per_linear_flop_,
                               .attention_flops_per_second = count_ / per_attention_flop_,
                               .kv_bytes_per_second = count_ / per_kv_byte_,
                               .step_floor_seconds = floor_ / count_};
    return {last.costs(), compute, last.link(), last.copy_bytes(), products};
  }

 private:
  struct Sum {
    double size = 0;
    double seconds = 0;
    double count = 0;
  };
  std::map<int, Sum> products_;
  double floor_ = 0;
  double per_linear_flop_ = 0;
  double per_attention_flop_ = 0;
  double per_kv_byte_ = 0;
  double count_ = 0;
};

struct Served {
  Summary summary;
  CostModel calibrated;
  CostModel mean;  // over the arrivals
};

Served Serve(PacedRig& rig, const Trace& trace, SchedulingPolicy policy) {
  rig.host().Clear();
  Reports reports;
  EngineOptions options;
  options.max_model_len = kMaxTokens;
  options.max_num_batched_tokens = kStepTokens;
  options.link_bytes_per_second = kLinkBytesPerSecond;
  options.scheduling_policy = policy;
  std::unique_ptr<Engine> engine = rig.MakeEngine(options, kDeviceBlocks, &reports);
  const CostModel calibrated = *engine->status().cost_model;
  std::vector<std::shared_ptr<Waiter>> waiters;
  MeanModel mean;
  const double begin = Now();
  for (const TraceRequest& each : trace.requests) {
    const BenchRequest request{.prompt = PromptOf(trace, each, kVocab)};
    std::this_thread::sleep_for(std::chrono::duration<double>(begin + each.arrival_seconds / kTimeScale - Now()));
    waiters.push_back(PacedRig::Submit(*engine, {request}, each.output_tokens).front());
    mean.Add(*engine->status().cost_model);
  }
  for (const auto& waiter : waiters) waiter->Await();
  const double seconds = Now() - begin;
  const EngineStatus status = engine->status();
  engine.reset();  // joins its thread: the reports are complete
  std::printf("served by %s: %.1f s, a step ran in %.1f s of them, restores %.1f s, stores %.1f s\n",
              std::string(NameOf(policy)).c_str(), seconds, status.compute_seconds, status.restore_seconds,
              status.store_seconds);
  return {.summary = Summarize(std::move(reports.ttft), seconds, reports.device_hits, reports.host_hits),
          .calibrated = calibrated,
          .mean = mean.Mean(*status.cost_model)};
}

Summary Model(const Trace& trace, const CostModel& model, SchedulingPolicy policy) {
  ReplayOptions options;
  options.scheduling.policy = policy;
  options.scheduling.max_num_batched_tokens = kStepTokens;
  options.scheduling.layer_loads = LayerLoads::kHidden;
  options.device_blocks = kDeviceBlocks;
  options.host_blocks = kHostBlocks;
  options.lanes = VirtualLink::Lanes::kShared;
  options.time_scale = kTimeScale;
  options.vocab = kVocab;
  const absl::StatusOr<ReplayResult> result = RunReplay(trace, model, options, nullptr);
  SPILLWAY_CHECK(result.ok()) << result.status();
  std::printf("modelled: a step ran in %.1f s, restores %.1f s, stores %.1f s\n", result->compute_seconds,
              result->restore_seconds, result->store_seconds);
  std::vector<double> ttft;
  double device_hits = 0;
  double host_hits = 0;
  for (const ReplayedRequest& request : result->requests) {
    ttft.push_back(request.first_token - request.arrived);
    host_hits += request.cached_below_tokens;
    device_hits += request.cached_tokens - request.cached_below_tokens;
  }
  return Summarize(std::move(ttft), result->seconds, device_hits, host_hits);
}

json Show(const std::string& name, const Summary& summary, const Summary& served) {
  const auto ratio = [](double value, double of) { return of > 0 ? value / of : 0; };
  std::printf(
      "%-29s %8.1f %5.2f %8.1f %5.2f %7.3f %5.2f %9.0f %5.2f %9.0f %5.2f\n", name.c_str(), 1e3 * summary.p50_ttft,
      ratio(summary.p50_ttft, served.p50_ttft), 1e3 * summary.p95_ttft, ratio(summary.p95_ttft, served.p95_ttft),
      summary.requests_per_second, ratio(summary.requests_per_second, served.requests_per_second), summary.device_hits,
      ratio(summary.device_hits, served.device_hits), summary.host_hits, ratio(summary.host_hits, served.host_hits));
  return {{"name", name},
          {"p50_ttft_seconds", summary.p50_ttft},
          {"p95_ttft_seconds", summary.p95_ttft},
          {"requests_per_second", summary.requests_per_second},
          {"device_hit_tokens", summary.device_hits},
          {"host_hit_tokens", summary.host_hits}};
}

}  // namespace

json CompareReplay(PacedRig& rig, const std::string& trace_path, const std::vector<SchedulingPolicy>& policies) {
  const absl::StatusOr<Trace> trace = ReadTrace(trace_path);
  SPILLWAY_CHECK(trace.ok()) << trace.status();
  const Trace slice = Slice(*trace);
  std::printf("\n%zu requests; behind each number its ratio to what was served\n", slice.requests.size());
  json rows = json::array();
  for (const SchedulingPolicy policy : policies) {
    const Served served = Serve(rig, slice, policy);
    const std::string name(NameOf(policy));
    const Summary calibrated = Model(slice, served.calibrated, policy);
    const Summary mean = Model(slice, served.mean, policy);
    std::printf("%-29s %14s %14s %14s %15s %15s\n", "", "p50 TTFT ms", "p95 TTFT ms", "requests/s", "device hits",
                "host hits");
    rows.push_back(Show(name + ", served, measured", served.summary, served.summary));
    rows.push_back(Show(name + ", modelled, calibration", calibrated, served.summary));
    rows.push_back(Show(name + ", modelled, as served", mean, served.summary));
  }
  return rows;
}

}  // namespace spillway::papers_bench
