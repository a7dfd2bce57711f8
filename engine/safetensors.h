#pragma once

// Reader of safetensors checkpoints: one file or shards with an index. Files are memory-mapped read-only; headers are
// foreign bytes and every offset is checked against the file before a view is handed out.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace spillway {

struct TensorView {
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;  // inside the mapping; alignment is the file's: read through memcpy
  std::size_t size_bytes = 0;
};

// Immutable after Open; any thread. Views live as long as the checkpoint.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  // NOT_FOUND: neither model.safetensors nor model.safetensors.index.json (message says what was looked for).
  // INVALID_ARGUMENT: truncated file, header over its limit (100 MB) or not JSON, offsets that overlap, leave the data
  // section, leave holes or disagree with shape x dtype, unknown dtype of a tensor that is asked for, duplicate or
  // missing names of the index.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& folder);
  // One file, for tests and tools.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> OpenFile(const std::string& path);

  // NOT_FOUND names the tensor.
  virtual absl::StatusOr<TensorView> Find(std::string_view name) const = 0;
  virtual std::vector<std::string> Names() const = 0;
  virtual std::size_t total_bytes() const = 0;
  // Drops the resident pages of a tensor that has been packed; it is read from the file again if touched.
  virtual void Release(const TensorView& tensor) const = 0;
};

}  // namespace spillway
