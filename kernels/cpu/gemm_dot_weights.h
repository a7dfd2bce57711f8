#pragma once

// Weights in the panels that gemm_dot.h describes.

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/worker_pool.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

struct DotWeights {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t num_blocks = 0;  // of a column
  bool is_paired = false;       // each panel has a half of each of two parts
  Buffer panels;
  std::vector<float> scales;  // of the columns of all panels, where they are INT8
};

// BF16 parts, as RowsToPack accepts them. `pool` packs.
absl::StatusOr<DotWeights> DotWeightsOfBF16(std::span<const MatrixView> parts, WorkerPool& pool);
// Parts as RowsToPackInt8 accepts them.
absl::StatusOr<DotWeights> DotWeightsRoundedToInt8(const GemmBodies& bodies, std::span<const MatrixView> parts,
                                                   WorkerPool& pool);

}  // namespace spillway::cpu
