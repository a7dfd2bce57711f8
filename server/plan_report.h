#pragma once

// What `spillway plan` says of a model on a machine: costs, kappa_crit, what fits, what loading saves.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/cost_model.h"

namespace spillway {

struct PlanMachine {
  std::string name;
  std::string label;
  bool is_measured = false;  // else described
  CostModel model;
  double device_tokens = 0;
  double host_tokens = 0;
};

struct PlanRequest {
  std::string model;
  std::int64_t cached_tokens = 0;  // of a session, in the host tier
  std::int64_t new_tokens = 0;     // of its next turn
};

nlohmann::ordered_json PlanReport(const PlanRequest& request, const std::vector<PlanMachine>& machines);
// The same for people.
std::string ShowPlan(const nlohmann::ordered_json& report);

}  // namespace spillway
