#pragma once

// The bytes of a KV block, the same in every tier.
//
//   Block  16 consecutive token positions, all layers and kv heads, K and V: one contiguous span
//          [layer][kv_head][token][K row | V row]
//   Strip  the 16 rows of one (layer, kv head), contiguous in its block
//   Row    one token's K|V of one kv head, 2 * head_dim elements

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace spillway {

inline constexpr int kBlockTokens = 16;

struct KvLayout {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  DType dtype = DType::kF32;

  std::size_t row_bytes() const { return 2 * static_cast<std::size_t>(head_dim) * SizeOf(dtype); }
  std::size_t strip_bytes() const { return kBlockTokens * row_bytes(); }
  std::size_t layer_bytes() const { return static_cast<std::size_t>(num_kv_heads) * strip_bytes(); }
  std::size_t block_bytes() const { return static_cast<std::size_t>(num_layers) * layer_bytes(); }

  // Byte offset of a strip inside its block.
  std::size_t strip_offset(int layer, int kv_head) const {
    return static_cast<std::size_t>(layer) * layer_bytes() + static_cast<std::size_t>(kv_head) * strip_bytes();
  }
};

}  // namespace spillway
