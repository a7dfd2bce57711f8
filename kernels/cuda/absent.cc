// MakeCudaDevice of a program built without CUDA.

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace spillway {

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& /*options*/) {
  return absl::UnimplementedError("no CUDA device: this program was built without CUDA (cmake -DSPILLWAY_CUDA=ON)");
}

}  // namespace spillway
