#pragma once

// Included before a test of the engine, with MakeCpuDevice defined as MakeEngineDevice, so that it runs on the cuda
// device. Tests are skipped with the reason, one by one, where there is no GPU.

#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "kernels/device.h"
#include "tests/kernels/cuda_device.h"

namespace spillway {

inline absl::StatusOr<std::unique_ptr<Device>> MakeEngineDevice(const CpuDeviceOptions& options) {
  // Targets that name an implementation of the cpu device are no business of this one.
  if (options.target != "auto") return absl::UnavailableError("a target of the cpu device");
  std::string reason;
  auto device = MakeCudaDeviceForTest(CudaTestOptions(), &reason);
  if (!device.has_value()) return absl::UnavailableError(reason);
  return *std::move(device);
}

namespace {

class SkipWithoutCuda : public testing::EmptyTestEventListener {
 public:
  void OnTestStart(const testing::TestInfo& /*info*/) override {
    if (const absl::Status status = MakeEngineDevice({}).status(); !status.ok()) GTEST_SKIP() << status.message();
  }
};
const bool is_listening = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new SkipWithoutCuda);
  return true;
}();

}  // namespace
}  // namespace spillway
