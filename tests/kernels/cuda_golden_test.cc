// The goldens of stories260K, end to end through the engine, with the cuda device in the place of the cpu one.

#include "kernels/device.h"
#include "tests/kernels/cuda_device.h"

namespace spillway {

// Targets that name an implementation of the cpu device are not this test's.
inline absl::StatusOr<std::unique_ptr<Device>> MakeGoldenDevice(const CpuDeviceOptions& options) {
  if (options.target != "auto") return absl::UnavailableError("a target of the cpu device");
  std::string reason;
  auto device = MakeCudaDeviceForTest(CudaTestOptions(), &reason);
  if (!device.has_value()) return absl::UnavailableError(reason);
  return *std::move(device);
}

}  // namespace spillway

#define MakeCpuDevice MakeGoldenDevice
#include "tests/engine/golden_test.cc"  // NOLINT(bugprone-suspicious-include)
