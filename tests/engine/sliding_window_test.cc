// A Mistral whose tokens attend to the last few only: the same bits however the prompt is cut, and what lies further
// back than the windows of all layers together reach changes nothing.

#include <filesystem>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"

namespace spillway {
namespace {

using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

constexpr int kWindow = 20;
constexpr int kLayers = 2;

std::string MakeModel(int sliding_window) {
  const std::string path =
      ::testing::TempDir() + "spillway_window" + std::to_string(sliding_window) + "_" + std::to_string(::getpid());
  std::filesystem::create_directories(path);
  const absl::Status status =
      WriteRandomLlama(path, {.seed = 9, .layers = kLayers, .dtype = DType::kBF16, .sliding_window = sliding_window});
  SPILLWAY_CHECK(status.ok()) << status;
  return path;
}

// Hashes of the logits of each step.
std::vector<std::uint64_t> Generate(const std::string& folder, const std::vector<std::int32_t>& prompt,
                                    std::int32_t chunk) {
  EngineOptions options;
  options.hash_logits = true;
  options.long_prefill_token_threshold = chunk;
  Rig rig = Rig::Make(folder, options);
  return rig.RunOne(MakeRequest(prompt, 6)).hashes();
}

TEST(SlidingWindow, HidesWhatLiesBeyondItAndChunksChangeNoBit) {
  const std::string folder = MakeModel(kWindow);
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < 300; ++i) prompt.push_back(3 + i * 11 % 200);
  const std::vector<std::uint64_t> whole = Generate(folder, prompt, 0);
  EXPECT_EQ(Generate(folder, prompt, 7), whole);
  constexpr std::size_t kReach = kLayers * (kWindow - 1);
  std::vector<std::int32_t> other = prompt;
  other[other.size() - 2 - kReach] = 250;
  EXPECT_EQ(Generate(folder, other, 0), whole) << "the last token of the prompt does not see it";
  other[other.size() - 1 - kReach] = 250;
  EXPECT_NE(Generate(folder, other, 0).front(), whole.front()) << "it sees this one";
  const std::string unlimited = MakeModel(0);
  other = prompt;
  other[0] = 250;
  EXPECT_NE(Generate(unlimited, other, 0).front(), Generate(unlimited, prompt, 0).front());
}

}  // namespace
}  // namespace spillway
