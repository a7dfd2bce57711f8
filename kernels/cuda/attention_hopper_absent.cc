// attention_hopper.cu where SPILLWAY_CUDA_ARCHITECTURES has no sm_90a: it fits nothing.

#include "kernels/cuda/launch.h"

namespace spillway::cuda {

bool HopperPrefillIsBuilt() { return false; }
bool HopperPrefillFits(const AttentionParams& /*params*/) { return false; }
cudaError_t LaunchHopperPrefill(const AttentionParams& /*params*/, int /*min_rows*/, cudaStream_t /*stream*/) {
  return cudaErrorNotSupported;
}

}  // namespace spillway::cuda
