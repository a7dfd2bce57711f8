#include <algorithm>
#include <cmath>
#include <cstdio>

#include "bench/papers_bench.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;

constexpr std::int32_t kCached[] = {64, 256, 1024, 4096};
constexpr std::int32_t kNew[] = {16, 64, 256};
constexpr int kRounds = 7;
constexpr std::int64_t kDeviceBlocks = (kRounds + 1) * (4096 + 256) / kBlockTokens;

// Seconds until the first token, by round.
class Timed {
 public:
  void Add(double measured, double predicted) {
    measured_.push_back(measured);
    predicted_.push_back(predicted);
  }
  double measured() const { return Median(measured_); }
  double predicted() const { return Median(predicted_); }
  double error() const { return predicted() / measured() - 1; }

 private:
  std::vector<double> measured_;
  std::vector<double> predicted_;
};

struct Point {
  std::int32_t cached = 0;
  std::int32_t fresh = 0;
  Timed by_layer{};  // the prefix is below the device, its tail comes up inside
                     // the step
  Timed whole{};     // all of it comes up before the step
  Timed resident{};  // it is on the device

  double kappa() const { return static_cast<double>(cached) / fresh; }
  // P_OH tells of the load and of computing apart, so of loads that nothing
  // hides.
  double overhead() const { return whole.measured() / resident.measured() - 1; }
  double overhead_predicted() const { return whole.predicted() / resident.predicted() - 1; }
  double worst_error() const { return std::max(std::abs(by_layer.error()), std::abs(whole.error())); }
};

std::vector<Point> Grid() {
  std::vector<Point> points;
  for (const std::int32_t cached : kCached) {
    SPILLWAY_CHECK(cached % kBlockTokens == 0);
    for (const std::int32_t fresh : kNew) points.push_back({.cached = cached, .fresh = fresh});
  }
  return points;
}

struct Engines {
  std::unique_ptr<Engine> by_layer{};
  std::unique_ptr<Engine> whole{};
};

using Prefixes = std::vector<std::vector<std::int32_t>>;

void Measure(Engine& engine, const std::vector<std::int32_t>& prefix, const Prefill& prefill, Prompts& prompts,
             Timed& timed) {
  const EngineStatus before = engine.status();
  const double predicted = before.cost_model->Load(prefill, {}).seconds;
  timed.Add(TimeToFirstToken(engine, prompts.Continue(prefix, static_cast<std::int32_t>(prefill.fresh))), predicted);
  const std::int64_t restored = engine.status().restored_blocks - before.restored_blocks;
  SPILLWAY_CHECK(restored == prefill.below / kBlockTokens) << restored << " blocks were restored";
}

// `prefix` is in the host tier, and was not asked of the engines before; then it is on the device.
void Measure(const Engines& engines, const std::vector<std::int32_t>& prefix, Prompts& prompts, Point& point) {
  const Prefill whole{.below = point.cached, .fresh = point.fresh};
  Prefill by_layer = whole;
  by_layer.hiding = std::min(point.fresh, kStepTokens);
  Measure(*engines.by_layer, prefix, by_layer, prompts, point.by_layer);
  Measure(*engines.whole, prefix, whole, prompts, point.whole);
  Measure(*engines.whole, prefix, {.resident = point.cached, .fresh = point.fresh}, prompts, point.resident);
}

void Show(const Point& point) {
  std::printf("%7d %6d %7.1f", point.cached, point.fresh, point.kappa());
  for (const Timed& timed : {point.by_layer, point.whole, point.resident}) {
    std::printf(" %9.1f %9.1f %6.1f%%", 1e3 * timed.measured(), 1e3 * timed.predicted(), 100 * timed.error());
  }
  std::printf(" %8.2f %8.2f\n", point.overhead(), point.overhead_predicted());
  std::fflush(stdout);
}

json ToJson(const Point& point) {
  const auto of = [](const Timed& timed) {
    return json{{"ttft_seconds", timed.measured()}, {"predicted_ttft_seconds", timed.predicted()}};
  };
  return {{"cached", point.cached},
          {"new", point.fresh},
          {"by_layer", of(point.by_layer)},
          {"whole", of(point.whole)},
          {"resident", of(point.resident)},
          {"overhead", point.overhead()},
          {"predicted_overhead", point.overhead_predicted()}};
}

// kappa / P_OH where P_OH is nearest to 1: the kappa at which loading takes as
// long as computing so many new tokens.
json ShowKappaCrit(const std::vector<Point>& points, std::int32_t fresh) {
  const Point* nearest = nullptr;
  const auto distance = [](const Point& point) { return std::abs(std::log(std::max(point.overhead(), 1e-3))); };
  for (const Point& point : points) {
    if (point.fresh == fresh && (nearest == nullptr || distance(point) < distance(*nearest))) nearest = &point;
  }
  const double measured = nearest->kappa() / nearest->overhead();
  const double predicted = nearest->kappa() / nearest->overhead_predicted();
  std::printf(
      "  %d new tokens: kappa_crit measured %.2f, predicted %.2f (at "
      "kappa %.1f)\n",
      fresh, measured, predicted, nearest->kappa());
  return {{"new", fresh}, {"kappa", nearest->kappa()}, {"measured", measured}, {"predicted", predicted}};
}

}  // namespace

json MeasureOverhead(PacedRig& rig, const std::vector<double>& links) {
  EngineOptions options;
  options.max_model_len = 8192;
  options.max_num_batched_tokens = kStepTokens;
  Prompts prompts(7);
  std::vector<Prefixes> prefixes;  // by point, then round
  for (const Point& point : Grid()) {
    auto& of_point = prefixes.emplace_back();
    for (int i = 0; i < kRounds; ++i) of_point.push_back(prompts.Next(point.cached));
    rig.Store(of_point, options, kDeviceBlocks);
  }
  json all = json::array();
  for (const double link : links) {
    options.link_bytes_per_second = link;
    options.layer_loads = LayerLoads::kNever;
    Engines engines{.whole = rig.MakeEngine(options, kDeviceBlocks, nullptr)};
    options.layer_loads = LayerLoads::kHidden;
    engines.by_layer = rig.MakeEngine(options, kDeviceBlocks, nullptr);
    for (Engine* const each : {engines.whole.get(), engines.by_layer.get()}) {
      WarmUp(*each, kDeviceBlocks, prompts, std::vector<std::int32_t>(std::begin(kNew), std::end(kNew)));
    }
    std::printf(
        "\nlink paced to %g MB/s; milliseconds to the first token, "
        "predicted, error: loaded by layer, whole, on the "
        "device; medians of %d\n%7s %6s %7s %9s %9s %7s %9s %9s %7s "
        "%9s %9s %7s %8s %8s\n",
        link / 1e6, kRounds, "cached", "new", "kappa", "by layer", "predicted", "error", "whole", "predicted", "error",
        "on device", "predicted", "error", "P_OH", "predicted");
    std::vector<Point> points = Grid();
    // All points in every round: the machine's speed changes within seconds, and each of them sees all of it.
    for (std::size_t round = 0; round < kRounds; ++round) {
      for (std::size_t i = 0; i < points.size(); ++i) Measure(engines, prefixes[i][round], prompts, points[i]);
    }
    json rows = json::array();
    for (const Point& point : points) {
      Show(point);
      rows.push_back(ToJson(point));
    }
    double worst = 0;
    for (const Point& point : points) worst = std::max(worst, point.worst_error());
    const auto num_within = [&](Timed Point::*timed) {
      return std::ranges::count_if(points,
                                   [&](const Point& point) { return std::abs((point.*timed).error()) <= 0.15; });
    };
    const CostModel model = *engines.by_layer->status().cost_model;
    std::printf(
        "within 15 %%: %td and %td of %zu, worst %.1f %%; kappa_crit "
        "of matrix products alone, predicted: %.2f\n",
        num_within(&Point::by_layer), num_within(&Point::whole), points.size(), 100 * worst, model.kappa_crit());
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
