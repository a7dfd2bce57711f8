// A float16 checkpoint runs in float16 on the cuda device: weights, activations and KV.

#include "tests/kernels/cuda_engine_device.h"

#define MakeCpuDevice MakeEngineDevice
#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"

namespace spillway {
namespace {

using testing::Collected;
using testing::MakeRequest;

std::string MakeModel(DType dtype) {
  const std::string path =
      ::testing::TempDir() + "spillway_" + std::string(NameOf(dtype)) + "_" + std::to_string(::getpid());
  std::filesystem::create_directories(path);
  const absl::Status status = WriteRandomLlama(path, {.seed = 5,
                                                      .layers = 2,
                                                      .hidden = 64,
                                                      .inner = 96,
                                                      .heads = 4,
                                                      .kv_heads = 2,
                                                      .head_dim = 64,
                                                      .vocab = 160,
                                                      .max_positions = 256,
                                                      .dtype = dtype});
  SPILLWAY_CHECK(status.ok()) << status;
  return path;
}

Collected Generate(const std::string& folder, DTypeChoice choice, std::int32_t chunk, DType expected) {
  EngineOptions options;
  options.hash_logits = true;
  options.enable_prefix_caching = false;
  options.long_prefill_token_threshold = chunk;
  testing::Rig rig = testing::Rig::Make(folder, options, {}, choice);
  EXPECT_EQ(rig.engine->model().dtype(), expected);
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < 70; ++i) prompt.push_back(3 + i * 7 % 150);
  SequenceRequest request = MakeRequest(prompt, 4);
  request.sampling.num_logprobs = 0;
  return rig.RunOne(std::move(request));
}

TEST(Float16, IsComputedAsItIsAndChunksChangeNoBit) {
  const std::string folder = MakeModel(DType::kF16);
  const Collected whole = Generate(folder, DTypeChoice::kAuto, 0, DType::kF16);
  EXPECT_EQ(Generate(folder, DTypeChoice::kAuto, 16, DType::kF16).hashes(), whole.hashes());
  const Collected wide = Generate(folder, DTypeChoice::kFloat32, 0, DType::kF32);
  EXPECT_NE(wide.hashes().front(), whole.hashes().front());
  EXPECT_NEAR(wide.tokens.front().logprob, whole.tokens.front().logprob, 2e-2);
}

// Of other types too: what is not the wanted type is converted as it is loaded.
TEST(Float16, RoundsToNearestEven) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = FloatFromF16(half);
    if (value != value) continue;
    ASSERT_EQ(F16FromFloat(value), half);
    if ((bits & 0x7fffU) >= 0x7bffU) continue;
    const float middle = (value + FloatFromF16(static_cast<std::uint16_t>(half + 1))) / 2;  // away from zero
    ASSERT_EQ(F16FromFloat(middle), half % 2 == 0 ? half : half + 1) << middle;
  }
  EXPECT_EQ(F16FromFloat(65519.9F), 0x7bffU);
  EXPECT_EQ(F16FromFloat(-65520.0F), 0xfc00U);
  EXPECT_EQ(F16FromFloat(0x1p-26F), 0U);
}

}  // namespace
}  // namespace spillway
