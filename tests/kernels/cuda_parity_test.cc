// The cuda device against the cpu device's plain loops, by teacher forcing: after each prefix of what the cpu device
// chose, the cuda device chooses the same token, unless two are as good as equal, and finds it as likely. With kernels
// that are batch-invariant, and with the fastest.

#include "tests/kernels/cuda_engine_device.h"

namespace spillway {

// What the next cuda device is.
inline bool is_batch_invariant = true;

// "auto" is the cuda device, a target by name one of the cpu device.
inline absl::StatusOr<std::unique_ptr<Device>> MakeParityDevice(const CpuDeviceOptions& options) {
  if (options.target != "auto") return MakeCpuDevice(options);
  CudaDeviceOptions cuda = CudaTestOptions();
  cuda.batch_invariant = is_batch_invariant;
  std::string reason;
  auto device = MakeCudaDeviceForTest(cuda, &reason);
  if (!device.has_value()) return absl::UnavailableError(reason);
  return *std::move(device);
}

}  // namespace spillway

#define MakeCpuDevice MakeParityDevice
#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"

namespace spillway {
namespace {

using testing::Collected;
using testing::MakeRequest;

struct ParityCase {
  int head_dim;
  DType dtype;
  int sliding_window;
  bool is_batch_invariant = true;
};

class Parity : public ::testing::TestWithParam<ParityCase> {};

TEST_P(Parity, TheSameTokensByTeacherForcing) {
  const DType dtype = GetParam().dtype;
  is_batch_invariant = GetParam().is_batch_invariant;
  const std::string folder = ::testing::TempDir() + "spillway_parity_" + std::to_string(::getpid());
  std::filesystem::create_directories(folder);
  ASSERT_TRUE(WriteRandomLlama(folder, {.seed = 17,
                                        .hidden = 96,
                                        .inner = 128,
                                        .heads = 4,
                                        .kv_heads = 2,
                                        .head_dim = GetParam().head_dim,
                                        .vocab = 160,
                                        .dtype = dtype,
                                        .sliding_window = GetParam().sliding_window})
                  .ok());
  std::vector<std::int32_t> prompt;
  for (std::int32_t i = 0; i < 120; ++i) prompt.push_back(3 + i * 13 % 150);
  constexpr std::int32_t kSteps = 12;
  SequenceRequest request = MakeRequest(prompt, kSteps);
  request.sampling.num_logprobs = 2;
  CpuDeviceOptions plain;
  plain.target = "reference";
  const Collected expected = testing::Rig::Make(folder, {}, plain).RunOne(std::move(request));
  ASSERT_EQ(expected.tokens.size(), static_cast<std::size_t>(kSteps));

  std::vector<SequenceRequest> forced;
  for (const SampledToken& token : expected.tokens) {
    forced.push_back(MakeRequest(prompt, 1));
    forced.back().sampling.num_logprobs = 0;
    prompt.push_back(token.token);
  }
  const std::vector<Collected> actual = testing::Rig::Make(folder, {}).Run(std::move(forced));
  const float tolerance = dtype == DType::kF32 ? 1e-4F : dtype == DType::kBF16 ? 0.05F : 0.01F;
  int num_compared = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const SampledToken& oracle = expected.tokens[i];
    ASSERT_EQ(actual[i].tokens.size(), 1U);
    EXPECT_NEAR(actual[i].tokens[0].logprob, oracle.logprob, tolerance) << "step " << i;
    if (oracle.top[0].logprob - oracle.top[1].logprob < 2 * tolerance) continue;
    ++num_compared;
    EXPECT_EQ(actual[i].tokens[0].token, oracle.token) << "step " << i;
  }
  EXPECT_GE(num_compared, kSteps / 2) << "too many near ties to tell";
}

INSTANTIATE_TEST_SUITE_P(Models, Parity,
                         ::testing::Values(ParityCase{24, DType::kF32, 0}, ParityCase{64, DType::kBF16, 0},
                                           ParityCase{128, DType::kBF16, 50}, ParityCase{128, DType::kF16, 0},
                                           ParityCase{128, DType::kBF16, 50, false},
                                           ParityCase{64, DType::kF16, 0, false}),
                         [](const auto& test) {
                           return std::string(NameOf(test.param.dtype)) + "_hd" + std::to_string(test.param.head_dim) +
                                  "_window" + std::to_string(test.param.sliding_window) +
                                  (test.param.is_batch_invariant ? "" : "_fastest");
                         });

}  // namespace
}  // namespace spillway
