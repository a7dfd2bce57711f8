#include "server/cost_model_json.h"

#include <cmath>

namespace spillway {
namespace {

using nlohmann::ordered_json;

// JSON has no infinity: null.
ordered_json Number(double value) { return std::isfinite(value) ? ordered_json(value) : ordered_json(nullptr); }

}  // namespace

ordered_json CostModelJson(const EngineStatus& status) {
  const CostModel& model = *status.cost_model;
  const ModelCosts& costs = model.costs();
  const ComputeSpeed& compute = model.compute();
  ordered_json by_size = ordered_json::array();
  for (const SizedSpeed::Point& point : model.link().Points()) {
    by_size.push_back({{"copy_bytes", point.size}, {"bytes_per_second", point.size / point.seconds}});
  }
  ordered_json products = ordered_json::array();
  for (const SizedSpeed::Point& point : model.products().Points()) {
    products.push_back({{"flops", point.size}, {"flops_per_second", point.size / point.seconds}});
  }
  ordered_json effective = ordered_json::array();
  for (const std::int64_t tokens : {1, 16, 64, 256, 1024, 4096}) {
    effective.push_back({{"new_tokens", tokens}, {"kappa_crit", Number(model.KappaCritAt(tokens))}});
  }
  return {{"model",
           {{"flops_per_token", costs.flops_per_token},
            {"flops_per_sample", costs.flops_per_sample},
            {"attention_flops_per_key", costs.attention_flops_per_key},
            {"kv_bytes_per_token", costs.kv_bytes_per_token},
            {"weight_bytes", costs.weight_bytes}}},
          {"compute",
           {{"linear_flops_per_second", compute.linear_flops_per_second},
            {"attention_flops_per_second", compute.attention_flops_per_second},
            {"kv_bytes_per_second", compute.kv_bytes_per_second},
            {"step_floor_seconds", compute.step_floor_seconds},
            {"products_by_size", std::move(products)},
            {"busy_seconds", status.compute_seconds}}},
          {"link",
           {{"bytes_per_second", model.link_bytes_per_second()},
            {"copy_bytes", model.copy_bytes()},
            {"by_copy_size", std::move(by_size)},
            {"restore_seconds", status.restore_seconds},
            {"store_seconds", status.store_seconds}}},
          {"kappa_crit", Number(model.kappa_crit())},
          {"kappa_crit_at", std::move(effective)},
          {"critical_chunk_tokens", Number(model.critical_chunk_tokens())}};
}

}  // namespace spillway
