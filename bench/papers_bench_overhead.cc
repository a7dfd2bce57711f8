#include <algorithm>
#include <chrono>
#include <cstdio>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "bench/papers_bench.h"
#include "kernels/check.h"
#include "tests/support/engine_harness.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;
using ::spillway::testing::Collected;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

constexpr std::int32_t kMostCached = 2048;
constexpr std::int32_t kMostNew = 512;
constexpr std::int32_t kDeviceTokens = kMostCached + kMostNew + kBlockTokens;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Bench {
 public:
  Bench(const std::string& folder, double link_bytes_per_second) {
    EngineOptions options;
    options.kv_cache_bytes = kDeviceTokens / kBlockTokens * Rig::BlockBytes(folder);
    options.max_num_batched_tokens = kMostNew;
    options.link_bytes_per_second = link_bytes_per_second;
    rig_ = Rig::Make(folder, options, {}, DTypeChoice::kAuto, nullptr, [](Device& device, const KvLayout& layout) {
      constexpr std::uint32_t kHostBlocks = 4 * kDeviceTokens / kBlockTokens;
      return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, kHostBlocks * layout.block_bytes()),
                          {.block_bytes = layout.block_bytes(), .num_blocks = kHostBlocks});
    });
  }

  CostModel model() const { return *rig_.engine->status().cost_model; }

  // Seconds until the first token, with `cached` tokens in the host tier, then again with them on the device.
  struct Point {
    double restored = 0;
    double resident = 0;
    double predicted = 0;
    double predicted_overhead = 0;
  };
  Point Measure(std::int32_t cached, std::int32_t fresh) {
    const std::vector<std::int32_t> prefix = Tokens(cached);
    Ask(prefix);
    AwaitStores();
    Ask(Tokens(kDeviceTokens - kBlockTokens));  // evicts the prefix from the device
    AwaitStores();
    Point point;
    const CostModel known = model();
    point.predicted = known.Load({.resident = 0, .below = cached, .fresh = fresh}, {}).seconds;
    point.predicted_overhead = known.LinkOverhead(cached, fresh);
    const std::int64_t restored_before = rig_.engine->status().restored_blocks;
    point.restored = Time(prefix, fresh, cached);
    SPILLWAY_CHECK(rig_.engine->status().restored_blocks - restored_before >= cached / kBlockTokens)
        << "the prefix was not below the device";
    AwaitStores();
    point.resident = Time(prefix, fresh, cached);
    return point;
  }

 private:
  std::vector<std::int32_t> Tokens(std::int32_t count) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random_() % 256);
    return tokens;
  }
  Collected Ask(std::vector<std::int32_t> prompt) { return rig_.RunOne(MakeRequest(std::move(prompt), 1)); }
  double Time(std::vector<std::int32_t> prompt, std::int32_t fresh, std::int32_t cached) {
    const std::vector<std::int32_t> more = Tokens(fresh);
    prompt.insert(prompt.end(), more.begin(), more.end());
    const double begin = Now();
    const Collected answer = Ask(std::move(prompt));
    const double seconds = Now() - begin;
    SPILLWAY_CHECK(answer.num_cached == cached) << answer.num_cached << " tokens were cached, wanted " << cached;
    return seconds;
  }
  // Until write-through has nothing left to do.
  void AwaitStores() const {
    std::int64_t stored = -1;
    while (rig_.engine->status().stored_blocks != stored) {
      stored = rig_.engine->status().stored_blocks;
      std::this_thread::sleep_for(std::chrono::milliseconds(150));
    }
  }

  Rig rig_;
  std::mt19937 random_{7};
};

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

json MeasureOverhead(const std::string& folder) {
  json links = json::array();
  for (const double megabytes : {15.0, 55.0, 110.0, 500.0}) {
    Bench bench(folder, megabytes * 1e6);
    bench.Measure(256, 32);  // warms up
    std::printf("\nlink paced to %g MB/s\n%7s %6s %7s %12s %12s %7s %9s %9s\n", megabytes, "cached", "new", "kappa",
                "ttft ms", "predicted", "error", "P_OH", "predicted");
    json points = json::array();
    std::vector<double> kappa_crits;
    std::vector<double> errors;
    for (const std::int32_t cached : {256, 1024, kMostCached}) {
      for (const std::int32_t fresh : {32, 128, kMostNew}) {
        const Bench::Point point = bench.Measure(cached, fresh);
        const double kappa = static_cast<double>(cached) / fresh;
        const double overhead = (point.restored - point.resident) / point.resident;
        const double error = point.predicted / point.restored - 1;
        errors.push_back(std::abs(error));
        if (fresh >= 128 && overhead > 0) kappa_crits.push_back(kappa / overhead);
        std::printf("%7d %6d %7.1f %12.1f %12.1f %6.1f%% %9.2f %9.2f\n", cached, fresh, kappa, 1e3 * point.restored,
                    1e3 * point.predicted, 100 * error, overhead, point.predicted_overhead);
        points.push_back({{"cached", cached},
                          {"new", fresh},
                          {"ttft_seconds", point.restored},
                          {"resident_ttft_seconds", point.resident},
                          {"predicted_ttft_seconds", point.predicted},
                          {"overhead", overhead},
                          {"predicted_overhead", point.predicted_overhead}});
      }
    }
    const double predicted = bench.model().kappa_crit();
    const double measured = kappa_crits.empty() ? 0 : Median(kappa_crits);
    std::printf(
        "kappa_crit: measured %.2f (median of kappa / P_OH, T >= 128), predicted %.2f; TTFT error: worst %.0f%%, "
        "median %.0f%%\n",
        measured, predicted, 100 * std::ranges::max(errors), 100 * Median(errors));
    links.push_back({{"link_bytes_per_second", megabytes * 1e6},
                     {"kappa_crit_measured", measured},
                     {"kappa_crit_predicted", predicted},
                     {"points", std::move(points)}});
  }
  return links;
}

}  // namespace spillway::papers_bench
