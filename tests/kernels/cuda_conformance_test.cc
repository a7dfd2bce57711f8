// The conformance suites of the cpu device, run unchanged on the cuda device: their Rig is replaced by one whose
// kernels copy to the GPU and back, and results of the tensor cores are compared by norm. Linked with the real kernels
// (skipped, test by test, where there is no GPU) and with emulated ones (tests/kernels/cuda_emulation.h).

#define Rig CpuRig
#define AllTargets CpuTargets
#define FastTargets CpuFastTargets
#define AllDTypes CpuDTypes
#define ExpectNear ExpectNearElements
#include "tests/kernels/kernel_rig.h"
#undef Rig
#undef AllTargets
#undef FastTargets
#undef AllDTypes
#undef ExpectNear

#include "tests/kernels/cuda_device.h"

namespace spillway {

inline std::vector<std::string> AllTargets() { return {"cuda"}; }
inline std::vector<std::string> FastTargets() { return AllTargets(); }
inline std::vector<DType> AllDTypes() { return {DType::kF32, DType::kBF16, DType::kF16}; }

// Weights of bf16 in the product with V, and nothing worse: METHOD.md's 1e-3 to 1e-2 for bf16 operands.
inline constexpr double kTensorNorm = 4e-3;

// Empty where there is a device.
inline const std::string& NoCudaReason() {
  static const std::string* const reason = [] {
    auto* const why = new std::string;
    MakeCudaDeviceForTest(CudaTestOptions(), why);
    return why;
  }();
  return *reason;
}

// "cuda", or a target of the cpu device, which some suites take as the oracle.
class Rig {
 public:
  explicit Rig(const std::string& target, int num_workers = 2, const std::string& /*gemm*/ = "fma") {
    if (target != "cuda") {
      cpu_ = std::make_unique<CpuRig>(target, num_workers);
      return;
    }
    if (!NoCudaReason().empty()) return;  // the test is skipped once its fixture exists
    std::string reason;
    device_ = MakeCudaDeviceForTest(CudaTestOptions(), &reason).value();
    kernels_ = std::make_unique<HostFacingKernels>(*device_);
    stream_ = device_->NewStream().value();
  }

  const Kernels& kernels() const { return cpu_ ? cpu_->kernels() : *kernels_; }
  Device& device() { return cpu_ ? cpu_->device() : *device_; }
  Stream& stream() { return cpu_ ? cpu_->stream() : *stream_; }
  void Finish() { ASSERT_TRUE(stream().Record()->Await().ok()) << stream().status(); }

 private:
  std::unique_ptr<CpuRig> cpu_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostFacingKernels> kernels_;
  std::unique_ptr<Stream> stream_;
};

// As the cpu suites' where arithmetic is in float; by norm where a tolerance tighter than bf16 could not hold.
inline void ExpectNear(const std::vector<float>& actual, const std::vector<float>& oracle, float tolerance,
                       const std::string& what) {
  ASSERT_EQ(actual.size(), oracle.size()) << what;
  double error = 0;
  double norm = 0;
  bool is_near = true;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_FALSE(std::isnan(actual[i])) << what << ": element " << i;
    const double difference = double{actual[i]} - oracle[i];
    error += difference * difference;
    norm += double{oracle[i]} * oracle[i];
    is_near = is_near && std::abs(difference) <= tolerance * (1 + std::abs(oracle[i]));
  }
  const bool is_attention =
      what.find("head_dim 64") != std::string::npos || what.find("head_dim 128") != std::string::npos;
  if (is_near) return;
  if (is_attention && std::sqrt(error) <= kTensorNorm * std::sqrt(norm)) return;
  ExpectNearElements(actual, oracle, tolerance, what + ", error by norm " + std::to_string(std::sqrt(error / norm)));
}

namespace {

// Without a GPU every test is listed, and skipped with the reason.
class SkipWithoutCuda : public testing::EmptyTestEventListener {
 public:
  void OnTestStart(const testing::TestInfo& /*info*/) override {
    if (!NoCudaReason().empty()) GTEST_SKIP() << NoCudaReason();
  }
};
const bool is_listening = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new SkipWithoutCuda);
  return true;
}();

}  // namespace
}  // namespace spillway

#include "tests/kernels/attention_bias_test.cc"  // NOLINT(bugprone-suspicious-include)
#include "tests/kernels/attention_pass_test.cc"  // NOLINT(bugprone-suspicious-include)
#include "tests/kernels/attention_test.cc"       // NOLINT(bugprone-suspicious-include)
#include "tests/kernels/row_kernels_test.cc"     // NOLINT(bugprone-suspicious-include)
#include "tests/kernels/sampler_test.cc"         // NOLINT(bugprone-suspicious-include)
