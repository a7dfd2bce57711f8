// Reports of `plan` and `replay`, and hardware from files.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "engine/known_models.h"
#include "server/hardware_file.h"
#include "server/modelled_choice.h"
#include "server/plan_report.h"
#include "server/replay_report.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(HardwareFile, ABuiltInNameIsThatMachine) {
  const auto hardware = ReadHardware("gh200");
  ASSERT_TRUE(hardware.ok()) << hardware.status();
  EXPECT_EQ(hardware->link_bytes_per_second, 400e9);
}

TEST(HardwareFile, KeysChangeTheMachineItIsBasedOn) {
  const TempFolder folder;
  folder.Write("mine.yaml", "based_on: h100\naccelerators: 2\nlink_bytes_per_second: 15e9\n");
  const auto hardware = ReadHardware(folder.File("mine.yaml"));
  ASSERT_TRUE(hardware.ok()) << hardware.status();
  EXPECT_EQ(hardware->name, "mine");
  EXPECT_EQ(hardware->accelerators, 2);
  EXPECT_EQ(LinkBytesPerSecond(*hardware), 30e9);
  EXPECT_EQ(hardware->flops_per_second, 989e12);
}

TEST(HardwareFile, ErrorsNameFileKeyAndLimit) {
  const TempFolder folder;
  const auto error_of = [&](const char* text) {
    folder.Write("bad.yaml", text);
    return std::string(ReadHardware(folder.File("bad.yaml")).status().message());
  };
  EXPECT_THAT(error_of("based_on: h100\nflops: 1"),
              AllOf(HasSubstr("bad.yaml"), HasSubstr("'flops'"), HasSubstr("flops_per_second")));
  EXPECT_THAT(error_of("based_on: h100\ncompute_efficiency: 2"), HasSubstr("'2' is not a number from 0.001 to 1"));
  EXPECT_THAT(error_of("based_on: h1000"), HasSubstr("'h1000' is not one of a100"));
  EXPECT_THAT(error_of("accelerators: 1"), HasSubstr("flops_per_second, memory_bytes"));
  EXPECT_THAT(error_of("- a"), HasSubstr("not a map"));
  EXPECT_THAT(std::string(ReadHardware("h300").status().message()), HasSubstr("'h300' is neither a file nor one of"));
}

TEST(ModelledChoice, AnUnknownModelNamesTheBuiltInOnes) {
  EXPECT_EQ(ReadModelCosts("llama-3.1-8b", {})->kv_bytes_per_token, 131'072);
  EXPECT_THAT(std::string(ReadModelCosts("no/such", {}).status().message()), HasSubstr("deepseek-v3"));
}

PlanMachine Machine(const char* name) {
  const Hardware hardware = *FindHardware(name);
  const ModelCosts costs = FindKnownModel("llama-3.1-8b")->costs;
  return {.name = name,
          .label = hardware.label,
          .is_measured = false,
          .model = CostModelOf(hardware, costs),
          .device_tokens = DeviceTokens(hardware, costs),
          .host_tokens = HostTokens(hardware, costs)};
}

TEST(PlanReport, SaysWhatFitsAndWhatLoadingSaves) {
  const auto report = PlanReport({.model = "llama-3.1-8b", .cached_tokens = 8192, .new_tokens = 256},
                                 {Machine("h100"), Machine("gh200")});
  EXPECT_EQ(report["kv_bytes_per_token"], 131'072);
  const auto& h100 = report["machines"][0];
  EXPECT_EQ(h100["source"], "described");
  EXPECT_EQ(h100["device_sessions"], std::floor((80e9 * 0.9 - 16.1e9) / 131'072 / 8448));
  const auto& seconds = h100["first_token_seconds"];
  EXPECT_LT(seconds["load"], seconds["recompute"]);
  EXPECT_NE(seconds["best"], "recompute");
  EXPECT_GT(seconds["saved_by_best"], 0);
  EXPECT_NEAR(report["machines"][1]["kappa_crit"].get<double>(), 8 * h100["kappa_crit"].get<double>(), 1e-6);
  EXPECT_THAT(ShowPlan(report), AllOf(HasSubstr("h100"), HasSubstr("gh200"), HasSubstr("described")));
}

TEST(PlanReport, WithoutALinkLoadingTakesForever) {
  PlanMachine machine = Machine("h100");
  machine.model = CostModel(machine.model.costs(), machine.model.compute(), LinkSpeed(), 1);
  const auto report = PlanReport({.model = "m", .cached_tokens = 8192, .new_tokens = 256}, {machine});
  EXPECT_EQ(report["machines"][0]["first_token_seconds"]["load"], "inf");
  EXPECT_EQ(report["machines"][0]["first_token_seconds"]["best"], "recompute");
  EXPECT_THAT(ShowPlan(report), HasSubstr("inf"));
}

ReplayResult TwoRequests() {
  ReplayResult result;
  result.requests = {{.arrived = 0,
                      .first_token = 0.1,
                      .finished = 0.5,
                      .prompt_tokens = 100,
                      .output_tokens = 5,
                      .cached_tokens = 48,
                      .cached_below_tokens = 32},
                     {.arrived = 1, .first_token = 1.3, .finished = 2.3, .prompt_tokens = 60, .output_tokens = 2},
                     {.arrived = 1, .is_refused = true}};
  result.inter_token_seconds = {0.1F, 0.1F, 0.1F, 0.1F, 1.0F};
  result.seconds = 2.5;
  result.compute_seconds = 1.25;
  result.restore_seconds = 0.5;
  return result;
}

TEST(ReplayReportTest, CountsRatesPercentilesAndGoodputAreModelled) {
  const auto slo = ParseSlo({"ttft:200", "tpot:150"});
  ASSERT_TRUE(slo.ok()) << slo.status();
  const auto report = ReplayReport("fcfs", TwoRequests(), *slo, 1, {95});
  EXPECT_EQ(report["source"], "modelled");
  EXPECT_EQ(report["completed"], 2);
  EXPECT_EQ(report["refused"], 1);
  EXPECT_DOUBLE_EQ(report["request_throughput"], 2 / 2.5);
  EXPECT_DOUBLE_EQ(report["request_goodput"], 1 / 2.5);
  EXPECT_DOUBLE_EQ(report["compute_utilisation"], 0.5);
  EXPECT_DOUBLE_EQ(report["link_utilisation"], 0.2);
  EXPECT_EQ(report["device_hit_tokens"], 16);
  EXPECT_EQ(report["host_hit_tokens"], 32);
  EXPECT_NEAR(report["median_ttft_ms"], 200, 1e-6);
  EXPECT_NEAR(report["p95_tpot_ms"], 100 + 0.95 * 900, 1e-6);
  EXPECT_NEAR(report["median_itl_ms"], 100, 1e-3);
}

TEST(ReplayReportTest, OverloadTakesThePlaceOfPercentiles) {
  ReplayResult result = TwoRequests();
  result.is_overloaded = true;
  const nlohmann::ordered_json report = {
      {"policies", nlohmann::ordered_json::array(
                       {ReplayReport("a", TwoRequests(), {}, 1, {99}), ReplayReport("b", result, {}, 1, {99})})}};
  EXPECT_FALSE(report["policies"][1].contains("median_ttft_ms"));
  EXPECT_TRUE(report["policies"][1]["overloaded"]);
  const std::string text = ShowReplay(report);
  EXPECT_THAT(text, AllOf(HasSubstr("modelled"), HasSubstr("median_ttft_ms"), HasSubstr("overloaded")));
}

TEST(ReplayReportTest, RowsAndPageCarryThePolicyAndTheLabel) {
  const std::vector<std::pair<std::string, ReplayResult>> results = {{"fcfs", TwoRequests()}};
  EXPECT_THAT(ReplayCsv(results), HasSubstr("modelled,fcfs,0,0.000000,0.100000,0.500000,100,5,48,32,0\n"));
  const nlohmann::ordered_json report = {
      {"trace", "<t>"},
      {"policies", nlohmann::ordered_json::array({ReplayReport("fcfs", TwoRequests(), {}, 1, {99})})}};
  EXPECT_THAT(ReplayPage(report, results), AllOf(HasSubstr("modelled, not measured"), HasSubstr("&lt;t>"),
                                                 Not(HasSubstr("<t>")), HasSubstr("<svg")));
}

TEST(ReplayReportTest, ABoundThatIsNoneIsRefused) {
  for (const char* text : {"ttft", "ttft:0", "speed:9", "ttft:x"}) {
    EXPECT_THAT(std::string(ParseSlo({text}).status().message()), HasSubstr("--goodput")) << text;
  }
}

}  // namespace
}  // namespace spillway
