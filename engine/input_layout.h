#pragma once

// The bytes of kept layer inputs: of one block of 16 tokens, the normalized rows that each layer's keys and values are
// projected from, [layer][token][hidden], in one contiguous span of a host slot.

#include <cstddef>

#include "kernels/kv_layout.h"
#include "kernels/tensor.h"

namespace spillway {

struct InputLayout {
  int num_layers = 0;
  int hidden = 0;
  DType dtype = DType::kF32;

  std::size_t row_bytes() const { return static_cast<std::size_t>(hidden) * SizeOf(dtype); }
  std::size_t strip_bytes() const { return kBlockTokens * row_bytes(); }  // of one layer
  std::size_t block_bytes() const { return static_cast<std::size_t>(num_layers) * strip_bytes(); }
  // Blocks whose inputs fit the slot of one block of keys and values; 0: they are larger.
  std::size_t blocks_per_slot(const KvLayout& kv) const { return kv.block_bytes() / block_bytes(); }
};

}  // namespace spillway
