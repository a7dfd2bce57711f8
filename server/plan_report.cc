#include "server/plan_report.h"

#include <fmt/format.h>

#include <cmath>
#include <string_view>

#include "server/option_values.h"

namespace spillway {
namespace {

using nlohmann::ordered_json;

// JSON has no infinity.
ordered_json Number(double value) { return std::isfinite(value) ? ordered_json(value) : ordered_json("inf"); }

ordered_json SecondsOf(const CostModel& model, const PlanRequest& request) {
  const Prefill prefill{.resident = 0,
                        .below = request.cached_tokens / kBlockTokens * kBlockTokens,
                        .fresh = request.new_tokens + request.cached_tokens % kBlockTokens};
  const Restoration load = model.Load(prefill, {});
  const Restoration recompute = model.Recompute(prefill, {});
  const Restoration split = model.Split(prefill, {});
  const Restoration best = model.Best(prefill, {});
  const char* const name = best.recomputed == 0 ? "load" : best.loaded == 0 ? "recompute" : "split";
  return {{"load", Number(load.seconds)},
          {"recompute", Number(recompute.seconds)},
          {"split", Number(split.seconds)},
          {"split_loaded_tokens", split.loaded},
          {"best", name},
          {"saved_by_best", Number(recompute.seconds - best.seconds)},
          {"link_overhead", Number(model.LinkOverhead(request.cached_tokens, request.new_tokens))}};
}

ordered_json MachineReport(const PlanMachine& machine, const PlanRequest& request) {
  const CostModel& model = machine.model;
  const auto session = static_cast<double>(request.cached_tokens + request.new_tokens);
  return {{"hardware", machine.name},
          {"label", machine.label},
          {"source", machine.is_measured ? "measured" : "described"},
          {"flops_per_second", model.compute().linear_flops_per_second},
          {"step_floor_seconds", model.compute().step_floor_seconds},
          {"link_bytes_per_second", model.link_bytes_per_second()},
          {"kappa_crit", Number(model.kappa_crit())},
          {"kappa_crit_at_new_tokens", Number(model.KappaCritAt(request.new_tokens))},
          {"critical_chunk_tokens", Number(model.critical_chunk_tokens())},
          {"device_tokens", std::floor(machine.device_tokens)},
          {"host_tokens", std::floor(machine.host_tokens)},
          {"device_sessions", std::floor(machine.device_tokens / session)},
          {"host_sessions", std::floor(machine.host_tokens / session)},
          {"first_token_seconds", SecondsOf(model, request)}};
}

std::string Show(const ordered_json& value, std::string_view format) {
  if (!value.is_number()) return value.get<std::string>();
  return fmt::format(fmt::runtime(format), value.get<double>());
}

}  // namespace

ordered_json PlanReport(const PlanRequest& request, const std::vector<PlanMachine>& machines) {
  ordered_json report = {
      {"model", request.model}, {"cached_tokens", request.cached_tokens}, {"new_tokens", request.new_tokens}};
  if (!machines.empty()) {
    const ModelCosts& costs = machines.front().model.costs();
    report["kv_bytes_per_token"] = costs.kv_bytes_per_token;
    report["flops_per_token"] = costs.flops_per_token;
    report["attention_flops_per_key"] = costs.attention_flops_per_key;
    report["weight_bytes"] = costs.weight_bytes;
  }
  report["machines"] = ordered_json::array();
  for (const PlanMachine& machine : machines) report["machines"].push_back(MachineReport(machine, request));
  return report;
}

std::string ShowPlan(const ordered_json& report) {
  std::string text = fmt::format(
      "{}: {:.0f} KV bytes and {:.3g} FLOPs per token, {} of weights\n"
      "A session: {} tokens in the host tier, then {} new ones. Times until its first token.\n\n"
      "{:<10} {:<9} {:>8} {:>9} {:>7} {:>8} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8}  {}\n",
      report["model"].get<std::string>(), report["kv_bytes_per_token"].get<double>(),
      report["flops_per_token"].get<double>(),
      ShowSize(static_cast<std::int64_t>(report["weight_bytes"].get<double>())),
      report["cached_tokens"].get<std::int64_t>(), report["new_tokens"].get<std::int64_t>(), "hardware", "speeds are",
      "TFLOP/s", "link GB/s", "k_crit", "k_crit@T", "T*", "on device", "on host", "load s", "recomp s", "split s",
      "best");
  for (const ordered_json& machine : report["machines"]) {
    const ordered_json& seconds = machine["first_token_seconds"];
    text += fmt::format(
        "{:<10} {:<10} {:>7.4g} {:>9.4g} {:>7} {:>8} {:>8} {:>9} {:>9} {:>8} {:>8} {:>8}  {}\n",
        machine["hardware"].get<std::string>(), machine["source"].get<std::string>(),
        machine["flops_per_second"].get<double>() / 1e12, machine["link_bytes_per_second"].get<double>() / 1e9,
        Show(machine["kappa_crit"], "{:.2f}"), Show(machine["kappa_crit_at_new_tokens"], "{:.2f}"),
        Show(machine["critical_chunk_tokens"], "{:.0f}"), Show(machine["device_sessions"], "{:.0f}"),
        Show(machine["host_sessions"], "{:.0f}"), Show(seconds["load"], "{:.3f}"), Show(seconds["recompute"], "{:.3f}"),
        Show(seconds["split"], "{:.3f}"), seconds["best"].get<std::string>());
  }
  return text;
}

}  // namespace spillway
