#pragma once

// Published models whose shapes decide what their KV costs, for plans and replays without their weights.

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model_costs.h"

namespace spillway {

struct KnownModel {
  std::string_view name;  // "llama-3.1-70b"
  ModelCosts costs;       // bf16 keys and values; flops_per_token counts every active parameter
};

const std::vector<KnownModel>& KnownModels();
std::optional<KnownModel> FindKnownModel(std::string_view name);

}  // namespace spillway
