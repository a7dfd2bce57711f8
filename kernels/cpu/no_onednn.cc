// The build without oneDNN.

#include "kernels/cpu/gemm_onednn.h"

namespace spillway::cpu {

std::string OneDnnVersion() { return ""; }

absl::StatusOr<std::unique_ptr<OneDnnPacker>> MakeOneDnnPacker(DType /*dtype*/) {
  return absl::FailedPreconditionError("this build has no onednn");
}

}  // namespace spillway::cpu
