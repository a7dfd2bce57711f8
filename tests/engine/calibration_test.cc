// An engine knows its speeds before it serves, and follows what it serves.

#include "engine/calibration.h"

#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

constexpr double kLinkBytesPerSecond = 1e6;

class CalibrationTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const absl::Status status = WriteRandomLlama(folder_.path(), {.seed = 5,
                                                                  .layers = 2,
                                                                  .hidden = 48,
                                                                  .inner = 96,
                                                                  .heads = 4,
                                                                  .kv_heads = 2,
                                                                  .head_dim = 16,
                                                                  .vocab = 288,
                                                                  .max_positions = 256,
                                                                  .dtype = DType::kBF16});
    ASSERT_TRUE(status.ok()) << status;
  }

  Rig Make(std::uint32_t device_blocks, std::uint32_t host_blocks, EngineOptions options = {}) {
    options.kv_cache_bytes = device_blocks * Rig::BlockBytes(folder_.path());
    options.link_bytes_per_second = kLinkBytesPerSecond;
    return Rig::Make(
        folder_.path(), options, {}, DTypeChoice::kAuto, nullptr,
        host_blocks == 0 ? Rig::MakeHost() : [=](Device& device, const KvLayout& layout) {
          Buffer slab = *device.Allocate(MemoryKind::kPinnedHost, host_blocks * layout.block_bytes());
          return MakeHostTier(std::move(slab), {.block_bytes = layout.block_bytes(), .num_blocks = host_blocks});
        });
  }

  TempFolder folder_;
};

std::vector<std::int32_t> Prompt(std::int32_t first, std::size_t size) {
  std::vector<std::int32_t> tokens(size);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

TEST_F(CalibrationTest, EverySpeedIsKnownBeforeTheFirstRequest) {
  Rig rig = Make(64, 16);
  const EngineStatus status = rig.engine->status();
  ASSERT_TRUE(status.cost_model.has_value());
  const CostModel& model = *status.cost_model;
  EXPECT_GT(model.compute().linear_flops_per_second, 0);
  EXPECT_GT(model.compute().attention_flops_per_second, 0);
  EXPECT_GT(model.compute().kv_bytes_per_second, 0);
  EXPECT_GT(model.compute().step_floor_seconds, 0);
  EXPECT_GT(model.kappa_crit(), 0);
  EXPECT_EQ(model.costs().kv_bytes_per_token * kBlockTokens, Rig::BlockBytes(folder_.path()));
  EXPECT_EQ(status.kv_blocks_used + status.kv_blocks_cached, 0) << "calibration gives every block back";
}

TEST_F(CalibrationTest, APacedLinkIsNoFasterThanItsPacing) {
  Rig rig = Make(64, 16);
  const double speed = rig.engine->status().cost_model->link_bytes_per_second();
  EXPECT_GT(speed, 0);
  EXPECT_LE(speed, kLinkBytesPerSecond * 1.000001);
}

TEST_F(CalibrationTest, WithoutAHostTierThereIsNoLink) {
  Rig rig = Make(64, 0);
  EXPECT_EQ(rig.engine->status().cost_model->link_bytes_per_second(), 0);
  EXPECT_EQ(rig.engine->status().cost_model->kappa_crit(), 0);
}

TEST_F(CalibrationTest, ThePoolOfOneBlockAndTheStepOfOneTokenAreEnough) {
  EngineOptions options;
  options.max_num_batched_tokens = 1;
  Rig rig = Make(1, 1, options);
  EXPECT_GT(rig.engine->status().cost_model->kappa_crit(), 0);
  EXPECT_EQ(rig.RunOne(MakeRequest({1, 2, 3}, 2)).tokens.size(), 2U);
}

TEST_F(CalibrationTest, NoTimeMeasuresOneStepAndDerivesTheRest) {
  EngineOptions options;
  options.calibration_seconds = 0;
  Rig rig = Make(64, 16, options);
  const CostModel model = *rig.engine->status().cost_model;
  EXPECT_GT(model.compute().step_floor_seconds, 0);
  EXPECT_GT(model.ComputeSeconds(64, 64), model.ComputeSeconds(0, 1));
}

TEST_F(CalibrationTest, ServedStepsAndRestoresMoveTheSpeeds) {
  Rig rig = Make(8, 64);
  const CostModel before = *rig.engine->status().cost_model;
  rig.RunOne(MakeRequest(Prompt(1, 100), 4));
  rig.RunOne(MakeRequest(Prompt(120, 100), 4));  // evicts the first
  EXPECT_GT(rig.RunOne(MakeRequest(Prompt(1, 100), 4)).num_cached, 0);
  const EngineStatus after = rig.engine->status();
  EXPECT_GT(after.compute_seconds, 0);
  ASSERT_GT(after.restored_blocks, 0);
  EXPECT_NE(after.cost_model->link_bytes_per_second(), before.link_bytes_per_second());
  EXPECT_NE(after.cost_model->ComputeSeconds(64, 1), before.ComputeSeconds(64, 1));
}

}  // namespace
}  // namespace spillway
