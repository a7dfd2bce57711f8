#include "engine/model_costs.h"

namespace spillway {

ModelCosts CostsOf(const ModelConfig& config, const KvLayout& layout, double weight_bytes) {
  const double layers = config.num_layers;
  const double hidden = config.hidden;
  const double query = static_cast<double>(config.num_heads) * config.head_dim;
  const double kv = static_cast<double>(config.num_kv_heads) * config.head_dim;
  const double parameters_of_layer = hidden * (query + 2 * kv) + query * hidden + 3 * hidden * config.inner;
  return {.flops_per_token = 2 * layers * parameters_of_layer,
          .flops_per_sample = 2 * hidden * config.vocab,
          .attention_flops_per_key = 4 * layers * query,
          .kv_bytes_per_token = static_cast<double>(layout.block_bytes()) / kBlockTokens,
          .input_bytes_per_token = layers * hidden * static_cast<double>(SizeOf(layout.dtype)),
          .projection_flops_per_token = 2 * layers * hidden * 2 * kv,
          .weight_bytes = weight_bytes,
          .num_layers = layers};
}

}  // namespace spillway
