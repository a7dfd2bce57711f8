#pragma once

// Hardware: a described machine, for plans and replays. Nothing here is measured; an engine's own speeds come from
// Calibration.

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "engine/cost_model.h"

namespace spillway {

// What one engine runs on: `accelerators` of a kind as one (tensor parallel), over the memory of one host.
struct Hardware {
  std::string name;
  std::string label;
  double accelerators = 1;
  double replicas = 1;  // engines, each with all of the above

  // Of one accelerator.
  double flops_per_second = 0;  // dense bf16 peak
  double memory_bytes = 0;
  double memory_bytes_per_second = 0;
  double link_bytes_per_second = 0;  // host to device, sustained

  double host_bytes = 0;  // for KV
  // What is reached of the peaks.
  double compute_efficiency = 0.5;
  double memory_efficiency = 0.8;
  double memory_share = 0.9;              // of memory_bytes for weights and KV together
  double step_overhead_seconds = 0.003;   // launches, collectives, the host's part
  double host_link_bytes_per_second = 0;  // most that all links of one host move together; 0: their sum
};

const std::vector<Hardware>& KnownHardware();
std::optional<Hardware> FindHardware(std::string_view name);

// All accelerators' links together.
double LinkBytesPerSecond(const Hardware& hardware);
// KV tokens that the accelerators hold beside the weights; 0: not even those fit.
double DeviceTokens(const Hardware& hardware, const ModelCosts& costs);
double HostTokens(const Hardware& hardware, const ModelCosts& costs);
CostModel CostModelOf(const Hardware& hardware, const ModelCosts& costs);

}  // namespace spillway
