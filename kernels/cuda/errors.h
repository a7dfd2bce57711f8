#pragma once

// CUDA's error codes become Status here and nowhere else.

#include <cuda_runtime_api.h>

#include <string_view>

#include "absl/status/status.h"

namespace spillway::cuda {

// RESOURCE_EXHAUSTED: out of memory. INTERNAL: a call we got wrong. UNAVAILABLE: anything else; the device is lost.
absl::Status ToStatus(cudaError_t error, std::string_view what);

}  // namespace spillway::cuda
