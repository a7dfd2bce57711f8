#pragma once

// GEMM by oneDNN, where a row's bits do not depend on the number of rows. Weights are packed once, in one slice of
// columns per worker; a worker calls oneDNN single-threaded on its slice, and no OpenMP thread is ever started.

#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cpu/gemm.h"

namespace spillway::cpu {

// Packs matrices of one dtype. Any thread; the matrices it makes keep what they need of it.
class OneDnnPacker {
 public:
  virtual ~OneDnnPacker() = default;
  virtual absl::StatusOr<std::unique_ptr<CpuMatrix>> Pack(std::span<const MatrixView> parts) const = 0;
};

// "2.6.3", or empty in a build without oneDNN.
std::string OneDnnVersion();

// FAILED_PRECONDITION, and why, unless the implementation that oneDNN chooses here is one known to be invariant in the
// number of rows, and a probe with 1, 7 and 64 rows finds it so.
absl::StatusOr<std::unique_ptr<OneDnnPacker>> MakeOneDnnPacker(DType dtype);

}  // namespace spillway::cpu
