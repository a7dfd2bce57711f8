// The really trained stories260K against its golden output (float64, computed independently): ../shared/models.

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/tokenizer.h"
#include "gtest/gtest.h"
#include "tests/support/engine_harness.h"
#include "tests/support/shared_data.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

nlohmann::json Golden(const std::string& folder) {
  std::ifstream file(folder + "/golden.json");
  return nlohmann::json::parse(file);
}

// How many leading tokens bf16 must reproduce: up to the first step whose two best are closer than 0.05.
std::size_t BeforeNearTie(const nlohmann::json& run) {
  const auto& steps = run["top5_logprobs"];
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (steps[i][0][1].get<double>() - steps[i][1][1].get<double>() < 0.05) return i;
  }
  return steps.size();
}

struct GoldenCase {
  const char* folder;
  const char* target;
  DTypeChoice dtype;
};

class Golden700 : public ::testing::TestWithParam<GoldenCase> {};

TEST_P(Golden700, GreedyTokensAndLogprobs) {
  SPILLWAY_SHARED_OR_SKIP(root, "models/stories260K");
  CpuDeviceOptions device_options;
  device_options.target = GetParam().target;
  EngineOptions options;
  options.overlap_steps = true;
  options.max_num_batched_tokens = 64;
  const std::string folder = root + "/" + GetParam().folder;
  if (absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice(device_options); !device.ok()) {
    GTEST_SKIP() << device.status();
  }
  Rig rig = Rig::Make(folder, options, device_options, GetParam().dtype);
  const bool is_exact = rig.engine->model().dtype() == DType::kF32;
  const nlohmann::json golden = Golden(root);
  std::vector<SequenceRequest> requests;
  for (const auto& run : golden["generate"]) {
    SequenceRequest request = MakeRequest(run["prompt_ids"].get<std::vector<std::int32_t>>(),
                                          static_cast<std::int32_t>(run["output_ids"].size()));
    request.sampling.num_logprobs = 5;
    request.sampling.ignore_eos = false;
    requests.push_back(std::move(request));
  }
  const std::vector<Collected> collected = rig.Run(std::move(requests));
  std::size_t num_compared = 0;
  for (std::size_t i = 0; i < collected.size(); ++i) {
    const auto& run = golden["generate"][i];
    const auto expected = run["output_ids"].get<std::vector<std::int32_t>>();
    const std::size_t compared = is_exact ? expected.size() : BeforeNearTie(run);
    num_compared += compared;
    ASSERT_GE(collected[i].tokens.size(), compared) << run["prompt"];
    for (std::size_t step = 0; step < compared; ++step) {
      const SampledToken& token = collected[i].tokens[step];
      ASSERT_EQ(token.token, expected[step]) << run["prompt"] << " step " << step;
      EXPECT_EQ(token.rank, 1);
      const auto& top = run["top5_logprobs"][step];
      const double tolerance = is_exact ? 1e-4 : 0.15;
      EXPECT_NEAR(token.logprob, top[0][1].get<double>(), tolerance) << run["prompt"] << " step " << step;
      if (!is_exact) continue;
      ASSERT_EQ(token.top.size(), 5U);
      for (std::size_t k = 0; k < 5; ++k) EXPECT_NEAR(token.top[k].logprob, top[k][1].get<double>(), 1e-4);
    }
  }
  EXPECT_EQ(num_compared, is_exact ? 700U : 387U);
}

INSTANTIATE_TEST_SUITE_P(
    Stories260K, Golden700,
    ::testing::Values(
        GoldenCase{"hf", "auto", DTypeChoice::kAuto}, GoldenCase{"hf", "reference", DTypeChoice::kAuto},
        GoldenCase{"hf", "avx2", DTypeChoice::kAuto}, GoldenCase{"hf", "scalar", DTypeChoice::kAuto},
        GoldenCase{"hf-hd64", "auto", DTypeChoice::kAuto}, GoldenCase{"hf-hd128", "auto", DTypeChoice::kAuto},
        GoldenCase{"hf-bf16", "auto", DTypeChoice::kAuto}, GoldenCase{"hf-bf16", "avx2", DTypeChoice::kAuto},
        GoldenCase{"hf-bf16", "reference", DTypeChoice::kAuto}, GoldenCase{"hf", "auto", DTypeChoice::kBFloat16},
        GoldenCase{"hf-hd64", "auto", DTypeChoice::kBFloat16}, GoldenCase{"hf-hd128", "auto", DTypeChoice::kBFloat16}),
    [](const auto& test) {
      std::string name = std::string(test.param.folder) + "_" + test.param.target +
                         (test.param.dtype == DTypeChoice::kBFloat16 ? "_bfloat16" : "");
      std::ranges::replace(name, '-', '_');
      return name;
    });

TEST(GoldenEncode, AllEighteenCases) {
  SPILLWAY_SHARED_OR_SKIP(root, "models/stories260K");
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(root + "/hf");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const nlohmann::json golden = Golden(root);
  ASSERT_EQ(golden["encode"].size(), 18U);
  for (const auto& each : golden["encode"]) {
    const auto ids = (*tokenizer)->Encode(each["text"].get<std::string>(), SpecialTokens::kAddToPlainText);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, each["ids"].get<std::vector<std::int32_t>>()) << each["text"];
  }
}

}  // namespace
}  // namespace spillway
