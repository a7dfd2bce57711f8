#pragma once

// ModelCosts: what a token costs in arithmetic and bytes, from a model's shape alone. Nothing here is measured.

#include "engine/model_config.h"
#include "kernels/kv_layout.h"

namespace spillway {

struct ModelCosts {
  // Matrix products of one token: 2 x the active parameters, or 2 x those of the layers where the vocabulary product is
  // made for sampled tokens alone and counted by flops_per_sample.
  double flops_per_token = 0;
  double flops_per_sample = 0;
  double attention_flops_per_key = 0;     // of one query token and one key: 4 x layers x heads x head_dim
  double kv_bytes_per_token = 0;          // of a cached token, all layers
  double input_bytes_per_token = 0;       // of a token's layer inputs, all layers
  double projection_flops_per_token = 0;  // of its keys and values from these
  double weight_bytes = 0;                // read by a step, all experts
  double num_layers = 1;

  // Of `tokens` new tokens behind `cached` ones, each attending to itself and all before it.
  double AttentionFlops(double cached, double tokens) const {
    return attention_flops_per_key * tokens * (cached + (tokens + 1) / 2);
  }
  double Flops(double cached, double tokens) const { return flops_per_token * tokens + AttentionFlops(cached, tokens); }
};

// Of the dense decoders that this engine runs. `weight_bytes`: Model::weight_bytes.
ModelCosts CostsOf(const ModelConfig& config, const KvLayout& layout, double weight_bytes);

}  // namespace spillway
