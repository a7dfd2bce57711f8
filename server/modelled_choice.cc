#include "server/modelled_choice.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <fstream>
#include <vector>

#include "engine/known_models.h"
#include "kernels/status_macros.h"
#include "server/model_path.h"

namespace spillway {

absl::StatusOr<ModelCosts> ReadModelCosts(const std::string& model, const Environment& environment) {
  if (const std::optional<KnownModel> known = FindKnownModel(model)) return known->costs;
  const absl::StatusOr<std::string> folder = ResolveModel(model, environment);
  if (!folder.ok()) {
    std::vector<std::string_view> names;
    for (const KnownModel& known : KnownModels()) names.push_back(known.name);
    return absl::Status(
        folder.status().code(),
        fmt::format("{}; built-in models are {}", std::string(folder.status().message()), fmt::join(names, ", ")));
  }
  ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(*folder));
  const KvLayout layout{.num_layers = config.num_layers,
                        .num_kv_heads = config.num_kv_heads,
                        .head_dim = config.head_dim,
                        .dtype = config.weight_dtype};
  ModelCosts costs = CostsOf(config, layout, 0);
  const double table = static_cast<double>(config.hidden) * config.vocab * (config.tied_embeddings ? 1 : 2);
  costs.weight_bytes = (costs.flops_per_token / 2 + table) * static_cast<double>(SizeOf(config.weight_dtype));
  return costs;
}

absl::Status WriteReport(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::trunc);
  file << text;
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("cannot write '{}'", path));
}

}  // namespace spillway
