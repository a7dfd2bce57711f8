#pragma once

// What `plan` and `replay` share: the costs of a model by name or folder, and report files.

#include <string>

#include "absl/status/statusor.h"
#include "engine/model_costs.h"
#include "server/options.h"

namespace spillway {

// A built-in name, else a folder or Hub id, of which only config.json is read.
absl::StatusOr<ModelCosts> ReadModelCosts(const std::string& model, const Environment& environment);

absl::Status WriteReport(const std::string& path, const std::string& text);

}  // namespace spillway
