#include <cmath>
#include <cstdio>

#include "bench/papers_bench.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;

constexpr std::int32_t kCached[] = {64, 256, 1024, 4096};
constexpr std::int32_t kNew[] = {16, 64, 256};
constexpr int kRepeats = 3;
constexpr std::int64_t kDeviceBlocks = 2 * (4096 + 256) / kBlockTokens;

struct Point {
  std::int32_t cached = 0;
  std::int32_t fresh = 0;
  // Medians. Seconds until the first token with the prefix below the device, then with it there.
  double restored = 0;
  double restored_predicted = 0;
  double resident = 0;
  double resident_predicted = 0;

  double kappa() const { return static_cast<double>(cached) / fresh; }
  double overhead() const { return (restored - resident) / resident; }
  double overhead_predicted() const { return (restored_predicted - resident_predicted) / resident_predicted; }
  double error() const { return restored_predicted / restored - 1; }
};

// Below the device: in the host tier, and not asked of `engine` before.
Point Measure(Engine& engine, const std::vector<std::vector<std::int32_t>>& prefixes, std::int32_t fresh,
              Prompts& prompts) {
  Point point{.cached = static_cast<std::int32_t>(prefixes.front().size()), .fresh = fresh};
  std::vector<double> restored;
  std::vector<double> restored_predicted;
  std::vector<double> resident;
  std::vector<double> resident_predicted;
  for (const std::vector<std::int32_t>& prefix : prefixes) {
    const EngineStatus before = engine.status();
    restored_predicted.push_back(before.cost_model->Load({.below = point.cached, .fresh = fresh}, {}).seconds);
    restored.push_back(TimeToFirstToken(engine, prompts.Continue(prefix, fresh)));
    const EngineStatus after = engine.status();
    SPILLWAY_CHECK(after.restored_blocks - before.restored_blocks == point.cached / kBlockTokens)
        << after.restored_blocks - before.restored_blocks << " blocks of " << point.cached << " tokens were restored";
    resident_predicted.push_back(after.cost_model->Load({.resident = point.cached, .fresh = fresh}, {}).seconds);
    resident.push_back(TimeToFirstToken(engine, prompts.Continue(prefix, fresh)));
    SPILLWAY_CHECK(engine.status().restored_blocks == after.restored_blocks) << "the prefix was not on the device";
  }
  point.restored = Median(restored);
  point.restored_predicted = Median(restored_predicted);
  point.resident = Median(resident);
  point.resident_predicted = Median(resident_predicted);
  return point;
}

void Show(const Point& point) {
  std::printf("%7d %6d %7.1f %10.1f %10.1f %6.1f%% %10.1f %10.1f %8.2f %8.2f\n", point.cached, point.fresh,
              point.kappa(), 1e3 * point.restored, 1e3 * point.restored_predicted, 100 * point.error(),
              1e3 * point.resident, 1e3 * point.resident_predicted, point.overhead(), point.overhead_predicted());
  std::fflush(stdout);
}

// kappa / P_OH where P_OH is nearest to 1: the kappa at which loading takes as long as computing so many new tokens.
json ShowKappaCrit(const std::vector<Point>& points, std::int32_t fresh) {
  const Point* nearest = nullptr;
  const auto distance = [](const Point& point) { return std::abs(std::log(std::max(point.overhead(), 1e-3))); };
  for (const Point& point : points) {
    if (point.fresh == fresh && (nearest == nullptr || distance(point) < distance(*nearest))) nearest = &point;
  }
  const double measured = nearest->kappa() / nearest->overhead();
  const double predicted = nearest->kappa() / nearest->overhead_predicted();
  std::printf("  %d new tokens: kappa_crit measured %.2f, predicted %.2f (at kappa %.1f)\n", fresh, measured, predicted,
              nearest->kappa());
  return {{"new", fresh}, {"kappa", nearest->kappa()}, {"measured", measured}, {"predicted", predicted}};
}

}  // namespace

json MeasureOverhead(PacedRig& rig, const std::vector<double>& links) {
  EngineOptions options;
  options.max_model_len = 8192;
  options.max_num_batched_tokens = kStepTokens;
  Prompts prompts(7);
  std::vector<std::vector<std::vector<std::int32_t>>> prefixes;  // for each (cached, new)
  for (const std::int32_t cached : kCached) {
    for ([[maybe_unused]] const std::int32_t fresh : kNew) {
      auto& of_point = prefixes.emplace_back();
      for (int i = 0; i < kRepeats; ++i) of_point.push_back(prompts.Next(cached));
      rig.Store(of_point, options, kDeviceBlocks);
    }
  }
  json all = json::array();
  for (const double link : links) {
    options.link_bytes_per_second = link;
    const std::unique_ptr<Engine> engine = rig.MakeEngine(options, kDeviceBlocks, nullptr);
    for (const std::int32_t fresh : kNew) TimeToFirstToken(*engine, prompts.Next(fresh));
    std::printf("\nlink paced to %g MB/s; medians of %d\n%7s %6s %7s %10s %10s %7s %10s %10s %8s %8s\n", link / 1e6,
                kRepeats, "cached", "new", "kappa", "ttft ms", "predicted", "error", "on device", "predicted", "P_OH",
                "predicted");
    std::vector<Point> points;
    json rows = json::array();
    for (std::size_t i = 0; const std::int32_t cached : kCached) {
      SPILLWAY_CHECK(cached % kBlockTokens == 0);
      for (const std::int32_t fresh : kNew) {
        const Point& point = points.emplace_back(Measure(*engine, prefixes[i++], fresh, prompts));
        Show(point);
        rows.push_back({{"cached", point.cached},
                        {"new", point.fresh},
                        {"ttft_seconds", point.restored},
                        {"predicted_ttft_seconds", point.restored_predicted},
                        {"resident_ttft_seconds", point.resident},
                        {"predicted_resident_ttft_seconds", point.resident_predicted},
                        {"overhead", point.overhead()},
                        {"predicted_overhead", point.overhead_predicted()}});
      }
    }
    double worst = 0;
    for (const Point& point : points) worst = std::max(worst, std::abs(point.error()));
    const CostModel model = *engine->status().cost_model;
    std::printf("worst error %.1f %%; kappa_crit of matrix products alone, predicted: %.2f\n", 100 * worst,
                model.kappa_crit());
    json crits = json::array();
    for (const std::int32_t fresh : kNew) crits.push_back(ShowKappaCrit(points, fresh));
    all.push_back({{"link_bytes_per_second", link},
                   {"worst_error", worst},
                   {"kappa_crit_predicted", model.kappa_crit()},
                   {"kappa_crit", std::move(crits)},
                   {"points", std::move(rows)}});
  }
  return all;
}

}  // namespace spillway::papers_bench
