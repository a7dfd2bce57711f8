#include "engine/cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace spillway {
namespace {

// The constants of arXiv 2601.19910 (tables 3 and 4): active parameters, KV bytes of a token, and the FLOP/s that its
// hardware factors imply. Attention is left out there, and there is no step floor.
ModelCosts Published(double active_parameters, double kv_bytes) {
  return {.flops_per_token = 2 * active_parameters, .kv_bytes_per_token = kv_bytes};
}
const ModelCosts kLlama70B = Published(70.6e9, 328e3);
const ModelCosts kQwen235B = Published(22e9, 192e3);
const ModelCosts kDeepSeekV3 = Published(37e9, 70e3);

ComputeSpeed SpeedOf(double flops_per_second) {
  return {.linear_flops_per_second = flops_per_second,
          .attention_flops_per_second = flops_per_second,
          .kv_bytes_per_second = 1e15,
          .step_floor_seconds = 0};
}
const ComputeSpeed kH100 = SpeedOf(64e9 / 34e-6);
const ComputeSpeed kC2c = SpeedOf(4.97e15);

constexpr double kCopyBytes = 4 << 20;

LinkSpeed LinkOf(double bytes_per_second) {
  LinkSpeed link;
  link.Measure(bytes_per_second, kCopyBytes, 1, 1);
  return link;
}

double KappaCrit(const ModelCosts& costs, const ComputeSpeed& compute, double bytes_per_second) {
  return CostModel(costs, compute, LinkOf(bytes_per_second), kCopyBytes).kappa_crit();
}

// The paper rounds its factors: its own 4.30e5 x 34e-6 is 14.6 where it prints 14.3.
TEST(CostModelTest, KappaCritIsThatOfThePaper) {
  EXPECT_NEAR(KappaCrit(kLlama70B, kH100, 64e9), 14.3, 14.3 * 0.04);
  EXPECT_NEAR(KappaCrit(kQwen235B, kH100, 64e9), 7.8, 7.8 * 0.02);
  EXPECT_NEAR(KappaCrit(kLlama70B, kH100, 15e9), 3.3, 3.3 * 0.05);
  EXPECT_NEAR(KappaCrit(kQwen235B, kH100, 15e9), 1.8, 1.8 * 0.02);
  EXPECT_NEAR(KappaCrit(kQwen235B, kC2c, 900e9), 41.5, 41.5 * 0.01);
  EXPECT_NEAR(KappaCrit(kDeepSeekV3, kC2c, 900e9), 191, 191 * 0.01);
  EXPECT_NEAR(KappaCrit(kQwen235B, kC2c, 8e12), 370, 370 * 0.01);
}

TEST(CostModelTest, KvprSavesWhatItsClosedFormSays) {
  const KvprShape opt67b{.hidden = 4096, .kv_width = 4096, .element_bytes = 2};
  const KvprSplit split = SplitActivations(opt67b, 312e12, 32e9, 100'000, 100'000);
  EXPECT_NEAR(1 - split.time_ratio, 0.352, 0.0005);
  EXPECT_NEAR(static_cast<double>(split.recomputed), 70'400, 100);
}

TEST(CostModelTest, KvprSplitIsTheLeastOfEverySplit) {
  const KvprShape shape{.hidden = 1024, .kv_width = 768, .element_bytes = 2};
  const double flops = 3e11;
  const double link = 5e8;
  const std::int64_t length = 777;
  const auto seconds = [&](std::int64_t l) {
    const auto inputs = static_cast<double>(l);
    const auto rest = static_cast<double>(length - l);
    return inputs * shape.hidden * shape.element_bytes / link +
           std::max(4 * inputs * shape.hidden * shape.kv_width / flops,
                    2 * rest * shape.kv_width * shape.element_bytes / link);
  };
  std::int64_t best = 0;
  for (std::int64_t l = 0; l <= length; ++l) {
    if (seconds(l) < seconds(best)) best = l;
  }
  const KvprSplit split = SplitActivations(shape, flops, link, length, length);
  EXPECT_NEAR(static_cast<double>(split.recomputed), static_cast<double>(best), 1);
  EXPECT_NEAR(split.time_ratio, seconds(split.recomputed) / seconds(0), 1e-9);
}

TEST(CostModelTest, KvprIsNothingForGroupedQueries) {
  const KvprSplit split =
      SplitActivations({.hidden = 4096, .kv_width = 1024, .element_bytes = 2}, 312e12, 32e9, 1000, 1000);
  EXPECT_EQ(split.recomputed, 0);
  EXPECT_EQ(split.time_ratio, 1);
}

TEST(CostModelTest, KvprKeepsToItsLimit) {
  const KvprSplit split =
      SplitActivations({.hidden = 4096, .kv_width = 4096, .element_bytes = 2}, 312e12, 32e9, 1000, 128);
  EXPECT_EQ(split.recomputed, 128);
  EXPECT_NEAR(split.time_ratio, 1 - 0.128 / 2, 1e-9);
}

// Home tokens whose keys and values take 20 us each on the link, their inputs half of that.
constexpr ModelCosts kStreamed{
    .flops_per_token = 4e8, .kv_bytes_per_token = 2e4, .input_bytes_per_token = 1e4, .projection_flops_per_token = 8e6};

TEST(CostModelTest, AsManyTokensAreProjectedAsLetLinkAndComputingEndTogether) {
  const CostModel model(kStreamed, SpeedOf(8e11), LinkOf(1e9), kCopyBytes);  // 10 us to project one
  StepWork work;
  work.num_tokens = 1;
  work.linear_flops = 8e9;  // 10 ms
  const std::int64_t best = model.ProjectedTokens(4000, 4000, work);
  EXPECT_NEAR(static_cast<double>(best), 3500, 1);  // 80 ms - 3500 x 10 us = 45 ms = 10 ms + 3500 x 10 us
  const auto seconds = [&](std::int64_t l) {
    const auto projected = static_cast<double>(l);
    return std::max((4000 * 2e4 - projected * 1e4) / 1e9, 0.01 + projected * 1e-5);
  };
  for (std::int64_t l = 0; l <= 4000; ++l) EXPECT_GE(seconds(l), seconds(best) - 1e-12) << l;
  EXPECT_EQ(model.ProjectedTokens(4000, 1000, work), 1000);
  work.linear_flops = 1e11;  // computing takes longer than everything on the link
  EXPECT_EQ(model.ProjectedTokens(4000, 4000, work), 0);
}

TEST(CostModelTest, WhatStreamedStepsReportIsWhatTheNextOnesAreChosenBy) {
  CostModel model(kStreamed, SpeedOf(8e11), LinkOf(1e9), kCopyBytes);
  const auto chosen = [&] { return static_cast<double>(model.ProjectedTokens(4000, 1 << 20, {})); };
  ASSERT_NEAR(chosen(), 4000, 1);
  model.OnProjection(1e9, 1e9 / 2e11);  // 40 us to project one
  EXPECT_NEAR(chosen(), 1600, 1);
  model.OnStream(1e9, 2);  // 40 us to send keys and values, 20 us less for inputs
  EXPECT_NEAR(chosen(), 2666, 1);
  for (int i = 0; i < 100; ++i) model.OnProjection(1e9, 1e9 / 4e11);  // 20 us after all
  EXPECT_NEAR(chosen(), 4000, 1);
}

TEST(CostModelTest, NothingIsProjectedFromInputsThatAreNoFewerBytes) {
  ModelCosts costs = kStreamed;
  costs.input_bytes_per_token = costs.kv_bytes_per_token;
  EXPECT_EQ(CostModel(costs, SpeedOf(8e11), LinkOf(1e9), kCopyBytes).ProjectedTokens(4000, 4000, {}), 0);
}

// A model and a machine where attention, the floor and the link all count.
const ModelCosts kSmall{.flops_per_token = 4e8,
                        .flops_per_sample = 6e7,
                        .attention_flops_per_key = 1e5,
                        .kv_bytes_per_token = 2e4,
                        .weight_bytes = 4e8};
constexpr ComputeSpeed kMachine{.linear_flops_per_second = 8e11,
                                .attention_flops_per_second = 2e11,
                                .kv_bytes_per_second = 1e10,
                                .step_floor_seconds = 0.01};

CostModel Small(double link_bytes_per_second) { return {kSmall, kMachine, LinkOf(link_bytes_per_second), kCopyBytes}; }

TEST(CostModelTest, AStepTakesItsFloorOrItsProductsThenItsAttention) {
  const CostModel model = Small(1e9);
  EXPECT_EQ(model.ComputeSeconds(1000, 0), 0);
  const double one_token = 0.01 + 1e5 * 1001 / 2e11 + 1001 * 2e4 / 1e10;
  EXPECT_NEAR(model.ComputeSeconds(1000, 1), one_token, 1e-12);
  const double many = (1000 * 4e8 + 6e7) / 8e11 + 1e5 * 1000 * (500 + 500.5) / 2e11 + 1500 * 2e4 / 1e10;
  EXPECT_NEAR(model.ComputeSeconds(500, 1000), many, 1e-12);
  StepWork batch;
  model.Add(batch, 500, 1000, true);
  model.Add(batch, 1000, 1, true);
  EXPECT_NEAR(model.StepSeconds(batch), many + (4e8 + 6e7) / 8e11 + 1e5 * 1001 / 2e11 + 1001 * 2e4 / 1e10, 1e-12);
}

TEST(CostModelTest, KappaCritAtIsWhereLoadingTakesAsLongAsComputing) {
  const CostModel model = Small(1e8);
  for (const std::int64_t tokens : {8, 64, 200}) {
    const auto loaded = static_cast<std::int64_t>(model.KappaCritAt(tokens) * static_cast<double>(tokens));
    ASSERT_GT(loaded, 0);
    StepWork work;
    model.Add(work, loaded, tokens, false);
    EXPECT_NEAR(model.LoadSeconds(loaded) / model.StepSeconds(work), 1, 0.02) << tokens;
  }
}

TEST(CostModelTest, FromTheCriticalChunkOnEveryLoadIsHidden) {
  const CostModel model = Small(1e8);
  EXPECT_NEAR(model.critical_chunk_tokens(), 396, 1e-9);  // (2e4 / 1e8 - 2e4 / 1e10) x 2e11 / 1e5
  const std::int64_t critical = 397;
  EXPECT_EQ(model.KappaCritAt(critical), std::numeric_limits<double>::infinity());
  EXPECT_LT(model.LinkOverhead(10'000'000, critical), 1);
  EXPECT_GT(model.LinkOverhead(10'000'000, critical - 20), 1);
}

TEST(CostModelTest, ASmallStepRaisesKappaCritByItsFloor) {
  ComputeSpeed reads_at_once = kMachine;
  reads_at_once.kv_bytes_per_second = 1e30;
  const CostModel model({.flops_per_token = 4e8, .kv_bytes_per_token = 2e4}, reads_at_once, LinkOf(1e8), kCopyBytes);
  const double floor_tokens = 0.01 * 8e11 / 4e8;
  EXPECT_NEAR(model.KappaCritAt(2), model.kappa_crit() * floor_tokens / 2, 1e-9);
  EXPECT_NEAR(model.KappaCritAt(1000), model.kappa_crit(), 1e-9);
}

TEST(CostModelTest, SplitIsTheLeastOfEveryBlock) {
  for (const double link : {1e6, 1e7, 3e7, 1e8, 1e9}) {
    const CostModel model = Small(link);
    for (const Backlog& backlog : {Backlog{}, Backlog{.link_seconds = 2}, Backlog{.compute_seconds = 1}}) {
      const Prefill prefill{.resident = 160, .below = 1600, .fresh = 50};
      double least = std::numeric_limits<double>::infinity();
      for (std::int64_t head = kBlockTokens; head < prefill.below; head += kBlockTokens) {
        const double seconds = std::max(backlog.link_seconds + model.LoadSeconds(prefill.below - head),
                                        backlog.compute_seconds + model.ComputeSeconds(prefill.resident, head)) +
                               model.ComputeSeconds(prefill.resident + prefill.below, prefill.fresh);
        least = std::min(least, seconds);
      }
      const Restoration split = model.Split(prefill, backlog);
      EXPECT_DOUBLE_EQ(split.seconds, least) << link;
      EXPECT_EQ(split.recomputed % kBlockTokens, 0);
      EXPECT_EQ(split.recomputed + split.loaded, prefill.below);
      const Restoration best = model.Best(prefill, backlog);
      EXPECT_LE(best.seconds, least);
      EXPECT_LE(best.seconds, model.Load(prefill, backlog).seconds);
      EXPECT_LE(best.seconds, model.Recompute(prefill, backlog).seconds);
    }
  }
}

TEST(CostModelTest, EachOfTheThreeIsBestSomewhere) {
  const Prefill prefill{.resident = 0, .below = 1600, .fresh = 50};
  EXPECT_EQ(Small(1e12).Best(prefill, {}).loaded, 1600);
  EXPECT_EQ(Small(1e4).Best(prefill, {}).recomputed, 1600);
  const Restoration split = Small(3e7).Best(prefill, {});
  EXPECT_GT(split.recomputed, 0);
  EXPECT_GT(split.loaded, 0);
  // A link with work ahead turns loading into recomputing.
  EXPECT_EQ(Small(1e9).Best(prefill, {.link_seconds = 100}).recomputed, 1600);
}

// 1 ms of the link for each token, 5 ms of computing for a block's 16; no attention, no floor, 4 layers.
CostModel Hiding() {
  return {{.flops_per_token = 1e6, .kv_bytes_per_token = 1e3, .num_layers = 4},
          {.linear_flops_per_second = 1e6 * 16 / 0.005,
           .attention_flops_per_second = 1e30,
           .kv_bytes_per_second = 1e30,
           .step_floor_seconds = 0},
          LinkOf(1e6),
          kCopyBytes};
}

TEST(CostModelTest, AStepHidesTheTailOfALoadForAsLongAsItComputes) {
  const CostModel model = Hiding();
  const Prefill prefill{.resident = 32, .below = 160, .fresh = 128, .hiding = 128};  // 160 ms of link, 40 of computing
  EXPECT_EQ(model.HiddenTokens(prefill, {}), 32);                                    // 40 ms are two whole blocks
  EXPECT_NEAR(model.Load(prefill, {}).seconds, 0.128 + 0.040 + 0.032 / 4, 1e-9);
  EXPECT_EQ(model.Load(prefill, {}).loaded, 160);
  EXPECT_EQ(model.Load(prefill, {}).recomputed, 0);
  EXPECT_EQ(model.HiddenTokens({.below = 16, .fresh = 128, .hiding = 128}, {}), 16);
  // Only the first step hides.
  const Prefill long_prefill{.below = 160, .fresh = 128, .hiding = 64};
  EXPECT_EQ(model.HiddenTokens(long_prefill, {}), 16);
  EXPECT_NEAR(model.Load(long_prefill, {}).seconds, 0.144 + 0.020 + 0.016 / 4 + 0.020, 1e-9);
}

TEST(CostModelTest, NothingIsHiddenBehindOtherLoadsOrWhereNothingMayBe) {
  const CostModel model = Hiding();
  const Prefill prefill{.below = 160, .fresh = 128, .hiding = 128};
  const Backlog backlog{.link_seconds = 1};
  EXPECT_EQ(model.HiddenTokens(prefill, backlog), 0);
  EXPECT_NEAR(model.Load(prefill, backlog).seconds, 1.160 + 0.040, 1e-9);
  EXPECT_NEAR(model.Load({.below = 160, .fresh = 128}, {}).seconds, 0.160 + 0.040, 1e-9);
  EXPECT_EQ(CostModel(kSmall, kMachine, LinkSpeed(), kCopyBytes).HiddenTokens(prefill, {}), 0);
}

// Loading costs 40 ms after all, and recomputing 45.
TEST(CostModelTest, LoadingIsChosenWhereComputingHidesIt) {
  const CostModel model = Hiding();
  const Prefill prefill{.below = 32, .fresh = 128, .hiding = 128};
  EXPECT_EQ(model.Best(prefill, {}).loaded, 32);
  EXPECT_EQ(model.Best({.below = 32, .fresh = 128}, {}).loaded, 0);
}

TEST(CostModelTest, WithoutALinkEverythingIsRecomputed) {
  const CostModel model(kSmall, kMachine, LinkSpeed(), kCopyBytes);
  EXPECT_EQ(model.Best({.resident = 0, .below = 320, .fresh = 1}, {}).recomputed, 320);
  EXPECT_EQ(model.kappa_crit(), 0);
}

// Steps of a machine other than the one that was calibrated: predictions follow it.
TEST(CostModelTest, StepReportsCorrectEverySpeed) {
  const CostModel truth(kSmall,
                        {.linear_flops_per_second = 5e11,
                         .attention_flops_per_second = 4e11,
                         .kv_bytes_per_second = 4e9,
                         .step_floor_seconds = 0.03},
                        LinkOf(1e9), kCopyBytes);
  CostModel model = Small(1e9);
  struct Step {
    std::int64_t cached;
    std::int64_t tokens;
  };
  const std::vector<Step> mix = {{0, 1000}, {8000, 1000}, {100, 1}, {20'000, 1}};
  for (int round = 0; round < 200; ++round) {
    for (const Step& step : mix) {
      StepWork work;
      model.Add(work, step.cached, step.tokens, true);
      model.OnStep(work, truth.ComputeSeconds(step.cached, step.tokens));
    }
  }
  for (const Step& step : mix) {
    EXPECT_NEAR(model.ComputeSeconds(step.cached, step.tokens) / truth.ComputeSeconds(step.cached, step.tokens), 1,
                0.02);
  }
  EXPECT_NEAR(model.compute().step_floor_seconds, 0.03, 0.03 * 0.05);
}

TEST(CostModelTest, OneStepThatStalledMovesLittle) {
  CostModel model = Small(1e9);
  StepWork work;
  model.Add(work, 0, 1000, true);
  const double before = model.StepSeconds(work);
  model.OnStep(work, 1000 * before);
  EXPECT_LT(model.StepSeconds(work), 1.2 * before);
}

TEST(CostModelTest, TransferReportsCorrectTheLink) {
  CostModel model = Small(1e9);
  EXPECT_NEAR(model.LoadSeconds(1000), 1000 * 2e4 / 1e9, 1e-12);
  for (int i = 0; i < 100; ++i) model.OnTransfer(kCopyBytes, kCopyBytes, kCopyBytes / 2e8);
  EXPECT_NEAR(model.link_bytes_per_second(), 2e8, 2e8 * 0.01);
}

TEST(SizedSpeedTest, ACostPerCopyAndABandwidthAreMetBetweenTheSizesMeasured) {
  LinkSpeed link;
  const auto seconds = [](double bytes) { return 20e-6 + bytes / 1e9; };
  for (const double bytes : {64e3, 1e6, 16e6}) link.Measure(bytes, bytes, seconds(bytes), 1);
  for (const double bytes : {64e3, 200e3, 1e6, 5e6, 16e6}) {
    EXPECT_NEAR(link.Seconds(bytes), seconds(bytes), 1e-9) << bytes;
  }
  EXPECT_NEAR(link.PerSecond(64e6), 16e6 / seconds(16e6), 1);
  EXPECT_LT(link.PerSecond(64e3), 0.8 * link.PerSecond(16e6));
}

TEST(SizedSpeedTest, NothingIsKnownBeforeAMeasurement) {
  LinkSpeed link;
  link.Measure(0, 1e6, 1, 1);
  link.Measure(1e6, 1e6, 0, 1);
  EXPECT_FALSE(link.is_known());
  EXPECT_EQ(link.PerSecond(1e6), 0);
}

TEST(ModelCostsTest, ALlamaCostsTwoFlopsPerWeightAndFourPerKey) {
  ModelConfig config;
  config.num_layers = 2;
  config.hidden = 64;
  config.inner = 160;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.vocab = 1000;
  const KvLayout layout{.num_layers = 2, .num_kv_heads = 2, .head_dim = 16, .dtype = DType::kBF16};
  const ModelCosts costs = CostsOf(config, layout, 12345);
  EXPECT_EQ(costs.flops_per_token, 2 * 2 * (64 * 128 + 64 * 64 + 3 * 64 * 160));
  EXPECT_EQ(costs.flops_per_sample, 2 * 64 * 1000);
  EXPECT_EQ(costs.attention_flops_per_key, 4 * 2 * 64);
  EXPECT_EQ(costs.kv_bytes_per_token, 2 * 2 * 2 * 16 * 2);
  EXPECT_EQ(costs.weight_bytes, 12345);
  EXPECT_EQ(costs.Flops(10, 2), 2 * costs.flops_per_token + costs.attention_flops_per_key * (11 + 12));
}

}  // namespace
}  // namespace spillway
