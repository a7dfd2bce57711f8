#include <algorithm>
#include <chrono>
#include <cstdio>
#include <future>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "bench/papers_bench.h"
#include "engine/replay.h"
#include "kernels/check.h"
#include "tests/support/engine_harness.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

constexpr double kSliceSeconds = 600;
constexpr std::int32_t kCut = 16;  // lengths are divided by it
constexpr std::size_t kEvery = 4;  // one request of so many
constexpr double kTimeScale = 4;
constexpr std::int32_t kMaxTokens = 8000;
constexpr std::uint32_t kDeviceBlocks = 768;
constexpr std::uint32_t kHostBlocks = 4096;
constexpr std::int32_t kStepTokens = 512;
constexpr double kLinkBytesPerSecond = 110e6;
constexpr std::int32_t kVocab = 256;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

struct Served {
  Summary summary;
  CostModel calibrated;
  CostModel at_end;
};

Served Serve(const std::string& folder, const Trace& trace) {
  Reports reports;
  EngineOptions options;
  options.kv_cache_bytes = kDeviceBlocks * Rig::BlockBytes(folder);
  options.max_num_batched_tokens = kStepTokens;
  options.link_bytes_per_second = kLinkBytesPerSecond;
  Rig rig = Rig::Make(folder, options, {}, DTypeChoice::kAuto, &reports, [](Device& device, const KvLayout& layout) {
    return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, kHostBlocks * layout.block_bytes()),
                        {.block_bytes = layout.block_bytes(), .num_blocks = kHostBlocks});
  });
  const CostModel calibrated = *rig.engine->status().cost_model;
  std::vector<std::future<::spillway::testing::Collected>> results;
  const double begin = Now();
  for (const TraceRequest& each : trace.requests) {
    SequenceRequest request = MakeRequest(PromptOf(trace, each, kVocab), each.output_tokens);
    auto sink = std::make_shared<CollectingSink>();
    results.push_back(sink->Result());
    request.sink = std::move(sink);
    std::vector<SequenceRequest> one;
    one.push_back(std::move(request));
    std::this_thread::sleep_for(std::chrono::duration<double>(begin + each.arrival_seconds / kTimeScale - Now()));
    SPILLWAY_CHECK(rig.engine->Submit(std::move(one)).ok());
  }
  for (auto& result : results) SPILLWAY_CHECK(result.get().error.ok());
  const double seconds = Now() - begin;
  const CostModel at_end = *rig.engine->status().cost_model;
  rig.engine.reset();  // joins its thread: the reports are complete
  return {.summary = Summarize(std::move(reports.ttft), seconds, reports.device_hits, reports.host_hits),
          .calibrated = calibrated,
          .at_end = at_end};
}

Summary Model(const Trace& trace, const CostModel& model) {
  ReplayOptions options;
  options.scheduling.max_num_batched_tokens = kStepTokens;
  options.device_blocks = kDeviceBlocks;
  options.host_blocks = kHostBlocks;
  options.lanes = VirtualLink::Lanes::kShared;
  options.time_scale = kTimeScale;
  options.vocab = kVocab;
  const absl::StatusOr<ReplayResult> result = RunReplay(trace, model, options, nullptr);
  SPILLWAY_CHECK(result.ok()) << result.status();
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

json Show(const char* name, const Summary& summary, const Summary& served) {
  const auto ratio = [](double value, double of) { return of > 0 ? value / of : 0; };
  std::printf(
      "%-22s %8.1f %5.2f %8.1f %5.2f %7.3f %5.2f %9.0f %5.2f %9.0f %5.2f\n", name, 1e3 * summary.p50_ttft,
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

json CompareReplay(const std::string& folder, const std::string& trace_path) {
  const absl::StatusOr<Trace> trace = ReadTrace(trace_path);
  SPILLWAY_CHECK(trace.ok()) << trace.status();
  const Trace slice = Slice(*trace);
  const Served served = Serve(folder, slice);
  std::printf(
      "\n%zu requests; each number is followed by its ratio to what was served\n%-22s %14s %14s %13s %15s %15s\n",
      slice.requests.size(), "", "p50 TTFT ms", "p95 TTFT ms", "requests/s", "device hits", "host hits");
  json rows = json::array();
  rows.push_back(Show("served, measured", served.summary, served.summary));
  rows.push_back(Show("modelled, calibration", Model(slice, served.calibrated), served.summary));
  rows.push_back(Show("modelled, as served", Model(slice, served.at_end), served.summary));
  return rows;
}

}  // namespace spillway::papers_bench
