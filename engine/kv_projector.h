#pragma once

// KvProjector: keys and values of tokens, computed again from the inputs of their layers: the K and V part of the QKV
// product, then the rotation to their positions. The bits are those that the forward pass stored, since a row of a
// product does not depend on the other rows or columns. Engine thread only.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace spillway {

class KvProjector {
 public:
  struct Options {
    std::vector<std::unique_ptr<PackedMatrix>> weights;  // by layer: K and V stacked
    const double* inverse_frequency = nullptr;           // device memory, outlives the projector
    DType dtype = DType::kF32;                           // of the inputs
    std::int64_t max_positions = 0;
    int head_dim = 0;
  };

  // Reserves everything. `device` outlives the projector.
  static absl::StatusOr<std::unique_ptr<KvProjector>> Make(Device& device, Options options);

  struct Args {
    int layer = 0;
    const std::byte* inputs = nullptr;  // [num_rows, hidden]; device memory
    std::int64_t num_rows = 0;
    std::int64_t first_position = 0;  // of the first row; a multiple of kBlockTokens
    KvView kv;                        // of one layer, beginning with the block of the first row
  };
  void Project(Stream& stream, const Args& args) const;

  double flops_per_row() const;  // of one layer
  std::size_t buffer_bytes() const { return tables_.size_bytes + product_.size_bytes; }

 private:
  KvProjector(Device& device, Options options);

  Device& device_;
  const Options options_;
  Buffer tables_;
  const float* cos_sin_ = nullptr;           // [max_positions, head_dim]
  const std::int32_t* positions_ = nullptr;  // [max_positions]: 0, 1, 2, ...
  const std::int32_t* blocks_ = nullptr;     // [max_positions]: i / kBlockTokens
  Buffer product_;                           // of some rows
};

}  // namespace spillway
