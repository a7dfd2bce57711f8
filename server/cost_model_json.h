#pragma once

#include <nlohmann/json.hpp>

#include "engine/engine.h"

namespace spillway {

// What GET /spillway/cost_model answers: the speeds as last measured and what follows from them; null stands for
// infinity. `status.cost_model` is set.
nlohmann::ordered_json CostModelJson(const EngineStatus& status);

}  // namespace spillway
