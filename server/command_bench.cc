#include <fmt/format.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <random>
#include <utility>

#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "engine/model.h"
#include "server/bench_report.h"
#include "server/commands.h"
#include "server/engine_host.h"
#include "server/load_generator.h"
#include "server/log.h"
#include "server/progress.h"

namespace spillway {
namespace {

int Fail(const absl::Status& status) {
  Log(LogLevel::kError, std::string(status.message()));
  return kExitFailed;
}

// Counts what many generations produce.
class Tally {
 public:
  explicit Tally(std::int64_t num_requests) : num_requests_(num_requests) {}

  void AddTokens(std::int64_t count) {
    const std::lock_guard lock(mutex_);
    num_tokens_ += count;
  }
  void Done(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    if (!status.ok()) failure_ = status;
    ++num_done_;
    changed_.notify_all();
  }
  // Until all are done; `bar` is drawn on this thread.
  void Await(ProgressBar& bar) {
    std::unique_lock lock(mutex_);
    for (std::int64_t shown = 0; shown < num_requests_;) {
      changed_.wait(lock, [&] { return num_done_ > shown; });
      shown = num_done_;
      lock.unlock();
      bar.Show(shown, num_requests_);
      lock.lock();
    }
  }
  std::int64_t num_tokens() const { return num_tokens_; }  // after Await, as the next
  const absl::Status& failure() const { return failure_; }

 private:
  const std::int64_t num_requests_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::int64_t num_tokens_ = 0;
  std::int64_t num_done_ = 0;
  absl::Status failure_;
};

class TallyListener : public GenerationListener {
 public:
  explicit TallyListener(Tally& tally) : tally_(tally) {}
  void OnPrompt(const PromptInfo& /*prompt*/) override {}
  void OnChunk(OutputChunk chunk) override { tally_.AddTokens(static_cast<std::int64_t>(chunk.tokens.size())); }
  void OnDone(const absl::Status& status) override { tally_.Done(status); }

 private:
  Tally& tally_;
};

LoadOptions LoadOptionsOf(const Options& options) {
  LoadOptions load;
  load.host = options.bench.host;
  load.port = static_cast<std::uint16_t>(options.bench.port);
  load.model = options.bench.model;
  load.api_key = options.bench.api_key;
  load.num_prompts = options.bench.num_prompts;
  load.request_rate = options.bench.request_rate;
  load.max_concurrency = options.bench.max_concurrency;
  load.input_len = options.workload.input_len;
  load.output_len = options.workload.output_len;
  load.ignore_eos = options.workload.ignore_eos;
  load.seed = static_cast<std::uint64_t>(options.bench.seed);
  return load;
}

std::string ResultName(const Options& options, const LoadResult& result) {
  if (!options.workload.result_filename.empty()) return options.workload.result_filename;
  const std::string model = absl::StrReplaceAll(result.model.substr(result.model.rfind('/') + 1), {{" ", "-"}});
  return fmt::format("openai-{:.1f}qps-{}-{}.json", options.bench.request_rate, model,
                     absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::LocalTimeZone()));
}

}  // namespace

int BenchThroughputCommand(const Options& given, const Environment& environment) {
  Options options = given;
  options.scheduling.max_num_queued_reqs = std::max(options.scheduling.max_num_queued_reqs, options.bench.num_prompts);
  const auto host = MakeEngineHost(options, environment);
  if (!host.ok()) return Fail(host.status());

  const std::int64_t num_requests = options.bench.num_prompts;
  Tally tally(num_requests);
  std::mt19937_64 random(static_cast<std::uint64_t>(options.bench.seed));
  std::uniform_int_distribution<std::int32_t> token(0, host->engine->model().config().vocab - 1);
  const absl::Time begin = absl::Now();
  for (std::int64_t i = 0; i < num_requests; ++i) {
    GenerationRequest request;
    std::vector<std::int32_t> prompt(static_cast<std::size_t>(options.workload.input_len));
    for (std::int32_t& each : prompt) each = token(random);
    request.prompt = std::move(prompt);
    request.max_tokens = options.workload.output_len;
    request.temperature = 0;
    request.ignore_eos = true;
    host->service->Start(std::move(request), std::make_shared<TallyListener>(tally));
  }
  {
    ProgressBar bar("generating", "requests");
    tally.Await(bar);
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  if (!tally.failure().ok()) return Fail(tally.failure());

  const std::int64_t input_tokens = num_requests * options.workload.input_len;
  nlohmann::ordered_json report;
  report["elapsed_time"] = seconds;
  report["num_requests"] = num_requests;
  report["total_num_tokens"] = input_tokens + tally.num_tokens();
  report["requests_per_second"] = static_cast<double>(num_requests) / seconds;
  report["tokens_per_second"] = static_cast<double>(input_tokens + tally.num_tokens()) / seconds;
  report["output_tokens_per_second"] = static_cast<double>(tally.num_tokens()) / seconds;
  fmt::print("{}\n", report.dump(2));
  if (options.workload.result_filename.empty()) return 0;
  const absl::Status written = WriteJson(options.workload.result_filename, report);
  return written.ok() ? 0 : Fail(written);
}

int BenchServeCommand(const Options& options, const Environment& /*environment*/) {
  const auto percentiles = ParsePercentiles(options.workload.metric_percentiles);
  if (!percentiles.ok()) return Fail(percentiles.status());
  const LoadOptions load = LoadOptionsOf(options);
  absl::StatusOr<LoadResult> result;
  {
    ProgressBar bar("requests", "requests");
    result = GenerateLoad(load, [&bar](std::int64_t done, std::int64_t total) { bar.Show(done, total); });
  }
  if (!result.ok()) return Fail(result.status());
  nlohmann::ordered_json report = {{"date", absl::FormatTime("%Y%m%d-%H%M%S", absl::Now(), absl::LocalTimeZone())},
                                   {"backend", "openai"}};
  report.update(ServeReport(load, *result, *percentiles));
  fmt::print("{}", ShowServeReport(report));
  if (options.workload.save_result) {
    const std::string path = ResultName(options, *result);
    if (const absl::Status written = WriteJson(path, report); !written.ok()) return Fail(written);
    fmt::print(stderr, "wrote {}\n", path);
  }
  const std::int64_t failed = report["failed"].get<std::int64_t>();
  if (failed == 0) return 0;
  const auto bad =
      std::ranges::find_if(result->requests, [](const LoadedRequest& each) { return !each.error.empty(); });
  return Fail(absl::InternalError(fmt::format("{} of {} requests failed; the first: {}", failed, load.num_prompts,
                                              bad == result->requests.end() ? "" : bad->error)));
}

}  // namespace spillway
