// Traces, the virtual link, described hardware, and replays whose every number can be worked out by hand.

#include "engine/replay.h"

#include <algorithm>
#include <fstream>
#include <string>
#include <vector>

#include "engine/hardware.h"
#include "engine/known_models.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class TraceFile {
 public:
  explicit TraceFile(const std::string& text) { std::ofstream(path()) << text; }
  std::string path() const { return folder_.path() + "/trace.jsonl"; }

 private:
  TempFolder folder_;
};

TEST(TraceTest, MooncakeLinesInOrderOfArrival) {
  const TraceFile file(
      "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7, 9]}\n"
      "{\"timestamp\": 1000, \"input_length\": 512, \"output_length\": 1, \"hash_ids\": [7]}\n");
  const auto trace = ReadTrace(file.path());
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->requests.size(), 2U);
  EXPECT_EQ(trace->requests[0].prompt_tokens, 512);
  EXPECT_EQ(trace->requests[0].arrival_seconds, 0);
  EXPECT_EQ(trace->requests[1].arrival_seconds, 2);
  EXPECT_EQ(trace->requests[1].output_tokens, 5);
  EXPECT_THAT(trace->requests[1].ids, ElementsAre(7, 9));
}

TEST(TraceTest, AzureRowsShareNothing) {
  const TraceFile file(
      "TIMESTAMP,ContextTokens,GeneratedTokens\n"
      "2023-11-16 18:17:03.9799600,4808,10\n"
      "2023-11-16 18:17:04.0319600,318,8\n");
  const auto trace = ReadTrace(file.path());
  ASSERT_TRUE(trace.ok()) << trace.status();
  ASSERT_EQ(trace->requests.size(), 2U);
  EXPECT_NEAR(trace->requests[1].arrival_seconds, 0.052, 1e-6);
  EXPECT_EQ(trace->requests[0].ids.size(), 10U);
  EXPECT_THAT(trace->requests[1].ids, ElementsAre(10));
}

TEST(TraceTest, ErrorsNameFileLineAndField) {
  struct Case {
    const char* text;
    const char* error;
  };
  for (const Case& each : std::vector<Case>{
           {"{\"timestamp\": 0, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [7]}", "2 ids"},
           {"{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 5, \"hash_ids\": []}", "input_length is 0"},
           {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 5, \"hash_ids\": [-1]}", "holds -1"},
           {"{\"input_length\": 5}", "timestamp"},
           {"[1]", "not a JSON object"},
           {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9,x,10", ":2: 'x'"},
           {"TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,10", ":2: wanted TIMESTAMP"},
           {"", "no requests"}}) {
    const TraceFile file(each.text);
    EXPECT_THAT(std::string(ReadTrace(file.path()).status().message()), HasSubstr(each.error)) << each.text;
  }
  EXPECT_EQ(ReadTrace("/nonexistent").status().code(), absl::StatusCode::kNotFound);
}

TEST(TraceTest, EqualIdsAreEqualTokensAndOthersAreNot) {
  const Trace trace;
  const TraceRequest one{.arrival_seconds = 0, .prompt_tokens = 1024, .output_tokens = 1, .ids = {3, 4}};
  const TraceRequest two{.arrival_seconds = 0, .prompt_tokens = 1000, .output_tokens = 1, .ids = {3, 5}};
  for (const std::int32_t vocab : {0, 32000}) {
    const auto first = PromptOf(trace, one, vocab);
    const auto second = PromptOf(trace, two, vocab);
    ASSERT_EQ(second.size(), 1000U);
    EXPECT_TRUE(std::equal(first.begin(), first.begin() + 512, second.begin()));
    EXPECT_FALSE(std::equal(first.begin() + 512, first.begin() + 1000, second.begin() + 512));
    EXPECT_TRUE(vocab == 0 || std::ranges::max(first) < vocab);
  }
}

TEST(HardwareTest, EightH100HoldSeventyBillionWeightsAndTheRestIsKv) {
  const Hardware hardware = *FindHardware("4x8xh100");
  const ModelCosts costs = FindKnownModel("llama-3.1-70b")->costs;
  EXPECT_EQ(costs.kv_bytes_per_token, 327'680);
  EXPECT_NEAR(DeviceTokens(hardware, costs), (8 * 80e9 * 0.9 - 141e9) / 327'680, 1);
  EXPECT_EQ(LinkBytesPerSecond(hardware), 300e9);  // less than eight links' sum
  const CostModel model = CostModelOf(hardware, costs);
  EXPECT_NEAR(model.kappa_crit(), 2 * 70.6e9 / 327'680 * 300e9 / (8 * 989e12 * 0.5), 1e-9);
  EXPECT_NEAR(model.compute().step_floor_seconds, 141e9 / (8 * 3350e9 * 0.8) + 0.003, 1e-9);
  EXPECT_EQ(DeviceTokens(*FindHardware("h100"), costs), 0);  // one does not
  EXPECT_EQ(FindHardware("abacus"), std::nullopt);
}

// 1 ms a token, 0.1 ms a token on the link, no attention, no floor.
constexpr ModelCosts kCosts{.flops_per_token = 1e6, .kv_bytes_per_token = 1e3};
CostModel Model() {
  LinkSpeed link;
  link.Measure(1e7, 16e3, 1, 1);
  return {kCosts,
          {.linear_flops_per_second = 1e9,
           .attention_flops_per_second = 1e9,
           .kv_bytes_per_second = 1e18,
           .step_floor_seconds = 0},
          link,
          16e3};
}

TraceRequest Request(double arrival, std::int32_t prompt, std::int32_t output, std::vector<std::int32_t> ids) {
  return {.arrival_seconds = arrival, .prompt_tokens = prompt, .output_tokens = output, .ids = std::move(ids)};
}

ReplayOptions Blocks(std::uint32_t device, std::uint32_t host) {
  ReplayOptions options;
  options.scheduling.max_num_batched_tokens = 4096;
  options.device_blocks = device;
  options.host_blocks = host;
  return options;
}

ReplayResult Replayed(const Trace& trace, const ReplayOptions& options) {
  auto result = RunReplay(trace, Model(), options, nullptr);
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

constexpr double kClose = 1e-6;

TEST(ReplayTest, ARequestAloneTakesItsPrefillAndItsSteps) {
  const ReplayResult result = Replayed({.name = "", .requests = {Request(0, 512, 3, {1})}}, Blocks(64, 0));
  const ReplayedRequest& request = result.requests.front();
  EXPECT_NEAR(request.first_token, 0.512, kClose);
  EXPECT_NEAR(request.finished, 0.514, kClose);
  EXPECT_NEAR(result.compute_seconds, 0.514, kClose);
  EXPECT_EQ(result.num_steps, 3);
  ASSERT_EQ(result.inter_token_seconds.size(), 2U);
  EXPECT_NEAR(result.inter_token_seconds[0], 0.001, kClose);
  EXPECT_FALSE(result.is_overloaded);
}

TEST(ReplayTest, WhatTheDeviceHasIsNotComputedAgain) {
  const Trace trace{.name = "", .requests = {Request(0, 1024, 1, {1, 2}), Request(10, 1024, 1, {1, 3})}};
  const ReplayResult result = Replayed(trace, Blocks(256, 0));
  EXPECT_EQ(result.requests[1].cached_tokens, 512);
  EXPECT_EQ(result.requests[1].cached_below_tokens, 0);
  EXPECT_NEAR(result.requests[1].first_token, 10.512, kClose);
}

// The device holds one prompt; the second evicts the first, the third finds it in the host tier.
TEST(ReplayTest, WhatWasEvictedComesUpFromTheHostTier) {
  const Trace trace{
      .name = "",
      .requests = {Request(0, 1024, 1, {1, 2}), Request(10, 1024, 1, {3, 4}), Request(20, 1024, 1, {1, 2})}};
  const ReplayResult with = Replayed(trace, Blocks(64, 256));
  EXPECT_EQ(with.requests[2].cached_below_tokens, 1008);  // all but the last block, which is computed
  EXPECT_NEAR(with.requests[2].first_token, 20 + 63 * 16e-4 + 0.016, kClose);
  EXPECT_NEAR(with.restore_seconds, 63 * 16e-4, kClose);
  EXPECT_GT(with.store_seconds, 0);
  const ReplayResult without = Replayed(trace, Blocks(64, 0));
  EXPECT_EQ(without.requests[2].cached_tokens, 0);
  EXPECT_NEAR(without.requests[2].first_token, 21.024, kClose);
}

// Of the prefix's 64 blocks 4 come up before the step and 60 inside it: 96 ms for the 96 tokens behind it.
TEST(ReplayTest, AStepHidesTheLoadOfAPrefixWhereLayersLoad) {
  const Trace trace{
      .name = "",
      .requests = {Request(0, 1024, 1, {1, 2}), Request(10, 1024, 1, {3, 4}), Request(20, 1120, 1, {1, 2, 5})}};
  ReplayOptions options = Blocks(72, 256);
  const double whole = Replayed(trace, options).requests[2].first_token;
  EXPECT_NEAR(whole, 20 + 64 * 16e-4 + 0.096, kClose);
  options.scheduling.layer_loads = LayerLoads::kHidden;
  const ReplayResult hidden = Replayed(trace, options);
  EXPECT_EQ(hidden.requests[2].cached_below_tokens, 1024);
  EXPECT_NEAR(hidden.requests[2].first_token, 20 + 4 * 16e-4 + 0.096 + 60 * 16e-4, kClose);  // one layer hides nothing
  EXPECT_NEAR(hidden.restore_seconds, 64 * 16e-4, kClose);
}

// A prefix of 1008 tokens behind a link that takes 2.4 ms a token, where computing one takes 1.
TEST(ReplayTest, WhatLowerTiersHaveIsLoadedOrRecomputedAsChosen) {
  const Trace trace{
      .name = "",
      .requests = {Request(0, 1024, 1, {1, 2}), Request(10, 1024, 1, {3, 4}), Request(20, 1024, 1, {1, 2})}};
  LinkSpeed link;
  link.Measure(1e3 / 2.4e-3, 16e3, 1, 1);
  const CostModel model(kCosts, Model().compute(), link, 16e3);
  ReplayOptions options = Blocks(64, 256);
  const auto third = [&](LoadChoice choice) {
    options.scheduling.load_choice = choice;
    const auto result = RunReplay(trace, model, options, nullptr);
    EXPECT_TRUE(result.ok()) << result.status();
    return result->requests[2];
  };
  EXPECT_EQ(third(LoadChoice::kLoad).cached_below_tokens, 1008);
  EXPECT_NEAR(third(LoadChoice::kLoad).first_token, 20 + 1008 * 2.4e-3 + 0.016, kClose);
  EXPECT_EQ(third(LoadChoice::kRecompute).cached_below_tokens, 0);
  EXPECT_NEAR(third(LoadChoice::kRecompute).first_token, 20 + 1.024, kClose);
  const ReplayedRequest split = third(LoadChoice::kAuto);
  EXPECT_EQ(split.cached_below_tokens, 288);  // 0.69 s, while 720 tokens take 0.72
  EXPECT_NEAR(split.first_token, 20 + 0.720 + 0.016, kClose);
}

TEST(ReplayTest, TheSameTraceGivesTheSameResult) {
  Trace trace;
  for (int i = 0; i < 60; ++i) trace.requests.push_back(Request(0.2 * i, 700, 4, {i % 7, 100 + i % 3}));
  const ReplayResult once = Replayed(trace, Blocks(96, 512));
  const ReplayResult again = Replayed(trace, Blocks(96, 512));
  for (std::size_t i = 0; i < trace.requests.size(); ++i) {
    EXPECT_EQ(once.requests[i].first_token, again.requests[i].first_token);
    EXPECT_EQ(once.requests[i].finished, again.requests[i].finished);
    EXPECT_GT(once.requests[i].finished, 0) << "every request ends";
  }
  EXPECT_EQ(once.num_steps, again.num_steps);
}

TEST(ReplayTest, ArrivalsFasterThanTheMachineAreCalledOverload) {
  Trace trace;
  for (int i = 0; i < 300; ++i) trace.requests.push_back(Request(i, 512, 1, {i}));  // half of what it can do
  EXPECT_FALSE(Replayed(trace, Blocks(128, 0)).is_overloaded);
  ReplayOptions fast = Blocks(128, 0);
  fast.time_scale = 4;
  EXPECT_TRUE(Replayed(trace, fast).is_overloaded);
}

TEST(ReplayTest, APromptThatNeverFitsIsRefusedAndTheOthersGoOn) {
  const Trace trace{.name = "", .requests = {Request(0, 2000, 1, {1, 2, 3, 4}), Request(1, 512, 1, {5})}};
  const ReplayResult result = Replayed(trace, Blocks(64, 0));
  EXPECT_TRUE(result.requests[0].is_refused);
  EXPECT_NEAR(result.requests[1].first_token, 1.512, kClose);
}

TEST(ReplayTest, PrefixRoutingKeepsABeginningOnOneReplica) {
  Trace trace;
  for (int i = 0; i < 8; ++i) {
    trace.requests.push_back(Request(10 * i, 1024, 1, {i / 2 % 2, 100 + i}));
  }
  ReplayOptions options = Blocks(256, 0);
  options.replicas = 2;
  const auto hits = [&](Routing routing) {
    options.routing = routing;
    std::int64_t tokens = 0;
    for (const ReplayedRequest& request : Replayed(trace, options).requests) tokens += request.cached_tokens;
    return tokens;
  };
  EXPECT_EQ(hits(Routing::kPrefix), 6 * 512);
  EXPECT_EQ(hits(Routing::kRoundRobin), 4 * 512);
}

TEST(ReplayTest, OptionsWithoutRoomAreRefused) {
  const Trace trace{.name = "", .requests = {Request(0, 16, 1, {1})}};
  EXPECT_FALSE(RunReplay(trace, Model(), Blocks(0, 0), nullptr).ok());
}

}  // namespace
}  // namespace spillway
