#include "engine/known_models.h"

#include <algorithm>

namespace spillway {
namespace {

constexpr double kBillion = 1e9;
constexpr double kElementBytes = 2;  // bf16

struct Shape {
  std::string_view name;
  double active_parameters;
  double weight_bytes;
  double layers;
  double heads;
  double kv_heads;
  double head_dim;
};

KnownModel Grouped(const Shape& shape) {
  return {.name = shape.name,
          .costs = {.flops_per_token = 2 * shape.active_parameters,
                    .attention_flops_per_key = 4 * shape.layers * shape.heads * shape.head_dim,
                    .kv_bytes_per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * kElementBytes,
                    .weight_bytes = shape.weight_bytes,
                    .num_layers = shape.layers}};
}

// Multi-head latent attention: one latent and one rotated key per layer is cached; a prefill expands them to keys of
// 192 and values of 128 dimensions for each head.
KnownModel DeepSeekV3() {
  constexpr double kLayers = 61;
  constexpr double kHeads = 128;
  return {.name = "deepseek-v3",
          .costs = {.flops_per_token = 2 * 37 * kBillion,
                    .attention_flops_per_key = 2 * kLayers * kHeads * (192 + 128),
                    .kv_bytes_per_token = kLayers * (512 + 64) * kElementBytes,
                    .weight_bytes = 671 * kBillion,  // fp8
                    .num_layers = kLayers}};
}

std::vector<KnownModel> MakeModels() {
  return {
      Grouped({"llama-2-7b", 6.74 * kBillion, 13.5 * kBillion, 32, 32, 32, 128}),
      Grouped({"llama-3.1-8b", 8.03 * kBillion, 16.1 * kBillion, 32, 32, 8, 128}),
      Grouped({"llama-3.1-70b", 70.6 * kBillion, 141 * kBillion, 80, 64, 8, 128}),
      Grouped({"llama-3.1-405b", 405 * kBillion, 810 * kBillion, 126, 128, 8, 128}),
      Grouped({"qwen2.5-7b", 7.62 * kBillion, 15.2 * kBillion, 28, 28, 4, 128}),
      Grouped({"qwen3-30b-a3b", 3.3 * kBillion, 61 * kBillion, 48, 32, 4, 128}),
      Grouped({"qwen3-235b-a22b", 22 * kBillion, 470 * kBillion, 94, 64, 4, 128}),
      DeepSeekV3(),
  };
}

}  // namespace

const std::vector<KnownModel>& KnownModels() {
  static const auto* const models = new std::vector<KnownModel>(MakeModels());
  return *models;
}

std::optional<KnownModel> FindKnownModel(std::string_view name) {
  const auto found = std::ranges::find(KnownModels(), name, &KnownModel::name);
  if (found == KnownModels().end()) return std::nullopt;
  return *found;
}

}  // namespace spillway
