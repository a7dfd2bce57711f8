#include <fmt/format.h>

#include <cstdio>

#include "engine/hardware.h"
#include "engine/known_models.h"
#include "engine/model.h"
#include "kernels/status_macros.h"
#include "server/bench_report.h"
#include "server/commands.h"
#include "server/engine_host.h"
#include "server/hardware_file.h"
#include "server/log.h"
#include "server/model_path.h"
#include "server/modelled_choice.h"
#include "server/plan_report.h"

// `spillway plan`: arithmetic only, but for --hardware this, which loads the model and measures.

namespace spillway {
namespace {

// The engine's speeds as it calibrated them.
absl::StatusOr<PlanMachine> MeasureThis(const Options& options, const Environment& environment) {
  ASSIGN_OR_RETURN(const EngineHost host, MakeEngineHost(options, environment));
  const EngineStatus status = host.engine->status();
  const double block_bytes = static_cast<double>(host.engine->model().kv_layout().block_bytes());
  const double host_bytes =
      host.host_tier != nullptr ? static_cast<double>(host.host_tier->stats().capacity_bytes) : 0.0;
  return PlanMachine{.name = "this",
                     .label = host.device().description(),
                     .is_measured = true,
                     .model = *status.cost_model,
                     .device_tokens = static_cast<double>(host.engine->capacity_tokens()),
                     .host_tokens = host_bytes / block_bytes * kBlockTokens};
}

absl::StatusOr<std::vector<PlanMachine>> Machines(const Options& options, const Environment& environment) {
  const std::string& name = options.modelled.hardware;
  std::vector<PlanMachine> machines;
  if (name == "this") {
    ASSIGN_OR_RETURN(PlanMachine machine, MeasureThis(options, environment));
    machines.push_back(std::move(machine));
    return machines;
  }
  std::vector<Hardware> described = KnownHardware();
  if (!name.empty()) {
    ASSIGN_OR_RETURN(const Hardware hardware, ReadHardware(name));
    described = {hardware};
  }
  ASSIGN_OR_RETURN(const ModelCosts costs, ReadModelCosts(options.model.model, environment));
  for (const Hardware& hardware : described) {
    machines.push_back({.name = hardware.name,
                        .label = hardware.label,
                        .is_measured = false,
                        .model = CostModelOf(hardware, costs),
                        .device_tokens = DeviceTokens(hardware, costs),
                        .host_tokens = HostTokens(hardware, costs)});
  }
  return machines;
}

}  // namespace

int PlanCommand(const Options& options, const Environment& environment) {
  const auto machines = Machines(options, environment);
  if (!machines.ok()) {
    Log(LogLevel::kError, std::string(machines.status().message()));
    return kExitFailed;
  }
  const auto report = PlanReport({.model = options.model.model,
                                  .cached_tokens = options.modelled.cached_tokens,
                                  .new_tokens = options.modelled.new_tokens},
                                 *machines);
  const std::string& json = options.modelled.json;
  if (json != "/dev/stdout") fmt::print("{}", ShowPlan(report));
  if (json.empty()) return 0;
  const absl::Status written = WriteReport(json, report.dump(2) + "\n");
  if (written.ok()) return 0;
  Log(LogLevel::kError, std::string(written.message()));
  return kExitFailed;
}

}  // namespace spillway
