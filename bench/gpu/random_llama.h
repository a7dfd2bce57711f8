#pragma once

// A checkpoint of Llama's shape with seeded random weights, for benchmarks of machines that can fetch nothing.

#include <cstdint>
#include <string>

namespace spillway::bench {

struct LlamaShape {
  std::int64_t layers = 32;
  std::int64_t hidden = 4096;
  std::int64_t inner = 14336;
  std::int64_t heads = 32;
  std::int64_t kv_heads = 8;
  std::int64_t head_dim = 128;
  std::int64_t vocab = 128256;
  std::int64_t max_positions = 131072;

  std::int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  // Of matrix products; the embedding is a look-up.
  std::int64_t product_weights() const {
    return layers * (hidden * (qkv_width() + heads * head_dim) + 3 * hidden * inner) + vocab * hidden;
  }
  std::int64_t kv_bytes_per_token() const { return layers * kv_heads * head_dim * 2 * 2; }
};

// A Hugging Face folder: config.json and one safetensors file of bf16, of standard deviation 0.02, norms of 1. Aborts
// where it cannot be written. No tokenizer.
void WriteRandomLlama(const std::string& folder, const LlamaShape& shape);

}  // namespace spillway::bench
