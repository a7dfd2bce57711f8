#include <algorithm>
#include <array>
#include <cstdio>

#include "bench/papers_bench.h"

namespace spillway::papers_bench {
namespace {

using nlohmann::json;

constexpr std::int32_t kCached[] = {32, 128, 512, 2048};
constexpr std::int32_t kNew[] = {16, 128};
constexpr int kRounds = 15;
constexpr std::int64_t kDeviceBlocks = 1024;
constexpr std::array kChoices = {LoadChoice::kLoad, LoadChoice::kRecompute, LoadChoice::kSplit, LoadChoice::kAuto};
constexpr std::size_t kFixed = 3;  // the first three

struct Outcome {
  std::array<std::vector<double>, kChoices.size()> seconds;  // until the first token
  std::vector<double> restored;                              // tokens, where the model chose
};

struct Grid {
  std::vector<std::vector<std::vector<std::int32_t>>> prefixes;  // for each (cached, new); one of them to warm up
};

Grid StoreGrid(PacedRig& rig, const EngineOptions& options, Prompts& prompts) {
  Grid grid;
  for (const std::int32_t cached : kCached) {
    for ([[maybe_unused]] const std::int32_t fresh : kNew) {
      auto& of_point = grid.prefixes.emplace_back();
      for (int i = 0; i <= kRounds; ++i) of_point.push_back(prompts.Next(cached));
      rig.Store(of_point, options, kDeviceBlocks);
    }
  }
  return grid;
}

using Engines = std::array<std::unique_ptr<Engine>, kChoices.size()>;

// The choices alternate, beginning with another one in each round: what disturbs the machine, or comes first, does so
// for all.
void Measure(const Engines& engines, const std::vector<std::int32_t>& prefix, std::int32_t fresh, Prompts& prompts,
             Outcome& outcome) {
  const std::size_t first = outcome.restored.size();
  for (std::size_t turn = 0; turn < engines.size(); ++turn) {
    const std::size_t i = (first + turn) % engines.size();
    const std::int64_t before = engines[i]->status().restored_blocks;
    outcome.seconds[i].push_back(TimeToFirstToken(*engines[i], prompts.Continue(prefix, fresh)));
    const std::int64_t restored = engines[i]->status().restored_blocks - before;
    const auto all = static_cast<std::int64_t>(prefix.size()) / kBlockTokens;
    SPILLWAY_CHECK(kChoices[i] != LoadChoice::kLoad || restored == all) << restored << " of " << all << " restored";
    SPILLWAY_CHECK(kChoices[i] != LoadChoice::kRecompute || restored == 0) << restored << " blocks were restored";
    if (kChoices[i] == LoadChoice::kAuto) outcome.restored.push_back(static_cast<double>(restored * kBlockTokens));
  }
}

json Show(std::int32_t cached, std::int32_t fresh, const Outcome& outcome, std::array<double, kFixed>& margins,
          double& worst) {
  std::array<double, kChoices.size()> seconds{};
  for (std::size_t i = 0; i < seconds.size(); ++i) seconds[i] = Median(outcome.seconds[i]);
  std::array<double, kFixed> sorted{};
  std::copy_n(seconds.begin(), kFixed, sorted.begin());
  const auto best = static_cast<std::size_t>(std::ranges::min_element(sorted) - sorted.begin());
  std::ranges::sort(sorted);
  margins[best] = std::max(margins[best], sorted[1] / sorted[0] - 1);
  const double behind = seconds.back() / sorted[0] - 1;
  worst = std::max(worst, behind);
  const std::string name(kLoadChoiceNames[static_cast<std::size_t>(kChoices[best])]);
  std::printf("%7d %6d %9.2f %9.2f %9.2f %9.2f %8.1f%% %9.0f  %s by %.0f%%\n", cached, fresh, 1e3 * seconds[0],
              1e3 * seconds[1], 1e3 * seconds[2], 1e3 * seconds[3], 100 * behind, Median(outcome.restored),
              name.c_str(), 100 * (sorted[1] / sorted[0] - 1));
  std::fflush(stdout);
  return {{"cached", cached},
          {"new", fresh},
          {"load_seconds", seconds[0]},
          {"recompute_seconds", seconds[1]},
          {"split_seconds", seconds[2]},
          {"chosen_seconds", seconds[3]},
          {"chosen_restored_tokens", Median(outcome.restored)},
          {"best", name}};
}

}  // namespace

json MeasureChoices(PacedRig& rig, const std::vector<double>& links) {
  EngineOptions options;
  options.max_model_len = 8192;
  options.max_num_batched_tokens = kStepTokens;
  Prompts prompts(11);
  const Grid grid = StoreGrid(rig, options, prompts);
  std::array<double, kFixed> margins{};
  double worst = 0;
  json all = json::array();
  for (const double link : links) {
    options.link_bytes_per_second = link;
    Engines engines;
    for (std::size_t i = 0; i < engines.size(); ++i) {
      options.load_choice = kChoices[i];
      engines[i] = rig.MakeEngine(options, kDeviceBlocks, nullptr);
      WarmUp(*engines[i], kDeviceBlocks, prompts, std::vector<std::int32_t>(std::begin(kNew), std::end(kNew)));
    }
    std::vector<Outcome> warm_up(grid.prefixes.size());
    std::vector<Outcome> outcomes(grid.prefixes.size());
    for (int round = 0; round <= kRounds; ++round) {
      for (std::size_t i = 0; i < grid.prefixes.size(); ++i) {
        Measure(engines, grid.prefixes[i][static_cast<std::size_t>(round)], kNew[i % std::size(kNew)], prompts,
                round == 0 ? warm_up[i] : outcomes[i]);
      }
    }
    std::printf(
        "\nlink paced to %g MB/s; milliseconds to the first token, medians of %d\n%7s %6s %9s %9s %9s %9s %9s %9s  "
        "%s\n",
        link / 1e6, kRounds, "cached", "new", "load", "recompute", "split", "chosen", "to best", "loaded", "best");
    json rows = json::array();
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
      rows.push_back(Show(kCached[i / std::size(kNew)], kNew[i % std::size(kNew)], outcomes[i], margins, worst));
    }
    all.push_back({{"link_bytes_per_second", link}, {"points", std::move(rows)}});
  }
  std::printf(
      "\nchosen against the best: %.1f %% slower at most; best by at most: load %.0f %%, recompute %.0f %%, split %.0f "
      "%%\n",
      100 * worst, 100 * margins[0], 100 * margins[1], 100 * margins[2]);
  return {{"links", std::move(all)}, {"worst", worst}, {"margins", margins}};
}

}  // namespace spillway::papers_bench
