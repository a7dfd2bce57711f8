#pragma once

// Checks of arguments that every implementation makes alike.

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace spillway {

// The rows of the stacked matrix; INVALID_ARGUMENT unless the parts are alike and not empty.
absl::StatusOr<std::int64_t> StackedRows(std::span<const MatrixView> parts);

// The same, and INVALID_ARGUMENT unless the parts are F32 or BF16.
absl::StatusOr<std::int64_t> RowsToPack(std::span<const MatrixView> parts);

// The same for PackInt8, which also bounds the columns.
absl::StatusOr<std::int64_t> RowsToPackInt8(std::span<const MatrixView> parts);

// INTERNAL: token `index` is outside the embedding table.
absl::Status TokenOutsideTable(const EmbedArgs& args, std::int64_t index);

// INTERNAL: a GEMM whose activations do not have the dtype that goes with its weight.
absl::Status ActivationsUnlikeWeight(const GemmArgs& args, DType weight_dtype);

}  // namespace spillway
