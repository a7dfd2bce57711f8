#pragma once

// The fast Kernels of the cpu device.

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/cpu/targets.h"
#include "kernels/cpu/worker_pool.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

struct CpuKernels {
  std::unique_ptr<Kernels> kernels;
  std::string gemm;  // which GEMM, for the device's description
};

// `gemm` as in CpuDeviceOptions. `pool` packs weights, and outlives the kernels.
absl::StatusOr<CpuKernels> MakeCpuKernels(Target target, std::string_view gemm, WorkerPool& pool);

}  // namespace spillway::cpu
